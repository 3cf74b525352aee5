"""4-bit quantization that looks for each block's best scale and sign: the same format and size, a smaller error.

A block's absmax is only the factor that its codes are multiplied with: it may be smaller or larger than the largest
magnitude, and negative, which readers of the format take as it is. The search itself is an operator
(ops.search_scales_4bit); here its scales become a quantized tensor: with double quantization the codes are picked for
the scales as they will be read back. Not here: the format (formats.py), what the operators compute (reference.py),
files (state.py).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from quant import formats, ops

_VALUES_AT_ONCE: Final = 1 << 24
"""In comparing errors, for the memory's sake; a multiple of every block size."""
_VALUES_AT_ONCE_ON_CPU: Final = 1 << 15
"""There they stay in the processor's cache, and torch on the calling thread: waking others takes longer."""


class Quantized(NamedTuple):
    """What ops.quantize_4bit and ops.quantize_absmax give, `nested_absmax` and `offset` with double quantization."""

    packed: torch.Tensor  # uint8 [ceil(n / 2)]
    absmax: torch.Tensor  # float32 [B], of either sign; uint8 [B] with double quantization
    nested_absmax: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def quantize_4bit_plainly(x: torch.Tensor, quant_type: str, blocksize: int, *, double_quant: bool = False) -> Quantized:
    """The format's own quantization: ops.quantize_4bit, then ops.quantize_absmax with double quantization."""
    packed, absmax = ops.quantize_4bit(x, quant_type, blocksize)
    return _with_second_level(packed, absmax) if double_quant else Quantized(packed, absmax)


def quantize_4bit_searching(
    x: torch.Tensor, quant_type: str, blocksize: int, *, double_quant: bool = False
) -> Quantized:
    """Blockwise 4-bit quantization of the flattened `x` with a squared error that is never above the plain one's.

    x: any shape, n values, float32 / float16 / bfloat16; blocksize: one of formats.BLOCKSIZES. A block that holds a NaN
    or an infinity, and a tensor on meta, are quantized plainly. Raises ShapeError as ops.quantize_4bit does.
    """
    if x.is_meta or x.numel() == 0:
        return quantize_4bit_plainly(x, quant_type, blocksize, double_quant=double_quant)
    x = x.detach().reshape(-1)
    scales = ops.search_scales_4bit(x, quant_type, blocksize)
    if not double_quant:
        return Quantized(ops.encode_4bit(x, scales, quant_type, blocksize), scales)
    plain = quantize_4bit_plainly(x, quant_type, blocksize, double_quant=True)
    nested = _with_second_level(plain.packed, scales)
    if nested.offset is None or not bool(nested.offset.isfinite()):
        return plain  # some block is not finite, which spreads with the offset: nothing can be gained
    found = nested._replace(packed=ops.encode_4bit(x, _plain_absmax(nested), quant_type, blocksize))
    # Scales of both signs are further apart than maxima, so that a small tensor can lose more by the second level than
    # it gains.
    return min(plain, found, key=lambda each: _squared_error(x, each, quant_type, blocksize))


def _with_second_level(packed: torch.Tensor, absmax: torch.Tensor) -> Quantized:
    codes, nested_absmax, offset = ops.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)
    return Quantized(packed, codes, nested_absmax, offset)


def _plain_absmax(found: Quantized) -> torch.Tensor:
    if found.nested_absmax is None or found.offset is None:
        return found.absmax
    return ops.dequantize_absmax(found.absmax, found.nested_absmax, found.offset, formats.NESTED_BLOCKSIZE)


def _squared_error(flat: torch.Tensor, found: Quantized, quant_type: str, blocksize: int) -> float:
    absmax = _plain_absmax(found)
    step = _VALUES_AT_ONCE_ON_CPU if flat.device.type == "cpu" else _VALUES_AT_ONCE
    errors = []
    for first in range(0, flat.numel(), step):
        piece = flat[first : first + step]
        packed = found.packed[first // 2 :][: formats.packed_bytes(piece.numel())]
        scales = absmax[first // blocksize :][: formats.block_count(piece.numel(), blocksize)]
        values = ops.dequantize_4bit(packed, scales, quant_type, blocksize, piece.shape, torch.float32)
        values -= piece
        errors.append(values.square_().sum())
    return float(torch.stack(errors).double().sum())
