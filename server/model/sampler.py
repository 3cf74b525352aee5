"""Logits to next tokens, for a whole batch at once, each row with its own settings.

    logits -> edits.py: biases, penalties, tokens ruled out -> temperature -> filters.py: top_k, top_p, min_p, typical_p
           -> one draw, or for temperature 0 the largest of what edits.py left

A random number here is a function of a request's seed and of which of its tokens is drawn, and of nothing else: no
generator has a state that a neighbour, a preemption or an aborted step could advance. Each row draws one number u in
[0, 1) and takes the first token whose cumulative probability exceeds u (inverse transform sampling). Greedy rows that
nothing edits cost one maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from quant import direct_rows, formats, reference
from quant.direct import is_direct
from server.model.batch import Draw
from server.model.edits import edit
from server.model.filters import filters, leave_out
from server.model.transfer import on_device

NOT_FINITE: Final = -1
NONE_LEFT: Final = -2
FAULTS: Final = {
    NOT_FINITE: "the model's logits for this request are not finite numbers, so that no token can be chosen",
    NONE_LEFT: "allowed_token_ids, bad_words and min_tokens together rule out every token that could come next",
}
"""Why a row has no next token, by what stands in its place."""
_MASK64: Final = (1 << 64) - 1
_SPLITMIX_STEP: Final = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of this seed's sequence (SplitMix64 by Steele, Lea and Flood, 2014; 53 bits)."""
    state = (_mix(seed & _MASK64) + (index + 1) * _SPLITMIX_STEP) & _MASK64
    return (_mix(state) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The next token of each row, int64 [rows], or a negative key of FAULTS for a row that has none.

    logits: [rows, vocabulary], any floating dtype, any device, not changed; draws: one per row. Greedy rows
    (temperature 0) take the largest logit, the first of equals. Nothing is waited for: tokens are where logits are.
    """
    if not draws:
        return logits.new_empty(0, dtype=torch.int64)
    tokens = _greatest(logits)
    special = [row for row, draw in enumerate(draws) if draw.params.temperature > 0 or draw.history is not None]
    if special:
        rows = on_device(special, logits.device)
        chosen = _choose(logits.index_select(0, rows).float(), [draws[row] for row in special])
        tokens = torch.where(tokens == NOT_FINITE, tokens, tokens.index_copy(0, rows, chosen))
    return tokens


def _greatest(logits: torch.Tensor) -> torch.Tensor:
    """The place of each row's largest logit, the first of equals; NOT_FINITE, which argmax says too, where that is
    not a finite number."""
    if is_direct(logits) and logits.dtype in formats.VALUE_DTYPES:
        return direct_rows.argmax(logits)
    return reference.argmax(logits)


def _choose(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """scores: [rows, vocabulary] float32, which this may change -> tokens [rows] int64, or keys of FAULTS."""
    edited = [row for row, draw in enumerate(draws) if draw.history is not None]
    if edited:
        rows = on_device(edited, scores.device)
        some = scores.index_select(0, rows)
        edit(some, [draw.history for draw in draws if draw.history is not None])
        scores.index_copy_(0, rows, some)
    greatest, tokens = scores.max(dim=-1)
    drawing = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    if drawing:
        rows = on_device(drawing, scores.device)
        tokens.index_copy_(0, rows, _draw(scores.index_select(0, rows), [draws[row] for row in drawing]))
    return torch.where(torch.isneginf(greatest), NONE_LEFT, tokens)


def _draw(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """scores: [rows, vocabulary] float32 -> tokens [rows] int64."""
    device = scores.device
    temperature = on_device([draw.params.temperature for draw in draws], device, torch.float32)
    temperature.clamp_min_(torch.finfo(torch.float32).tiny)  # what is smaller became 0 on its way to float32
    # The largest logit becomes 0 first: a tiny temperature then leads to -inf, never to inf - inf.
    scaled = (scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    u = on_device([uniform(draw.seed, draw.index) for draw in draws], device, torch.float64)
    filtered = [row for row, draw in enumerate(draws) if filters(draw.params)]
    if not filtered:
        return _invert(probabilities, u)
    rows = on_device(filtered, device)
    ordered, order = torch.sort(probabilities.index_select(0, rows), dim=-1, descending=True, stable=True)
    leave_out(ordered, [draws[row].params for row in filtered])
    place = _invert(ordered, u.index_select(0, rows))
    chosen = order.gather(-1, place[:, None])[:, 0]
    if len(filtered) == len(draws):
        return chosen
    return _invert(probabilities, u).index_copy(0, rows, chosen)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds u times the total; weights: [rows, n] float32, u: [rows] float64.

    Sums are taken in float64, so that the tail of a large vocabulary is not rounded away. A weight of 0 is never
    chosen: the cumulative sum does not rise there, and u times the total is below the total for every u < 1.
    """
    cumulative = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    target = u[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)
