"""Bad words as the token sequences that must not be completed.

A word is written differently at the start of a text, behind a space, and behind a newline or a bracket, so it is
encoded in all these places: as it is given, with a space before it unless it starts with one itself, and behind
characters whose tokens are then taken off. Many tokenizers put a space before every text, so that only the last way
gives the word's tokens without one. (vLLM has the first way, and the second where it has as many tokens.)

What was behind other characters counts only where its tokens spell the word exactly: where they are merged with a part
of it, what is left would be another word. Other ways to write the same letters, such as character by character or
merged with what is before them, are not found: the model is kept from its usual ways of writing a word. And tokens do
not say where a word begins and ends: they are not completed within a longer one either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from server.errors import RequestError
from server.sentences import shown
from server.text.tokenizer import Tokenizer

_BEFORE: Final = ("\n", "(")
"""What a word may follow without a space; two, because a tokenizer may lack the one or merge the other."""
_WAYS: Final = 2 + len(_BEFORE)
MAX_BAD_WORD_TOKENS: Final = 2**13
"""Every step looks up the end of the text once for each length that sequences have: 127 lengths at most."""


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of all words, each once; raises RequestError for a word that has no tokens."""
    if not words:
        return ()
    texts = [text for word in words for text in _written(word)]
    encoded = tokenizer.encode_all([*_BEFORE, *texts], add_special_tokens=False)
    before, ways = encoded[: len(_BEFORE)], encoded[len(_BEFORE) :]
    found: list[Sequence[int]] = []
    for place, word in enumerate(words):
        plain, spaced, *behind = ways[_WAYS * place : _WAYS * (place + 1)]
        if not plain:
            raise RequestError(
                f"'bad_words[{place}]' is {shown(word)}, which has no tokens; accepted is text the tokenizer knows",
                param=f"bad_words[{place}]",
            )
        found += [plain, spaced, *_behind(tokenizer, word, before, behind)]
    sequences = tuple(dict.fromkeys(tuple(ids) for ids in found if ids))
    total = sum(map(len, sequences))
    if total > MAX_BAD_WORD_TOKENS:
        raise RequestError(
            f"'bad_words' are {total:,} tokens in all the ways to write them; accepted are {MAX_BAD_WORD_TOKENS:,}",
            param="bad_words",
        )
    return sequences


def _written(word: str) -> tuple[str, ...]:
    """The texts in which a word is looked for, `_WAYS` of them."""
    return word, word if word[:1].isspace() else f" {word}", *(f"{before}{word}" for before in _BEFORE)


def _behind(
    tokenizer: Tokenizer, word: str, before: Sequence[Sequence[int]], encoded: Sequence[Sequence[int]]
) -> Iterator[Sequence[int]]:
    """A word's own tokens where it follows each of `_BEFORE`, if they are its own."""
    for head, ids in zip(before, encoded, strict=True):
        tail = ids[len(head) :]
        if ids[: len(head)] == head and b"".join(tokenizer.spell(token).data for token in tail) == word.encode():
            yield tail
