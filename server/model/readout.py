"""From the logits of a batch's wanted rows to a StepResult: next tokens, their logprobs, and those of prompt tokens.

    wanted rows   | chunk a: draw | chunk b: score score score | chunk c: score score draw | chunk d: draw draw draw |

What both runners do with logits, however they came by them. Everything is computed where the logits are, and brought
in one transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from server.model.batch import Chunk, StepResult
from server.model.logprobs import read, token_logprobs
from server.model.sampler import FAULTS, NONE_LEFT, NOT_FINITE, sample
from server.model.transfer import on_device


@torch.inference_mode()
def read_logits(chunks: Sequence[Chunk], logits: torch.Tensor, result: StepResult) -> None:
    """Adds to `result` what these chunks' rows say; a row that is not finite becomes that request's error.

    logits: [wanted rows, vocabulary], those of each chunk behind those of the one before it.
    """
    if all(_only_draws(chunk) for chunk in chunks):  # most steps; of many sequences, this is half as long
        drawn = sample(logits, [chunk.draw for chunk in chunks if chunk.draw is not None])
        _keep_tokens(chunks, _bring(drawn, None)[0], result)
        return
    ends = list(accumulate(chunk.wanted for chunk in chunks))
    drawing = [(end, chunk) for end, chunk in zip(ends, chunks, strict=True) if chunk.draw is not None]
    rows = [row for end, chunk in drawing for row in range(end - chunk.draws, end)]
    drawn = sample(_rows(logits, rows), [draw for _, chunk in drawing for draw in chunk.each_draw()])
    asked = [one for end, chunk in zip(ends, chunks, strict=True) for one in _asked(chunk, end)]
    tokens, found = _bring(drawn, _logprobs(logits, asked, rows, drawn))
    _keep_tokens([chunk for _, chunk in drawing], tokens, result)
    _keep_logprobs(asked, found, result)
    for request_id in result.errors:
        result.tokens.pop(request_id, None)


def _only_draws(chunk: Chunk) -> bool:
    """Whether all that is wanted of it is one token."""
    return chunk.draw is not None and not chunk.drafted and chunk.score is None and chunk.draw.params.logprobs is None


class _Asked(NamedTuple):
    """A token whose logprob is wanted, in one row of the logits."""

    request_id: str
    row: int
    token: int | None
    """Of the prompt; None for the one that the row draws."""
    place: int
    """Of a drawn one: how many the request draws before it."""
    top: int


def _asked(chunk: Chunk, end: int) -> Iterator[_Asked]:
    if chunk.score is not None:
        for row, token in enumerate(chunk.score.tokens, start=end - chunk.wanted):
            yield _Asked(chunk.request_id, row, token, 0, chunk.score.top)
    top = chunk.draw.params.logprobs if chunk.draw is not None else None
    if top is not None:
        for place in range(chunk.draws):
            yield _Asked(chunk.request_id, end - chunk.draws + place, None, place, top)


def _logprobs(
    logits: torch.Tensor, asked: Sequence[_Asked], drawing: Sequence[int], drawn: torch.Tensor
) -> torch.Tensor | None:
    """Those of all that is asked, as logprobs.py has them; `drawn` are the tokens of the rows `drawing`."""
    if not asked:
        return None
    place_of = {row: place for place, row in enumerate(drawing)}
    known = [one.token for one in asked if one.token is not None]
    places = iter(range(len(drawing), len(drawing) + len(known)))
    both = torch.cat([drawn.clamp_min(0), on_device(known, drawn.device)])  # a fault stands where no token is
    which = [place_of[one.row] if one.token is None else next(places) for one in asked]
    tokens = both.index_select(0, on_device(which, both.device))
    return token_logprobs(_rows(logits, [one.row for one in asked]), tokens)


def _bring(tokens: torch.Tensor, logprobs: torch.Tensor | None) -> tuple[list[int], list[list[float]]]:
    """Both from the device at once; numbers of tokens are exact in float64."""
    if logprobs is None:
        return tokens.tolist(), []
    flat = torch.cat([tokens.double(), logprobs.flatten()]).tolist()
    width, rest = logprobs.shape[1], flat[len(tokens) :]
    rows = [rest[first : first + width] for first in range(0, len(rest), width)]
    return [int(token) for token in flat[: len(tokens)]], rows


def _keep_tokens(chunks: Sequence[Chunk], tokens: Sequence[int], result: StepResult) -> None:
    """tokens: for each chunk, all of which draw, one for each row that does."""
    end = 0
    for chunk in chunks:
        start, end = end, end + 1 + chunk.drafted
        kept = tokens[start:end]
        if chunk.drafted:
            kept = chunk.kept(kept)
        if min(kept) >= 0:  # a token; faults are negative
            result.tokens[chunk.request_id] = kept
            continue
        fault = next(place for place, token in enumerate(kept) if token in FAULTS)
        if fault == 0:
            result.errors[chunk.request_id] = FAULTS[kept[0]]
            if kept[0] == NONE_LEFT:
                result.refused.add(chunk.request_id)
        else:  # a fault behind others is found again by the next step, as its first
            result.tokens[chunk.request_id] = kept[:fault]


def _keep_logprobs(asked: Sequence[_Asked], found: Sequence[Sequence[float]], result: StepResult) -> None:
    for one, row in zip(asked, found, strict=True):
        if one.token is None and one.place >= len(result.tokens.get(one.request_id, ())):
            continue  # it does not count, or there is none
        logprobs = read(row, one.top)
        if logprobs is None:
            result.errors[one.request_id] = FAULTS[NOT_FINITE]
        elif one.token is not None:
            result.prompt_logprobs.setdefault(one.request_id, []).append(logprobs)
        else:
            result.logprobs.setdefault(one.request_id, []).append(logprobs)


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows of the logits; no copy is made where they are all of them."""
    if rows == list(range(len(logits))):
        return logits
    return logits.index_select(0, on_device(rows, logits.device))
