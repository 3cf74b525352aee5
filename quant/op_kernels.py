"""What each operator does when it is called: its arguments are checked, then the kernel runs that its device has.

A CPU tensor goes to the compiled library, a CUDA tensor to the compiled CUDA library; a missing library is a
NativeError, never a silent slow path. Other devices run quant/reference.py, and so do the operators in REFERENCE_ONLY;
`reference_calls()` counts every such run.

Under an operator's own name is the call itself, under fake_... what torch's compiler asks instead: the checks, and
shapes and dtypes of the results. ops.py registers both; its docstrings say what is computed.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, Final, cast

import torch

from quant import arguments, formats, native, reference
from quant.errors import ShapeError

REFERENCE_ONLY: Final[dict[str, frozenset[str]]] = {
    "cpu": frozenset(),
    "cuda": frozenset({"linear_4bit_int8"}),
}
"""The device types with compiled kernels, and the operators that have none there and run the reference."""

_reference_calls: collections.Counter[str] = collections.Counter()


def reference_calls() -> dict[str, int]:
    """How often each operator has run its plain-torch reference in this process."""
    return dict(_reference_calls)


def _run(name: str, device: torch.device, *args: Any) -> Any:
    """One call of one operator on the kernel that its device has."""
    if device.type in REFERENCE_ONLY and name not in REFERENCE_ONLY[device.type]:
        return getattr(native.kernels(device.type), name)(*args)
    _reference_calls[name] += 1
    return getattr(reference, name)(*args)


def quantize_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    arguments.check_values("x", x)
    arguments.check_format(quant_type, blocksize)
    return cast(tuple[torch.Tensor, torch.Tensor], _run("quantize_4bit", x.device, x, quant_type, blocksize))


def fake_quantize_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    arguments.check_values("x", x)
    arguments.check_format(quant_type, blocksize)
    count = x.numel()
    return (
        x.new_empty(formats.packed_bytes(count), dtype=torch.uint8),
        x.new_empty(formats.block_count(count, blocksize), dtype=torch.float32),
    )


def _check_encode_4bit(x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> None:
    arguments.check_values("x", x)
    arguments.check_format(quant_type, blocksize)
    blocks = formats.block_count(x.numel(), blocksize)
    arguments.check_vector("scales", scales, torch.float32, blocks, f"blocks of {blocksize} values")
    arguments.check_same_device("scales", scales, "x", x)


def encode_4bit(x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    _check_encode_4bit(x, scales, quant_type, blocksize)
    return cast(torch.Tensor, _run("encode_4bit", x.device, x, scales, quant_type, blocksize))


def fake_encode_4bit(x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    _check_encode_4bit(x, scales, quant_type, blocksize)
    return x.new_empty(formats.packed_bytes(x.numel()), dtype=torch.uint8)


def search_scales_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    arguments.check_values("x", x)
    arguments.check_format(quant_type, blocksize)
    return cast(torch.Tensor, _run("search_scales_4bit", x.device, x, quant_type, blocksize))


def fake_search_scales_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    arguments.check_values("x", x)
    arguments.check_format(quant_type, blocksize)
    return x.new_empty(formats.block_count(x.numel(), blocksize), dtype=torch.float32)


def _check_dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    arguments.check_format(quant_type, blocksize)
    arguments.check_value_dtype(dtype)
    arguments.check_statistics(
        packed, absmax, blocksize, arguments.element_count(shape), None, None, formats.NESTED_BLOCKSIZE
    )


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_dequantize_4bit(packed, absmax, quant_type, blocksize, shape, dtype)
    result = _run("dequantize_4bit", packed.device, packed, absmax, quant_type, blocksize, shape, dtype)
    return cast(torch.Tensor, result)


def fake_dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    _check_dequantize_4bit(packed, absmax, quant_type, blocksize, shape, dtype)
    return packed.new_empty(shape, dtype=dtype)


def _check_quantize_absmax(absmax: torch.Tensor, nested_blocksize: int) -> None:
    arguments.check_nested_blocksize(nested_blocksize)
    arguments.check_vector("absmax", absmax, torch.float32, absmax.numel(), "one per block")


def quantize_absmax(absmax: torch.Tensor, nested_blocksize: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_quantize_absmax(absmax, nested_blocksize)
    result = _run("quantize_absmax", absmax.device, absmax, nested_blocksize)
    return cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor], result)


def fake_quantize_absmax(
    absmax: torch.Tensor, nested_blocksize: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_quantize_absmax(absmax, nested_blocksize)
    return (
        torch.empty_like(absmax, dtype=torch.uint8),
        absmax.new_empty(formats.block_count(absmax.shape[0], nested_blocksize)),
        absmax.new_empty(()),
    )


def dequantize_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor, nested_blocksize: int
) -> torch.Tensor:
    arguments.check_nested(codes, nested_absmax, offset, nested_blocksize)
    result = _run("dequantize_absmax", codes.device, codes, nested_absmax, offset, nested_blocksize)
    return cast(torch.Tensor, result)


def fake_dequantize_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor, nested_blocksize: int
) -> torch.Tensor:
    arguments.check_nested(codes, nested_absmax, offset, nested_blocksize)
    return torch.empty_like(codes, dtype=torch.float32)


def _check_linear_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
    bias: torch.Tensor | None,
) -> None:
    arguments.check_format(quant_type, blocksize)
    arguments.check_linear(x, shape, bias, packed)
    count = arguments.element_count(shape)
    arguments.check_statistics(packed, absmax, blocksize, count, nested_absmax, offset, nested_blocksize)


def linear_4bit(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_linear_4bit(x, *rest)
    return cast(torch.Tensor, _run("linear_4bit", x.device, x, *rest))


def fake_linear_4bit(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_linear_4bit(x, *rest)
    shape: Sequence[int] = rest[4]
    return x.new_empty([*x.shape[:-1], shape[0]])


def linear_4bit_int8(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_linear_4bit(x, *rest)
    return cast(torch.Tensor, _run("linear_4bit_int8", x.device, x, *rest))


fake_linear_4bit_int8 = fake_linear_4bit


def _check_linear_4bit_experts(
    x: torch.Tensor, ends: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, *rest: Any
) -> None:
    arguments.check_format(quant_type, rest[0])
    arguments.check_experts(x, ends, packed, absmax, *rest)
    if not 1 <= packed.shape[1] <= native.MAX_GROUP:
        raise ShapeError(
            f"packed has shape {list(packed.shape)}; accepted are 1 to {native.MAX_GROUP} matrices of an expert."
        )


def linear_4bit_experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_linear_4bit_experts(x, *rest)
    return cast(torch.Tensor, _run("linear_4bit_experts", x.device, x, *rest))


def fake_linear_4bit_experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_linear_4bit_experts(x, *rest)
    packed: torch.Tensor = rest[1]
    shape: Sequence[int] = rest[5]
    return x.new_empty(x.shape[0], packed.shape[1] * shape[0])


def _check_quantize_8bit(w: torch.Tensor) -> None:
    arguments.check_values("w", w)
    if w.dim() != 2:
        raise ShapeError(f"w has shape {list(w.shape)}; it must have two dimensions, [N, K].")


def quantize_8bit(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_quantize_8bit(w)
    return cast(tuple[torch.Tensor, torch.Tensor], _run("quantize_8bit", w.device, w))


def fake_quantize_8bit(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_quantize_8bit(w)
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[0], dtype=torch.float32)


def dequantize_8bit(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    arguments.check_int8(CB, SCB)
    arguments.check_value_dtype(dtype)
    return cast(torch.Tensor, _run("dequantize_8bit", CB.device, CB, SCB, dtype))


def fake_dequantize_8bit(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    arguments.check_int8(CB, SCB)
    arguments.check_value_dtype(dtype)
    return CB.new_empty(CB.shape, dtype=dtype)


def _check_linear_8bit(
    x: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, threshold: float, outliers: str, bias: torch.Tensor | None
) -> None:
    arguments.check_int8(CB, SCB)
    arguments.check_linear(x, CB.shape, bias, CB)
    arguments.check_outliers(threshold, outliers)


def linear_8bit(
    x: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, threshold: float, outliers: str, bias: torch.Tensor | None
) -> torch.Tensor:
    _check_linear_8bit(x, CB, SCB, threshold, outliers, bias)
    return cast(torch.Tensor, _run("linear_8bit", x.device, x, CB, SCB, threshold, outliers, bias))


def fake_linear_8bit(
    x: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, threshold: float, outliers: str, bias: torch.Tensor | None
) -> torch.Tensor:
    _check_linear_8bit(x, CB, SCB, threshold, outliers, bias)
    return x.new_empty([*x.shape[:-1], CB.shape[0]])


def _check_linear_8bit_experts(
    x: torch.Tensor,
    ends: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    outliers: str,
    bias: torch.Tensor | None,
) -> None:
    arguments.check_experts8(x, ends, CB, SCB, bias)
    arguments.check_outliers(threshold, outliers)


def linear_8bit_experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_linear_8bit_experts(x, *rest)
    return cast(torch.Tensor, _run("linear_8bit_experts", x.device, x, *rest))


def fake_linear_8bit_experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_linear_8bit_experts(x, *rest)
    CB: torch.Tensor = rest[1]
    return x.new_empty(x.shape[0], CB.shape[1])


def paged_attention(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    arguments.check_paged_attention(query, *rest)
    return cast(torch.Tensor, _run("paged_attention", query.device, query, *rest))


def fake_paged_attention(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    arguments.check_paged_attention(query, *rest)
    values: torch.Tensor = rest[1]
    return query.new_empty(*query.shape[:2], values.shape[3])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    arguments.check_rms_norm(x, weight, eps)
    return cast(torch.Tensor, _run("rms_norm", x.device, x, weight, eps))


def fake_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    arguments.check_rms_norm(x, weight, eps)
    return x.new_empty(x.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    arguments.check_swiglu(gate, up)
    return cast(torch.Tensor, _run("swiglu", gate.device, gate, up))


def fake_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    arguments.check_swiglu(gate, up)
    return gate.new_empty(gate.shape)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments.check_rotary(query, key, cos, sin)
    return cast(tuple[torch.Tensor, torch.Tensor], _run("rotary", query.device, query, key, cos, sin))


def fake_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments.check_rotary(query, key, cos, sin)
    return query.new_empty(query.shape), key.new_empty(key.shape)


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    arguments.check_cache_write(key, value, keys, values, slots, scales)
    _run("cache_write", key.device, key, value, keys, values, slots, scales)


def fake_cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    arguments.check_cache_write(key, value, keys, values, slots, scales)
