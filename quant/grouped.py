"""Linear layers of a stack of experts that no kernel takes as a whole: in 4 bits with activations in int8.

An operator on top of those in ops.py, so that a compiled model sees one node per stack: rows sorted by expert, each
multiplied by the packed matrix of its own. Only experts that have rows are touched, one after another; no weight is
ever built in forward, and one at a time in backward. Not here: other stacks (ops.linear_4bit_experts,
ops.linear_8bit_experts), which rows go where and what happens between two products (experts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quant import ops, reference


@torch.library.custom_op("halfbyte::grouped_linear_4bit_int8", mutates_args=())
def grouped_linear_4bit_int8(
    x: torch.Tensor,
    ends: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    rows: int,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
) -> torch.Tensor:
    """x [S, K], sorted by expert -> [S, rows]: the rows of expert e, up to ends[e], times its matrix [rows, K].

    ends: int64 [E]; rows of x beyond the last end give zeros. packed: uint8 [E, ceil(rows K / 2)]; absmax: float32
    [E, B], or uint8 [E, B] with nested_absmax float32 [E, ceil(B / nested_blocksize)] and offset float32 [E].
    See ops.linear_4bit_int8.
    """

    def product(expert: int, part: torch.Tensor) -> torch.Tensor:
        nested = None if nested_absmax is None else nested_absmax[expert]
        own_offset = None if offset is None else offset[expert]
        shape = [rows, x.shape[1]]
        return ops.linear_4bit_int8(
            part, packed[expert], absmax[expert], quant_type, blocksize, shape, nested, own_offset, nested_blocksize
        )

    return _by_expert(x, ends, rows, product)


def _by_expert(
    x: torch.Tensor, ends: torch.Tensor, columns: int, product: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], columns)
    for expert, rows in reference.expert_rows(ends):
        out[rows] = product(expert, x[rows])
    return out


@grouped_linear_4bit_int8.register_fake
def _fake_4bit(x: torch.Tensor, ends: torch.Tensor, packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], rest[3])


def _setup_4bit(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ends, packed, absmax, quant_type, blocksize, rows, nested_absmax, offset, nested_blocksize = inputs
    ctx.save_for_backward(ends, packed, absmax, nested_absmax, offset)
    ctx.format = (quant_type, blocksize, [rows, x.shape[1]], nested_blocksize)


def _backward_4bit(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    ends, packed, absmax, nested_absmax, offset = ctx.saved_tensors
    quant_type, blocksize, shape, nested_blocksize = ctx.format

    def product(expert: int, part: torch.Tensor) -> torch.Tensor:
        own = absmax[expert]
        if nested_absmax is not None:
            own = ops.dequantize_absmax(own, nested_absmax[expert], offset[expert], nested_blocksize)
        return part @ ops.dequantize_4bit(packed[expert], own, quant_type, blocksize, shape, part.dtype)

    to_x = _by_expert(gradient, ends, shape[1], product) if ctx.needs_input_grad[0] else None
    return to_x, *(None,) * 9


grouped_linear_4bit_int8.register_autograd(_backward_4bit, setup_context=_setup_4bit)
