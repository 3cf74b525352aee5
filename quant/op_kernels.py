"""What each operator does when it is called: its arguments are checked, then the kernel runs that its device has.

A CPU tensor goes to the compiled library, a CUDA tensor to the compiled CUDA library; a missing library is a
NativeError, never a silent slow path. Other devices run quant/reference.py, and so do the operators in REFERENCE_ONLY;
`reference_calls()` counts every such run.

Each operator has its check under check_... and its results, empty, under empty_...; `call_of` and `fake_of` make of
them what ops.py registers: the call, and what torch's compiler asks instead. Its docstrings say what is computed.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from quant import arguments, formats, native, reference
from quant.errors import ShapeError

REFERENCE_ONLY: Final[dict[str, frozenset[str]]] = {
    "cpu": frozenset(),
    "cuda": frozenset({"linear_4bit_int8", "argmax"}),
}
"""The device types with compiled kernels, and the operators that have none there and run the reference."""

_reference_calls: collections.Counter[str] = collections.Counter()


def reference_calls() -> dict[str, int]:
    """How often each operator has run its plain-torch reference in this process."""
    return dict(_reference_calls)


def call_of(name: str) -> Callable[..., Any]:
    """An operator's call: its check, then the kernel of the device that its first tensor is on."""
    check = globals()[f"check_{name}"]

    def call(first: torch.Tensor, *rest: Any) -> Any:
        check(first, *rest)
        device = first.device.type
        if device in REFERENCE_ONLY and name not in REFERENCE_ONLY[device]:
            return getattr(native.kernels(device), name)(first, *rest)
        _reference_calls[name] += 1
        return getattr(reference, name)(first, *rest)

    return call


def fake_of(name: str) -> Callable[..., Any]:
    """The same check, then the shapes and dtypes of the results."""
    check, empty = globals()[f"check_{name}"], globals()[f"empty_{name}"]

    def fake(*args: Any) -> Any:
        check(*args)
        return empty(*args)

    return fake


def check_quantize_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> None:
    arguments.check_values("x", x)
    arguments.check_format(quant_type, blocksize)


def empty_quantize_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = x.numel()
    return (
        x.new_empty(formats.packed_bytes(count), dtype=torch.uint8),
        x.new_empty(formats.block_count(count, blocksize), dtype=torch.float32),
    )


def check_encode_4bit(x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> None:
    arguments.check_values("x", x)
    arguments.check_format(quant_type, blocksize)
    blocks = formats.block_count(x.numel(), blocksize)
    arguments.check_vector("scales", scales, torch.float32, blocks, f"blocks of {blocksize} values")
    arguments.check_same_device("scales", scales, "x", x)


def empty_encode_4bit(x: torch.Tensor, scales: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    return x.new_empty(formats.packed_bytes(x.numel()), dtype=torch.uint8)


check_search_scales_4bit = check_quantize_4bit


def empty_search_scales_4bit(x: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    return x.new_empty(formats.block_count(x.numel(), blocksize), dtype=torch.float32)


def check_dequantize_4bit(
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


def empty_dequantize_4bit(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    shape: Sequence[int] = rest[3]
    dtype: torch.dtype = rest[4]
    return packed.new_empty(shape, dtype=dtype)


def check_quantize_absmax(absmax: torch.Tensor, nested_blocksize: int) -> None:
    arguments.check_nested_blocksize(nested_blocksize)
    arguments.check_vector("absmax", absmax, torch.float32, absmax.numel(), "one per block")


def empty_quantize_absmax(
    absmax: torch.Tensor, nested_blocksize: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(absmax, dtype=torch.uint8),
        absmax.new_empty(formats.block_count(absmax.shape[0], nested_blocksize)),
        absmax.new_empty(()),
    )


check_dequantize_absmax = arguments.check_nested


def empty_dequantize_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor, nested_blocksize: int
) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def check_linear_4bit(
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


def empty_linear_4bit(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    shape: Sequence[int] = rest[4]
    return x.new_empty([*x.shape[:-1], shape[0]])


check_linear_4bit_int8 = check_linear_4bit
empty_linear_4bit_int8 = empty_linear_4bit


def check_linear_4bit_experts(
    x: torch.Tensor, ends: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, *rest: Any
) -> None:
    arguments.check_format(quant_type, rest[0])
    arguments.check_experts(x, ends, packed, absmax, *rest)
    if not 1 <= packed.shape[1] <= native.MAX_GROUP:
        raise ShapeError(
            f"packed has shape {list(packed.shape)}; accepted are 1 to {native.MAX_GROUP} matrices of an expert."
        )


def empty_linear_4bit_experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    packed: torch.Tensor = rest[1]
    shape: Sequence[int] = rest[5]
    return x.new_empty(x.shape[0], packed.shape[1] * shape[0])


def check_quantize_8bit(w: torch.Tensor) -> None:
    arguments.check_values("w", w)
    if w.dim() != 2:
        raise ShapeError(f"w has shape {list(w.shape)}; it must have two dimensions, [N, K].")


def empty_quantize_8bit(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[0], dtype=torch.float32)


def check_dequantize_8bit(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> None:
    arguments.check_int8(CB, SCB)
    arguments.check_value_dtype(dtype)


def empty_dequantize_8bit(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return CB.new_empty(CB.shape, dtype=dtype)


def check_linear_8bit(
    x: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, threshold: float, outliers: str, bias: torch.Tensor | None
) -> None:
    arguments.check_int8(CB, SCB)
    arguments.check_linear(x, CB.shape, bias, CB)
    arguments.check_outliers(threshold, outliers)


def empty_linear_8bit(
    x: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, threshold: float, outliers: str, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], CB.shape[0]])


def check_linear_8bit_experts(
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


def empty_linear_8bit_experts(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    CB: torch.Tensor = rest[1]
    return x.new_empty(x.shape[0], CB.shape[1])


check_paged_attention = arguments.check_paged_attention


def empty_paged_attention(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    values: torch.Tensor = rest[1]
    return query.new_empty(*query.shape[:2], values.shape[3])


check_rms_norm = arguments.check_rms_norm


def empty_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


check_argmax = arguments.check_rows


def empty_argmax(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


check_swiglu = arguments.check_swiglu


def empty_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


check_rotary = arguments.check_rotary


def empty_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


check_cache_write = arguments.check_cache_write


def empty_cache_write(*args: Any) -> None:
    """It returns nothing."""
