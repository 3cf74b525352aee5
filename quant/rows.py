"""Rows of a packed matrix by number: what an embedding looks up, without ever building the table.

Two operators on top of those in ops.py, so that a compiled model sees one node per lookup. A 4-bit row is taken as the
blocks that it lies in: they begin at whole bytes and have one absmax each; a row may begin in the middle of either. No
gradients: ids have none, and packed weights get none. The readable truth is in reference.py, under the same names.
"""

from __future__ import annotations

from typing import Any

import torch

from quant import arguments, native, ops
from quant.direct import is_direct
from quant.errors import ShapeError


def look_up_4bit(
    ids: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    rows: int,
    columns: int,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """ids int [...] -> values [..., columns] in `dtype`, bit for bit those of the dequantized table [rows, columns].

    packed: uint8 [ceil(rows columns / 2)]; absmax: float32 [B], or uint8 [B] with nested_absmax and offset. Raises
    ShapeError; IndexError for an id beyond the table (on a GPU that is a device assertion). Called by itself where the
    call is direct (quant/direct.py), as the operator embedding_4bit elsewhere.
    """
    arguments.check_format(quant_type, blocksize)
    arguments.check_value_dtype(dtype)
    arguments.check_statistics(packed, absmax, blocksize, rows * columns, nested_absmax, offset, nested_blocksize)
    flat = _checked(ids, rows, packed)
    kernels: Any = native.kernels("cpu") if is_direct(flat) and packed.is_cpu else ops
    in_row = columns // blocksize
    are_blocks_whole = columns > 0 and columns % blocksize == 0
    if are_blocks_whole and (nested_absmax is None or nested_blocksize % in_row == 0):  # a group has whole rows
        own = absmax.view(rows, in_row).index_select(0, flat).view(-1)
        if nested_absmax is not None:
            groups = nested_absmax.index_select(0, flat // (nested_blocksize // in_row))
            own = kernels.dequantize_absmax(own, groups, offset, in_row)
        codes = packed.view(rows, columns // 2).index_select(0, flat).view(-1)
        whole: torch.Tensor = kernels.dequantize_4bit(codes, own, quant_type, blocksize, [*ids.shape, columns], dtype)
        return whole
    begin = flat * columns
    first = begin // blocksize
    # As many blocks for every row as the unluckiest one crosses; what a row does not need is its last block again.
    crossed = 1 + (blocksize - 1 + columns - 1) // blocksize if columns % blocksize else columns // blocksize
    last = (begin + columns - 1) // blocksize
    blocks = torch.minimum(first[:, None] + torch.arange(crossed, device=flat.device), last[:, None])
    own = absmax[blocks]
    if nested_absmax is not None and offset is not None:
        # Each code beside its own group's absmax: the kernel has the table where the codes are.
        groups = nested_absmax[blocks // nested_blocksize]
        own = kernels.dequantize_absmax(own.view(-1), groups.view(-1), offset, 1)
    if columns % blocksize == 0:
        codes = packed.view(rows, columns // 2)[flat]
    else:
        half = blocksize // 2
        places = blocks[:, :, None] * half + torch.arange(half, device=flat.device)
        codes = packed[places.clamp_(max=packed.numel() - 1)]  # the table's last block may be short
    shape = [flat.numel(), crossed * blocksize]
    values: torch.Tensor = kernels.dequantize_4bit(codes.view(-1), own.view(-1), quant_type, blocksize, shape, dtype)
    if shape[1] != columns:
        place = (begin - first * blocksize)[:, None] + torch.arange(columns, device=flat.device)
        values = values.gather(1, place)
    return values.view(*ids.shape, columns)


embedding_4bit = torch.library.custom_op("halfbyte::embedding_4bit", look_up_4bit, mutates_args=())


@torch.library.custom_op("halfbyte::embedding_8bit", mutates_args=())
def embedding_8bit(ids: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """ids int [...] -> the rows CB[ids] * SCB[ids] / 127 as [..., K] in `dtype`. Raises as embedding_4bit does."""
    arguments.check_int8(CB, SCB)
    arguments.check_value_dtype(dtype)
    flat = _checked(ids, CB.shape[0], CB)
    return ops.dequantize_8bit(CB[flat], SCB[flat], dtype).view(*ids.shape, CB.shape[1])


def _checked(ids: torch.Tensor, rows: int, weight: torch.Tensor) -> torch.Tensor:
    """The ids as flat int64, on the device of the table and in its range."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"ids have dtype {ids.dtype}; accepted are int64 and int32.")
    arguments.check_same_device("ids", ids, "the table", weight)
    flat = ids.reshape(-1).long()
    if flat.device.type != "cpu":  # where asking would wait for the device, and an index below zero counts from the end
        torch._assert_async(((flat >= 0) & (flat < rows)).all(), f"an id is not in the table of {rows} rows")
    elif flat.numel():
        low, high = map(int, torch.aminmax(flat))
        if low < 0 or high >= rows:
            raise IndexError(f"id {low if low < 0 else high} is not in the table; accepted are 0 to {rows - 1}")
    return flat


@embedding_4bit.register_fake
def _fake_4bit(ids: torch.Tensor, packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    return packed.new_empty([*ids.shape, rest[4]], dtype=rest[8])


@embedding_8bit.register_fake
def _fake_8bit(ids: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return CB.new_empty([*ids.shape, CB.shape[1]], dtype=dtype)
