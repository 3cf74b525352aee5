"""top_k, top_p, min_p and typical_p: which tokens a draw is made from, each row by its own settings.

They work on probabilities that fall along the row, so most of them cut off an end. In this order, which is that of
transformers (`_get_logits_processor`): top_k, top_p over what top_k left, min_p, typical_p over what they left. vLLM
applies min_p before the first two; that differs where min_p would remove tokens that top_p counts.

    top_k      the k likeliest tokens
    top_p      the smallest set of the likeliest tokens whose share reaches top_p (Holtzman et al., 2020)
    min_p      tokens at least min_p times as likely as the likeliest one (Nguyen et al., 2024)
    typical_p  the smallest set, of those whose surprise is nearest to the entropy, whose share reaches typical_p
               (Meister et al., 2023)

At least one token is always left. No loop goes over rows: settings become columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.model.transfer import on_device
from server.records import SamplingParams


def filters(params: SamplingParams) -> bool:
    """Whether a row of these parameters has anything to leave out."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0 or params.typical_p < 1.0


def leave_out(ordered: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Zeroes what the filters leave out, in place; ordered: [rows, vocabulary] float32, each row falling."""
    _top_k(ordered, _column([one.top_k or ordered.shape[-1] for one in params], ordered))
    _top_p(ordered, _column([one.top_p for one in params], ordered))
    _min_p(ordered, _column([one.min_p for one in params], ordered))
    typical = [row for row, one in enumerate(params) if one.typical_p < 1.0]
    if typical:  # only these rows pay for a second sort
        rows = on_device(typical, ordered.device)
        some = ordered.index_select(0, rows)
        _typical_p(some, _column([params[row].typical_p for row in typical], ordered))
        ordered.index_copy_(0, rows, some)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """One setting per row: [rows, 1] float64, in which every accepted top_k is exact."""
    return on_device(values, like.device, torch.float64)[:, None]


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """[rows, 1], added up from left to right: sum() shares a single long row out among threads, and many rows not."""
    return values.cumsum(dim=-1)[:, -1:]


def _top_k(ordered: torch.Tensor, top_k: torch.Tensor) -> None:
    ordered.masked_fill_(torch.arange(ordered.shape[-1], device=ordered.device) >= top_k, 0.0)


def _top_p(ordered: torch.Tensor, top_p: torch.Tensor) -> None:
    reached = torch.cumsum(ordered, dim=-1, dtype=torch.float64)
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    beyond = before >= top_p * reached[:, -1:]
    beyond[:, 0] = False
    ordered.masked_fill_(beyond & (top_p < 1.0), 0.0)


def _min_p(ordered: torch.Tensor, min_p: torch.Tensor) -> None:
    """The likeliest token survives every filter so far, so the first column is still the largest probability."""
    ordered.masked_fill_(ordered < min_p * ordered[:, :1], 0.0)


def _typical_p(ordered: torch.Tensor, typical_p: torch.Tensor) -> None:
    """Ties in distance stay together, as in transformers."""
    probabilities = ordered.double()
    probabilities /= _row_sums(probabilities)
    entropy = -_row_sums(torch.xlogy(probabilities, probabilities))
    distance = (probabilities.log() + entropy).abs()  # of -log p from the entropy; infinite where p is 0
    nearest, order = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(-1, order).cumsum(dim=-1)
    last = (reached < typical_p).sum(dim=-1, keepdim=True).clamp_(max=ordered.shape[-1] - 1)
    ordered.masked_fill_(distance > nearest.gather(-1, last), 0.0)
