"""A choice's text where an output brings several tokens at once: it ends and counts as if they came one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from server.api.choice import ChoiceText, prompt_tokens
from server.records import SamplingParams, SequenceOutput, TokenLogprobs
from server.text.tokenizer import Tokenizer
from tests.server.test_text import TOKENIZERS
from tests.tiny_models import byte_tokenizer

EOS = 2


@pytest.mark.parametrize(
    ("stop", "count", "text"),
    [(("cd",), 4, "ab"), (("ef", "d"), 4, "abc"), ((), 7, "abcdef"), (("x",), 7, "abcdef")],
)
def test_tokens_behind_a_stop_string_are_not_the_text_s(stop: tuple[str, ...], count: int, text: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer().backend_tokenizer, {})
    ids = (*tokenizer.encode("abcdef"), EOS)
    params = SamplingParams(max_tokens=9, stop_token_ids=(EOS,), logprobs=0)
    logprobs = tuple(TokenLogprobs(-float(place)) for place in range(len(ids)))
    found = []
    for cuts in ([7], [1] * 7, [2, 3, 2]):
        choice = ChoiceText(0, tokenizer, params, stop=stop)
        pieces, at = [], 0
        for cut in cuts:
            end = at + cut
            reason = "stop" if end == len(ids) else None
            pieces.append(choice.push(SequenceOutput("a", ids[at:end], reason, logprobs=logprobs[at:end])))
            at = end
            if choice.stopped:
                break
        given = [piece for piece in pieces if piece is not None]
        tokens = [token for piece in given for token in piece.tokens]
        found.append((choice.tokens, "".join(piece.text for piece in given), [token.logprob for token in tokens]))
    assert found[0] == found[1] == found[2]
    assert found[0][:2] == (count, text)


def surrounded() -> Tokenizer:
    """Puts special tokens around a text, and says of its tokens where they are without their spaces, as RoBERTa's."""
    rust = RustTokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    rust.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        ]
    )
    return Tokenizer(rust, {})


ECHOING = TOKENIZERS | {"surrounded": surrounded()}


def offsets(tokenizer: Tokenizer, ids: list[int], text: str | None) -> list[int]:
    scores = [TokenLogprobs(-1.0)] * (len(ids) - 1)
    return [token.offset for token in prompt_tokens(tokenizer, ids, scores, text)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("byte-level", "</s>abc", [0, 4, 5, 6]),
        ("byte-level", "é</s></s>a", [0, 0, 1, 5, 9]),
        ("surrounded", "a </s>日b", [0, 0, 1, 2, 6, 6, 6, 7, 8]),
        ("surrounded", "<s>a", [0, 0, 3, 4]),
        ("sentencepiece", "</s>é</s> é", [0, 4, 4, 5, 9, 9, 10]),
        ("sentencepiece", "a</s>\ufffd", [0, 0, 1, 5, 5, 5, 5]),
        ("metaspace", "the cat</s> sat.", [0, 3, 7, 11, 15]),
    ],
)
def test_special_tokens_of_an_echoed_text_take_the_place_of_their_spelling(
    name: str, text: str, expected: list[int]
) -> None:
    tokenizer = ECHOING[name]
    ids = tokenizer.encode(text)
    assert offsets(tokenizer, ids, text) == expected
    plain = offsets(tokenizer, ids, None)
    assert max(plain) <= len(tokenizer.decode(ids)), "of token ids there is no spelling to be echoed"


@given(text=st.text(alphabet="the cat. é日🦙\n", min_size=1, max_size=20))
@pytest.mark.parametrize("name", ECHOING)
def test_a_text_and_its_tokens_are_echoed_at_the_same_places(name: str, text: str) -> None:
    tokenizer = ECHOING[name]
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) == text:
        assert offsets(tokenizer, ids, text) == offsets(tokenizer, ids, None)
