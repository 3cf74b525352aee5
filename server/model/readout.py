"""From the logits of a batch's wanted rows to a StepResult: next tokens, their logprobs, and those of prompt tokens.

    wanted rows   | chunk a: draw | chunk b: score score score | chunk c: score score draw |

What both runners do with logits, however they came by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from server.model.batch import Chunk, StepResult
from server.model.logprobs import token_logprobs
from server.model.sampler import FAULTS, NONE_LEFT, NOT_FINITE, sample


def read_logits(chunks: Sequence[Chunk], logits: torch.Tensor, result: StepResult) -> None:
    """Adds to `result` what these chunks' rows say; a row that is not finite becomes that request's error.

    logits: [wanted rows, vocabulary], those of each chunk behind those of the one before it.
    """
    ends = list(accumulate(chunk.wanted for chunk in chunks))
    _draw(chunks, ends, logits, result)
    _score(chunks, ends, logits, result)
    for request_id in result.errors:
        result.tokens.pop(request_id, None)


def _draw(chunks: Sequence[Chunk], ends: Sequence[int], logits: torch.Tensor, result: StepResult) -> None:
    drawing = [(end - 1, chunk, chunk.draw) for end, chunk in zip(ends, chunks, strict=True) if chunk.draw is not None]
    tokens = sample(_rows(logits, [row for row, _, _ in drawing]), [draw for _, _, draw in drawing])
    for (_, chunk, _), token in zip(drawing, tokens, strict=True):
        if token in FAULTS:
            result.errors[chunk.request_id] = FAULTS[token]
            if token == NONE_LEFT:
                result.refused.add(chunk.request_id)
        else:
            result.tokens[chunk.request_id] = token


def _score(chunks: Sequence[Chunk], ends: Sequence[int], logits: torch.Tensor, result: StepResult) -> None:
    asked = [one for end, chunk in zip(ends, chunks, strict=True) for one in _asked(chunk, end, result)]
    if not asked:
        return
    rows = _rows(logits, [one.row for one in asked])
    found = token_logprobs(rows, [one.token for one in asked], [one.top for one in asked])
    for one, logprobs in zip(asked, found, strict=True):
        if logprobs is None:
            result.errors[one.request_id] = FAULTS[NOT_FINITE]
        elif one.of_prompt:
            result.prompt_logprobs.setdefault(one.request_id, []).append(logprobs)
        else:
            result.logprobs[one.request_id] = logprobs


class _Asked(NamedTuple):
    """A token whose logprob is wanted, in one row of the logits."""

    request_id: str
    row: int
    token: int
    top: int
    of_prompt: bool


def _asked(chunk: Chunk, end: int, result: StepResult) -> Iterator[_Asked]:
    if chunk.score is not None:
        for row, token in enumerate(chunk.score.tokens, start=end - chunk.wanted):
            yield _Asked(chunk.request_id, row, token, chunk.score.top, of_prompt=True)
    top = chunk.draw.params.logprobs if chunk.draw is not None else None
    if top is not None and chunk.request_id in result.tokens:
        yield _Asked(chunk.request_id, end - 1, result.tokens[chunk.request_id], top, of_prompt=False)


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows of the logits; no copy is made where they are all of them."""
    if rows == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(rows, dtype=torch.int64, device=logits.device))
