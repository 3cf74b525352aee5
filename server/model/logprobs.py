"""Log-probabilities of given tokens under the model's own distribution, and the likeliest tokens beside each.

Raw logits in, before any penalty, temperature or filter (sampler.py never changes them). Rows are taken in slices, so
that the float32 copy of a vocabulary-wide matrix stays small; and each row's likeliest tokens are sought in the same
way whatever its neighbours ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from server.records import MAX_TOP_LOGPROBS, TokenLogprobs

SLICE_ROWS: Final = 64


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs | None]:
    """For each row its token's logprob and the `tops[row]` likeliest tokens; None for a row that is not finite.

    logits: [rows, vocabulary], any floating dtype; tokens and tops: one per row, 0 <= tops <= MAX_TOP_LOGPROBS.
    """
    found: list[TokenLogprobs | None] = []
    for first in range(0, len(tokens), SLICE_ROWS):
        rows = slice(first, first + SLICE_ROWS)
        found += _slice(logits[rows].float(), tokens[rows], tops[rows])
    return found


def _slice(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs | None]:
    logprobs = torch.log_softmax(logits, dim=-1)
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    # As many for every row: how they are sought, and so which of two equals is found, depends on the number.
    values, ids = (found.tolist() for found in logprobs.topk(min(MAX_TOP_LOGPROBS, logits.shape[-1]), dim=-1))
    return [
        TokenLogprobs(own[row], tuple(ids[row][:top]), tuple(values[row][:top])) if finite[row] else None
        for row, top in enumerate(tops)
    ]
