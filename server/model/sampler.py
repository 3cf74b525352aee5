"""Logits to next tokens, for a whole batch at once, each row with its own settings.

A random number here is a function of a request's seed and of which of its tokens is drawn, and of nothing else: no
generator has a state that a neighbour, a preemption or an aborted step could advance. Each row draws one number u in
[0, 1) and takes the first token whose cumulative probability exceeds u (inverse transform sampling). Filters follow
the order of transformers and of the API's documentation: temperature, then top_k, then top_p over what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from server.model.batch import Draw

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


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """The next token of each row, or None for a row whose logits are not numbers.

    logits: [rows, vocabulary], any floating dtype, any device; draws: one per row. Greedy rows (temperature 0) take
    the largest logit, the first of equals. One transfer from the device, however many rows.
    """
    if not draws:
        return []
    greatest, tokens = logits.max(dim=-1)
    drawing = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        chosen = _draw(logits.index_select(0, rows).float(), [draws[row] for row in drawing])
        tokens = tokens.index_copy(0, rows, chosen)
    tokens = torch.where(torch.isfinite(greatest), tokens, -1)
    return [token if token >= 0 else None for token in tokens.tolist()]


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """logits: [rows, vocabulary] float32 -> tokens [rows] int64."""
    device = logits.device
    temperature = torch.tensor([draw.params.temperature for draw in draws], device=device)
    temperature.clamp_min_(torch.finfo(torch.float32).tiny)  # what is smaller became 0 on its way to float32
    # The largest logit becomes 0 first: a tiny temperature then leads to -inf, never to inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    u = torch.tensor([uniform(draw.seed, draw.index) for draw in draws], dtype=torch.float64, device=device)
    filtered = [row for row, draw in enumerate(draws) if draw.params.top_k > 0 or draw.params.top_p < 1.0]
    if not filtered:
        return _invert(probabilities, u)
    rows = torch.tensor(filtered, device=device)
    ordered, order = torch.sort(probabilities.index_select(0, rows), dim=-1, descending=True, stable=True)
    _filter(ordered, [draws[row] for row in filtered])
    place = _invert(ordered, u.index_select(0, rows))
    chosen = order.gather(-1, place[:, None])[:, 0]
    if len(filtered) == len(draws):
        return chosen
    return _invert(probabilities, u).index_copy(0, rows, chosen)


def _filter(ordered: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Zeroes what top_k and top_p leave out, in place; ordered: [rows, vocabulary], each row falling.

    top_p keeps the smallest set of the likeliest tokens whose share of what top_k left reaches top_p, at least one.
    """
    vocabulary = ordered.shape[-1]
    top_k = torch.tensor([draw.params.top_k or vocabulary for draw in draws], device=ordered.device)
    top_p = torch.tensor([draw.params.top_p for draw in draws], dtype=torch.float64, device=ordered.device)
    ordered.masked_fill_(torch.arange(vocabulary, device=ordered.device) >= top_k[:, None], 0.0)
    reached = torch.cumsum(ordered, dim=-1, dtype=torch.float64)
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    beyond = before >= top_p[:, None] * reached[:, -1:]
    beyond[:, 0] = False
    ordered.masked_fill_(beyond & (top_p[:, None] < 1.0), 0.0)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds u times the total; weights: [rows, n] float32, u: [rows] float64.

    Sums are taken in float64, so that the tail of a large vocabulary is not rounded away. A weight of 0 is never
    chosen: the cumulative sum does not rise there, and u times the total is below the total for every u < 1.
    """
    cumulative = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    target = u[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)
