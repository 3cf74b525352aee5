"""What torch computes of attention where quant's kernel does not: prompts on CUDA, and everything on other devices.

The first of these that takes a call computes it:

    attend_many      all prompts of a part at once, by torch's varlen_attn: on CUDA from capability 8.0 on, in 16 bits,
                     with keys and values of one size, up to 256 and in eights, without a soft cap
    attend_fused     one sequence, by scaled_dot_product_attention: without a soft cap or sinks
    attend_plainly   one sequence, spelled out: anything; all scores of the sequence are in memory at once, in float32

varlen_attn could read blocks by a table of them, but only with a FlashAttention 3 from elsewhere; so keys and values
are gathered before, in the dtype of the query. It knows no sinks, but gives the logarithm of each row's sum: a sink
takes its share of the softmax and gives nothing, which is a factor for the row.

Not here: where keys and values come from (attention.py).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Final

import torch
from torch.nn import functional as F
from torch.nn.attention import varlen

from server.model.transfer import on_device

MOST_GATHERED: Final = 8192
"""Tokens of several prompts whose keys and values are gathered at once; a longer prompt goes alone."""
MOST_DIMS: Final = 256
"""Of a head that varlen_attn takes, in multiples of DIMS_STEP."""
DIMS_STEP: Final = 8
CAPABILITY: Final = (8, 0)
_GROUPED: Final[dict[str, Any]] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
)
"""torch 2.11 has grouped heads without being asked."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of sequences side by side: where the rows and the tokens of each begin and end, int32 [S + 1]."""

    rows: torch.Tensor
    tokens: torch.Tensor
    most_rows: int
    most_tokens: int

    @classmethod
    def of(cls, rows: list[int], tokens: list[int], device: torch.device) -> Lengths:
        ends = [list(accumulate(counts, initial=0)) for counts in (rows, tokens)]
        row_ends, token_ends = (on_device(counts, device, torch.int32) for counts in ends)
        return cls(row_ends, token_ends, max(rows), max(tokens))


def takes(query: torch.Tensor, value_dim: int, softcap: float | None) -> bool:
    """Whether `attend_many` computes attention of queries [H, T, D] over values [.., value_dim]."""
    dim = query.shape[-1]
    has_kernel = query.dtype in (torch.float16, torch.bfloat16) and dim <= MOST_DIMS and dim % DIMS_STEP == 0
    return has_kernel and dim == value_dim and softcap is None and query.is_cuda and _has_flash(query.device)


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= CAPABILITY


def attend_many(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Sequences side by side: [T, H, D], [L, G, D], [L, G, D], sinks [H] -> [T, H, D].

    A sequence's last row is at its last token and sees `window` tokens up to and with its own, or all.
    """
    result = varlen.varlen_attn(
        query.contiguous(),
        key,
        value,
        lengths.rows,
        lengths.tokens,
        lengths.most_rows,
        lengths.most_tokens,
        return_aux=None if sinks is None else varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **_GROUPED,
    )
    if isinstance(result, torch.Tensor):
        return result
    out, logarithms = result  # [H, T]: of the sums of a row's exponentials
    if sinks is None:
        return out
    kept = torch.sigmoid(logarithms - sinks.float()[:, None])
    return (out * kept.t()[..., None]).to(out.dtype)


def attend_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """torch's fused attention: [H, n, D], [G, L, D], [G, L, E], mask [n, L] or None for everything -> [n, H, E]."""
    heads, rows, _ = query.shape
    if rows == 1:  # heads that share keys become rows of one: no key is copied per head
        grouped = query.reshape(key.shape[0], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(grouped[None], key[None], value[None], scale=scale)
        return out.reshape(1, heads, -1)
    grouped_heads = heads != key.shape[0]
    out = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=scale, enable_gqa=grouped_heads
    )
    return out[0].transpose(0, 1)


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The same spelled out, with soft cap and sinks; the softmax in float32. Same shapes as the fused one."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (query @ key.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return (weights.to(value.dtype) @ value).transpose(0, 1)
