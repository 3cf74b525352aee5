"""4-bit quantization that looks for each block's best scale and sign: the same format and size, a smaller error.

A block's absmax is only the factor that its codes are multiplied with: it may be smaller or larger than the largest
magnitude, and negative, which readers of the format take as it is. Here several factors of both signs are tried for
each block, the best is refined by least squares, and with double quantization the codes are picked once more for the
factors as they will be read back. Written in plain torch, for any device; it costs some hundred times what
ops.quantize_4bit costs, once. Not here: the format (formats.py), the plain quantization (ops.py), files (state.py).
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import torch

from quant import formats, ops

FACTORS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 1.05, 1.1, 1.15)
"""Tried times the block's largest magnitude, each with both signs; the first is the plain quantization's."""
REFINEMENTS: Final = 2
"""Rounds of least squares: the best factor for the codes, then the best codes for the factor."""
_VALUES_AT_ONCE: Final = 1 << 19


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
    packed, absmax = ops.quantize_4bit(x, quant_type, blocksize)
    plain = _with_second_level(packed, absmax) if double_quant else Quantized(packed, absmax)
    flat = x.detach().reshape(-1)
    scales = torch.cat([_best_scales(piece, quant_type, blocksize) for piece in _pieces(flat)])
    scales = torch.where(absmax.isfinite(), scales, absmax)
    if not double_quant:
        found = Quantized(_codes(flat, scales, packed, quant_type, blocksize), scales)
    elif bool(absmax.isfinite().all()):
        nested = _with_second_level(packed, scales)
        found = nested._replace(packed=_codes(flat, _plain_absmax(nested), packed, quant_type, blocksize))
    else:
        return plain  # the shared offset is not finite: nothing can be gained
    return min(plain, found, key=lambda each: _squared_error(flat, each, quant_type, blocksize))


def _with_second_level(packed: torch.Tensor, absmax: torch.Tensor) -> Quantized:
    codes, nested_absmax, offset = ops.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)
    return Quantized(packed, codes, nested_absmax, offset)


def _plain_absmax(found: Quantized) -> torch.Tensor:
    if found.nested_absmax is None or found.offset is None:
        return found.absmax
    return ops.dequantize_absmax(found.absmax, found.nested_absmax, found.offset, formats.NESTED_BLOCKSIZE)


@functools.cache
def _ascending(quant_type: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The format's different values in ascending order, the midpoints between them, the code of each value."""
    table = formats.FOUR_BIT[quant_type].table
    codes = sorted({value: code for code, value in reversed(list(enumerate(table)))}.values(), key=table.__getitem__)
    values = formats.CODE_TABLES[quant_type][codes]
    return values, (values[1:] + values[:-1]) / 2, torch.tensor(codes, dtype=torch.uint8, device="cpu")


def _nearest(blocks: torch.Tensor, scales: torch.Tensor, midpoints: torch.Tensor) -> torch.Tensor:
    """The rank of the value whose product with its block's scale is nearest; for a scale of 0 that of zero."""
    reciprocals = torch.where(scales == 0, 0.0, scales.reciprocal())
    return torch.bucketize(blocks * reciprocals[:, None], midpoints, out_int32=True)


def _best_scales(piece: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """float32 [blocks] for whole blocks (the last may be short): the scales with the smallest squared error."""
    values, midpoints, _ = (tensor.to(piece.device) for tensor in _ascending(quant_type))
    blocks = _in_blocks(piece, blocksize)
    largest = blocks.abs().amax(dim=1)
    best = largest.clone()
    best_error = torch.full_like(largest, torch.inf)

    def attempt(scales: torch.Tensor) -> None:
        nonlocal best, best_error
        error = (blocks - values[_nearest(blocks, scales, midpoints)] * scales[:, None]).square().sum(dim=1)
        is_better = error < best_error
        best = torch.where(is_better, scales, best)
        best_error = torch.where(is_better, error, best_error)

    is_symmetric = formats.FOUR_BIT[quant_type].signed_magnitude
    for factor in FACTORS:
        attempt(largest * factor)
        if not is_symmetric:  # else the other sign gives the same values
            attempt(largest * -factor)
    for _ in range(REFINEMENTS):
        chosen = values[_nearest(blocks, best, midpoints)]
        power = chosen.square().sum(dim=1)
        attempt(torch.where(power == 0, best, (blocks * chosen).sum(dim=1) / power))
    return best


def _pieces(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Whole blocks that fit a processor's caches; the search holds several tensors of a piece's size."""
    return torch.split(flat, _VALUES_AT_ONCE)


def _in_blocks(piece: torch.Tensor, blocksize: int) -> torch.Tensor:
    """float32 [blocks, blocksize]; zeros, which every format has, fill a short block."""
    return torch.nn.functional.pad(piece.float(), (0, -piece.numel() % blocksize)).view(-1, blocksize)


def _codes(
    flat: torch.Tensor, scales: torch.Tensor, plain: torch.Tensor, quant_type: str, blocksize: int
) -> torch.Tensor:
    """Packed codes of the nearest values at these scales; blocks whose scale is not finite keep their plain codes."""
    _, midpoints, code_of_rank = (tensor.to(flat.device) for tensor in _ascending(quant_type))
    packed = []
    blocks_at_once = _VALUES_AT_ONCE // blocksize
    for piece, piece_scales in zip(_pieces(flat), torch.split(scales, blocks_at_once), strict=True):
        codes = code_of_rank[_nearest(_in_blocks(piece, blocksize), piece_scales, midpoints)].view(-1, 2)
        packed.append((codes[:, 0] << formats.HIGH_NIBBLE_SHIFT | codes[:, 1])[: formats.packed_bytes(piece.numel())])
    found = torch.cat(packed)
    is_finite = scales.isfinite().repeat_interleave(blocksize // 2)[: found.numel()]
    return torch.where(is_finite, found, plain)


def _squared_error(flat: torch.Tensor, found: Quantized, quant_type: str, blocksize: int) -> float:
    """Summed over the blocks with finite values."""
    absmax = _plain_absmax(found)
    values = ops.dequantize_4bit(found.packed, absmax, quant_type, blocksize, [flat.numel()], torch.float32)
    total = 0.0
    for piece, decoded in zip(_pieces(flat), _pieces(values), strict=True):
        error = (piece.float() - decoded).double().square()
        total += float(error.nan_to_num(0.0, 0.0, 0.0).sum())
    return total
