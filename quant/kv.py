"""Keys and values of a cache in 8 bits, in plain torch: the format that reference and kernels share.

Each head of a token's key or value is int8 codes beside one float32 scale:

    absmax = largest magnitude        scale = absmax / 127        code = nearest(value * (1 / absmax * 127))

to nearest, ties to even; value = code * scale. A value is off by half a scale at most, absmax / 254, and by what
float32 rounds, five times absmax * 2^-24 at most. A head whose absmax is below SMALLEST_STORED is zeros with the scale
0, off by its absmax. One with a NaN or an infinity is zeros with the scale NaN: what reads it becomes NaN.

A layer's scales are one tensor, [blocks, block_tokens, kv heads, 2]: the key's, then the value's. Not here: where rows
go and what is computed with them (reference.py, csrc).
"""

from __future__ import annotations

from typing import Final

import torch

from quant import formats

DTYPES: Final[dict[str, torch.dtype]] = {str(dtype).removeprefix("torch."): dtype for dtype in formats.STORE_DTYPES}
"""What a cache can keep keys and values in, by name."""


def quantize_heads(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., size] of any floating dtype -> int8 codes of that shape, and float32 scales [...]."""
    values = rows.float()
    absmax = values.abs().amax(dim=-1)
    is_kept = absmax.isfinite() & (absmax >= formats.SMALLEST_STORED)
    factor = torch.where(is_kept, 1.0 / absmax * formats.INT8_MAX, 0.0)[..., None]
    codes = torch.where(is_kept[..., None], torch.round(values * factor), 0.0).to(torch.int8)
    scales = torch.where(is_kept, absmax / formats.INT8_MAX, 0.0)
    return codes, torch.where(absmax.isfinite(), scales, torch.nan)


def dequantize_heads(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes [..., size] and scales [...] -> values in `dtype`, multiplied in float32."""
    return (codes.float() * scales[..., None]).to(dtype)


def head_bytes(size: int, dtype: torch.dtype) -> int:
    """Bytes that one head of a key or value takes in a cache, its scale among them."""
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return size * dtype.itemsize + scale
