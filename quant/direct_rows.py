"""The small operators between two matmuls called straight, for inference on a CPU: quant/direct.py's way.

They hold no pointers: each call copies an empty struct and fills it, in a few microseconds. Not here: what is computed
(csrc), whether a call may come this way (`quant.direct.is_direct`).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from quant import arguments, native
from quant.errors import ShapeError


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """ops.rms_norm with the same bits. Raises ShapeError."""
    code = native.DTYPE_CODES.get(x.dtype)
    is_good = x.dim() > 0 and weight.dtype is x.dtype and weight.is_cpu and 0 <= eps < math.inf
    if code is None or not is_good or weight.shape != x.shape[-1:]:
        arguments.check_rms_norm(x, weight, eps)
    x, weight = native.ready(x), native.ready(weight)
    out = x.new_empty(x.shape)
    entry, template = _entry("hb_rms_norm")
    args = type(template).from_buffer_copy(template)
    K = weight.shape[0]
    args.x, args.dtype, args.K, args.weight, args.eps = x.data_ptr(), code, K, weight.data_ptr(), eps
    args.M, args.out = x.numel() // max(K, 1), out.data_ptr()
    args.call.threads = native.thread_count()
    entry(args)
    return out


def argmax(x: torch.Tensor) -> torch.Tensor:
    """ops.argmax with the same result. Raises ShapeError."""
    code = native.DTYPE_CODES.get(x.dtype)
    if code is None or x.dim() == 0:
        arguments.check_rows(x)
    x = native.ready(x)
    out = x.new_empty(x.shape[:-1], dtype=torch.int64)
    entry, template = _entry("hb_argmax")
    args = type(template).from_buffer_copy(template)
    args.x, args.dtype, args.M, args.K, args.out = x.data_ptr(), code, out.numel(), x.shape[-1], out.data_ptr()
    args.call.threads = native.thread_count()
    entry(args)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """ops.swiglu with the same bits. Raises ShapeError."""
    code = native.DTYPE_CODES.get(gate.dtype)
    if code is None or up.dtype is not gate.dtype or up.shape != gate.shape or not up.is_cpu:
        arguments.check_swiglu(gate, up)
    gate, up = native.ready(gate), native.ready(up)
    out = gate.new_empty(gate.shape)
    entry, template = _entry("hb_swiglu")
    args = type(template).from_buffer_copy(template)
    args.gate, args.up, args.dtype, args.n = gate.data_ptr(), up.data_ptr(), code, gate.numel()
    args.out = out.data_ptr()
    args.call.threads = native.thread_count()
    entry(args)
    return out


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """ops.rotary with the same bits, in place, for contiguous query [T, H, D] and key [T, G, D]. Raises ShapeError."""
    code = native.DTYPE_CODES.get(query.dtype)
    T, H, D = query.shape
    shapes_fit = key.dim() == 3 and key.shape[0] == T and key.shape[2] == D and D % 2 == 0
    is_good = cos.shape == (T, D) == sin.shape and cos.dtype is sin.dtype is key.dtype is query.dtype
    if code is None or not shapes_fit or not is_good or not (key.is_cpu and cos.is_cpu and sin.is_cpu):
        arguments.check_rotary(query, key, cos, sin)
    if not (query.is_contiguous() and key.is_contiguous()):
        raise ShapeError("query and key must be contiguous to be turned in place")
    cos, sin = native.ready(cos), native.ready(sin)
    entry, template = _entry("hb_rotary")
    args = type(template).from_buffer_copy(template)
    args.query, args.key, args.dtype = query.data_ptr(), key.data_ptr(), code
    args.T, args.H, args.G, args.D = T, H, key.shape[1], D
    args.cos, args.sin = cos.data_ptr(), sin.data_ptr()
    args.call.threads = native.thread_count()
    entry(args)


def cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """ops.cache_write. Raises ShapeError."""
    arguments.check_cache_write(key, value, keys, values, slots, scales)
    entry, template = _entry("hb_cache_write")
    args = type(template).from_buffer_copy(template)
    for name, field in native.cache_write_fields(key, value, keys, values, slots, scales).items():
        setattr(args, name, field.data_ptr() if isinstance(field, torch.Tensor) else field)
    args.call.threads = native.thread_count()
    entry(args)


@functools.cache
def _entry(name: str) -> tuple[Callable[[Any], None], Any]:
    """A function that runs an entry on its filled struct, and the struct to copy."""
    kernels = native.kernels("cpu")
    function, check_status = getattr(kernels.library, name), kernels.check_status
    template = native.filled(name)

    def run(args: Any) -> None:
        status = function(ctypes.byref(args))
        if status:
            check_status(name, status)

    return run, template
