"""Bad words as the token sequences that must not be completed.

A word is written differently at the start of a text and behind a space, so both ways are encoded: the word as it is
given and, unless it starts with a space itself, with one before it. (vLLM leaves the second out where it has another
number of tokens, which is the usual case for words of several tokens.) Other ways to write the same letters, such as
character by character, are not found: the model is kept from its usual way of writing a word.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.errors import RequestError
from server.sentences import shown
from server.text.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of all words, each once; raises RequestError for a word that has no tokens."""
    texts = [text for word in words for text in (word, word if word[:1].isspace() else f" {word}")]
    encoded = tokenizer.encode_all(texts, add_special_tokens=False)
    for place, word in enumerate(words):
        if not encoded[2 * place]:
            raise RequestError(
                f"'bad_words[{place}]' is {shown(word)}, which has no tokens; accepted is text the tokenizer knows",
                param=f"bad_words[{place}]",
            )
    return tuple(dict.fromkeys(tuple(ids) for ids in encoded if ids))
