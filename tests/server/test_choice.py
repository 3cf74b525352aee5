"""A choice's text where an output brings several tokens at once: it ends and counts as if they came one by one."""

from __future__ import annotations

import pytest

from server.api.choice import ChoiceText
from server.records import SamplingParams, SequenceOutput, TokenLogprobs
from server.text.tokenizer import Tokenizer
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
