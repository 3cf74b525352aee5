"""Gradients of the operators: to activations and bias, none to packed weights.

For each of DIFFERENTIABLE, setup_... keeps what backward_... needs; ops.py registers both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from quant import arguments, formats, reference

DIFFERENTIABLE: Final = ("linear_4bit", "linear_4bit_int8", "linear_4bit_experts", "linear_8bit", "linear_8bit_experts")

_OPERATORS: Final = torch.ops.halfbyte


def setup_linear_4bit(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, packed, absmax, quant_type, blocksize, shape, nested_absmax, offset, nested_blocksize, bias = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.layout = (quant_type, blocksize, shape, nested_blocksize)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward_linear_4bit(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        packed, absmax, nested_absmax, offset = ctx.saved_tensors
        quant_type, blocksize, shape, nested_blocksize = ctx.layout
        if nested_absmax is not None:
            absmax = _OPERATORS.dequantize_absmax(absmax, nested_absmax, offset, nested_blocksize)
        grad_x = grad @ _OPERATORS.dequantize_4bit(packed, absmax, quant_type, blocksize, shape, grad.dtype)
    return grad_x, None, None, None, None, None, None, None, None, _bias_gradient(ctx, 9, grad)


# Rounding counts as the identity: the gradient of the product of values.
setup_linear_4bit_int8 = setup_linear_4bit
backward_linear_4bit_int8 = backward_linear_4bit


def setup_linear_4bit_experts(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ends, packed, absmax, quant_type, blocksize, shape, nested_absmax, offset, nested_blocksize, bias = inputs
    ctx.save_for_backward(ends, packed, absmax, nested_absmax, offset)
    ctx.layout = (quant_type, blocksize, shape, nested_blocksize)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward_linear_4bit_experts(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    ends, packed, absmax, nested_absmax, offset = ctx.saved_tensors
    grad_x, grad_bias = None, None
    if ctx.needs_input_grad[0]:
        grad_x = _experts_to_x(grad, ends, packed, absmax, *ctx.layout, nested_absmax, offset)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[10]:
        grad_bias = _experts_to_bias(grad, ends, ctx.bias_dtype)
    return grad_x, None, None, None, None, None, None, None, None, None, grad_bias


def _experts_to_bias(grad: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[E, N]: the sum over each expert's rows in float32."""
    experts = ends.shape[0]
    own = torch.bucketize(torch.arange(grad.shape[0], device=grad.device), ends, right=True)
    sums = grad.new_zeros(experts + 1, grad.shape[1], dtype=torch.float32).index_add(0, own, grad.float())
    return sums[:experts].to(dtype)


@torch.library.custom_op("halfbyte::linear_4bit_experts_to_x", mutates_args=())
def _experts_to_x(
    grad: torch.Tensor,
    ends: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_blocksize: int,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    """Each row's gradient times its expert's matrices; an operator, because what is done depends on `ends`. One expert
    after another, so that no more than its matrices are ever built."""
    bytes_used = formats.packed_bytes(arguments.element_count(shape))
    grad_x = grad.new_zeros(grad.shape[0], shape[1])
    for expert, rows in reference.expert_rows(ends):
        weights = []
        for matrix in range(packed.shape[1]):
            own = absmax[expert, matrix]
            if nested_absmax is not None and offset is not None:
                own = _OPERATORS.dequantize_absmax(
                    own, nested_absmax[expert, matrix], offset[expert, matrix], nested_blocksize
                )
            codes = packed[expert, matrix, :bytes_used]
            weights.append(_OPERATORS.dequantize_4bit(codes, own, quant_type, blocksize, shape, grad.dtype))
        grad_x[rows] = grad[rows] @ torch.cat(weights)
    return grad_x


@_experts_to_x.register_fake
def _fake_experts_to_x(grad: torch.Tensor, *rest: Any) -> torch.Tensor:
    shape: Sequence[int] = rest[5]
    return grad.new_empty(grad.shape[0], shape[1])


def setup_linear_8bit(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, CB, SCB, _, _, bias = inputs
    ctx.save_for_backward(CB, SCB)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward_linear_8bit(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    CB, SCB = ctx.saved_tensors
    grad_x = grad @ _OPERATORS.dequantize_8bit(CB, SCB, grad.dtype) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, None, None, _bias_gradient(ctx, 5, grad)


def setup_linear_8bit_experts(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ends, CB, SCB, _, _, bias = inputs
    ctx.save_for_backward(ends, CB, SCB)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward_linear_8bit_experts(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    ends, CB, SCB = ctx.saved_tensors
    grad_x = _experts8_to_x(grad, ends, CB, SCB) if ctx.needs_input_grad[0] else None
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        grad_bias = _experts_to_bias(grad, ends, ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias


@torch.library.custom_op("halfbyte::linear_8bit_experts_to_x", mutates_args=())
def _experts8_to_x(grad: torch.Tensor, ends: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    """As _experts_to_x."""
    grad_x = grad.new_zeros(grad.shape[0], CB.shape[2])
    for expert, rows in reference.expert_rows(ends):
        grad_x[rows] = grad[rows] @ _OPERATORS.dequantize_8bit(CB[expert], SCB[expert], grad.dtype)
    return grad_x


@_experts8_to_x.register_fake
def _fake_experts8_to_x(grad: torch.Tensor, ends: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], CB.shape[2])


def _bias_gradient(ctx: Any, index: int, grad: torch.Tensor) -> torch.Tensor | None:
    """The sum over rows in float32, in the bias's dtype."""
    if ctx.bias_dtype is None or not ctx.needs_input_grad[index]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
