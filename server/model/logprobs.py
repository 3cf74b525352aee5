"""Log-probabilities of given tokens under the model's own distribution, and the likeliest tokens beside each.

Raw logits in, before any penalty, temperature or filter (sampler.py never changes them). Rows are taken in slices, so
that the float32 copy of a vocabulary-wide matrix stays small; and each row's likeliest tokens are sought in the same
way whatever its neighbours ask for. Nothing here waits for the device: what is found is a tensor, whose rows are read
when it has been brought.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.records import MAX_TOP_LOGPROBS, SCORED_SLICE_ROWS, TokenLogprobs


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What `read` takes of each row, float64 [rows, 2 + 2 * n]: whether it is finite, its token's logprob, the n
    likeliest tokens' logprobs and their ids. n is MAX_TOP_LOGPROBS or the vocabulary's size, if that is less.

    logits: [rows, vocabulary], any floating dtype; tokens: int64 [rows].
    """
    slices = [slice(first, first + SCORED_SLICE_ROWS) for first in range(0, len(tokens), SCORED_SLICE_ROWS)]
    return torch.cat([_slice(logits[rows].float(), tokens[rows]) for rows in slices])


def _slice(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(logits, dim=-1)
    finite = torch.isfinite(logits.amax(dim=-1, keepdim=True))
    own = logprobs.gather(-1, tokens[:, None])
    # As many for every row: how they are sought, and so which of two equals is found, depends on the number.
    values, ids = logprobs.topk(min(MAX_TOP_LOGPROBS, logits.shape[-1]), dim=-1)
    return torch.cat([part.double() for part in (finite, own, values, ids)], dim=1)


def read(row: Sequence[float], top: int) -> TokenLogprobs | None:
    """One row of what `token_logprobs` found, with at most `top` <= MAX_TOP_LOGPROBS likeliest tokens; None where its
    logits are not finite.
    """
    finite, own, *likeliest = row
    if not finite:
        return None
    values, ids = likeliest[: len(likeliest) // 2], likeliest[len(likeliest) // 2 :]
    return TokenLogprobs(own, tuple(int(token) for token in ids[:top]), tuple(values[:top]))
