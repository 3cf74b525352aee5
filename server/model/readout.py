"""From the logits of a batch's wanted rows to a StepResult: next tokens, their logprobs, and those of prompt tokens.

    wanted rows   | chunk a: draw | chunk b: score score score | chunk c: score score draw | chunk d: draw draw draw |

What both runners do with logits, however they came by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
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
    drawing = [(end, chunk) for end, chunk in zip(ends, chunks, strict=True) if chunk.draw is not None]
    rows = [row for end, chunk in drawing for row in range(end - chunk.draws, end)]
    tokens = iter(sample(_rows(logits, rows), [draw for _, chunk in drawing for draw in chunk.each_draw()]))
    for _, chunk in drawing:
        kept = chunk.kept(list(islice(tokens, chunk.draws)))
        fault = next((place for place, token in enumerate(kept) if token in FAULTS), None)
        if fault == 0:
            result.errors[chunk.request_id] = FAULTS[kept[0]]
            if kept[0] == NONE_LEFT:
                result.refused.add(chunk.request_id)
        else:  # a fault behind others is found again by the next step, as its first
            result.tokens[chunk.request_id] = kept[:fault]


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
            result.logprobs.setdefault(one.request_id, []).append(logprobs)


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
        for row, token in enumerate(result.tokens[chunk.request_id], start=end - chunk.draws):
            yield _Asked(chunk.request_id, row, token, top, of_prompt=False)


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows of the logits; no copy is made where they are all of them."""
    if rows == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(rows, dtype=torch.int64, device=logits.device))
