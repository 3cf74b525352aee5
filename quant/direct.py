"""A packed layer's matmul called straight, for inference on a CPU: what torch's dispatcher costs is left out.

torch.library and ctypes with checked keyword arguments take some 30 microseconds a call, as long as a small product
itself. Here a layer's pointers are checked and filled into the argument struct once; a call copies the struct, adds x
and the output, and goes. `Direct.fits` says whether the tensors are still the ones whose pointers it holds. Only for
calls that nothing traces and nobody differentiates (`is_direct`); everything else goes through ops.py, with the same
result. Not here: what is computed (csrc), the operators (ops.py).
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from typing import Any, Final

import torch

from quant import arguments, native
from quant.errors import ShapeError

_ROW_COUNTS_KEPT: Final = 64


def is_direct(x: torch.Tensor) -> bool:
    """Whether this call may leave out torch's dispatcher: a plain CPU tensor, no gradients, no tracing."""
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


class Workspace(threading.local):
    """Scratch memory of one thread, as large as its largest call so far."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0, dtype=torch.uint8)

    def at_least(self, size: int) -> int:
        """The address of at least `size` bytes."""
        return self.tensor(size).data_ptr()

    def tensor(self, size: int) -> torch.Tensor:
        """At least `size` bytes. Who keeps it may go on using it when another call has got a larger one."""
        if self._tensor.numel() < size:
            with torch.inference_mode(False):
                self._tensor = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._tensor

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes


WORKSPACE: Final = Workspace()
"""What direct calls of the calling thread work in."""


_Sizes = dict[tuple[int, torch.dtype, int], int]
"""Workspace bytes by number of rows, their dtype, and threads."""


def _remember(sizes: _Sizes, key: tuple[int, torch.dtype, int], needed: int) -> int:
    if len(sizes) >= _ROW_COUNTS_KEPT:
        sizes.clear()
    sizes[key] = needed
    return needed


def _row_count(x: torch.Tensor) -> int:
    K = x.shape[-1]
    return x.numel() // K if K else math.prod(x.shape[:-1])


class Direct:
    """One weight's matmul, ready to be called with activations [..., K]."""

    def __init__(
        self,
        entry: str,
        shape: tuple[int, int],
        weight: torch.Tensor,
        statistics: torch.Tensor,
        bias: torch.Tensor | None,
        **fields: Any,
    ) -> None:
        """`fields` fill the argument struct of `entry` as native.Kernels.call does; checked by whoever calls this.

        `weight` and `statistics` are the tensors that the layer holds, whose replacement makes this call stale.
        """
        self._kernels = native.kernels("cpu")
        self._function = getattr(self._kernels.library, entry)
        self.entry = entry
        self.options = (fields.get("threshold"), fields.get("outlier_rule"))
        """What calls must have in common, beside x, to be made together."""
        self._struct = native.STRUCTS[entry]
        self.rows, self.columns = shape
        bias_dtype = 0 if bias is None else native.DTYPE_CODES[bias.dtype]
        self._template = native.filled(entry, N=shape[0], K=shape[1], bias=bias, bias_dtype=bias_dtype, **fields)
        self._tensors = tuple(value for value in fields.values() if isinstance(value, torch.Tensor))  # kept alive
        self._weight, self._statistics, self._bias = weight, statistics, bias
        self._addresses = (weight.data_ptr(), 0 if bias is None else bias.data_ptr())
        self._workspace_bytes: _Sizes = {}

    def fits(self, weight: torch.Tensor, statistics: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether these are the tensors that the call was made for, where they were."""
        return (
            weight is self._weight
            and statistics is self._statistics
            and bias is self._bias
            and self._addresses == (weight.data_ptr(), 0 if bias is None else bias.data_ptr())
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float32, float16 or bfloat16 -> [..., N]. Raises ShapeError."""
        K = self.columns
        if x.dim() == 0 or x.shape[-1] != K or x.dtype not in native.DTYPE_CODES:
            arguments.check_linear(x, (self.rows, K), None, x)
        x = native.ready(x)
        out = x.new_empty((*x.shape[:-1], self.rows))
        args = self.arguments_for(x, out)
        call = args.call
        key = (args.M, x.dtype, call.threads)
        size = self._workspace_bytes.get(key)
        if size is None:
            size = _remember(self._workspace_bytes, key, self._kernels.workspace_bytes(self.entry, args))
        call.workspace, call.workspace_bytes = WORKSPACE.at_least(size), size
        status = self._function(ctypes.byref(args))
        if status:
            self._kernels.check_status(self.entry, status)
        return out

    def arguments_for(self, x: torch.Tensor, out: torch.Tensor) -> Any:
        """The struct for contiguous x [..., K] of a known dtype and out [..., N], all but the workspace."""
        args: Any = self._struct.from_buffer_copy(self._template)
        args.x, args.x_dtype, args.M = x.data_ptr(), native.DTYPE_CODES[x.dtype], _row_count(x)
        args.out = out.data_ptr()
        call = args.call
        call.threads = native.thread_count()
        call.batch_invariant = native.batch_invariant()
        return args


class DirectGroup:
    """Products of one x with several weights in one call: what each Direct gives, bit for bit."""

    def __init__(self, parts: Sequence[Direct]) -> None:
        """`parts` as may_be_grouped() accepts them."""
        first = parts[0]
        self._kernels = first._kernels
        self._entry = f"{first.entry}_group"
        self._function = getattr(self._kernels.library, self._entry)
        self._parts = tuple(parts)  # their tensors stay alive
        self._rows, self._columns = [part.rows for part in parts], first.columns
        self._struct = first._struct * len(parts)
        self._template = b"".join(bytes(part._template) for part in parts)
        self._workspace_bytes: _Sizes = {}

    @staticmethod
    def may_be_grouped(parts: Sequence[Direct]) -> bool:
        """Whether they are of one entry, size of x and options, and not too many."""
        kinds = {(part.entry, part.columns, *part.options) for part in parts}
        return len(kinds) == 1 and len(parts) <= native.MAX_GROUP and parts[0].entry in native.GROUPS

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [..., K] -> one [..., N] for each weight. Raises ShapeError."""
        if x.dim() == 0 or x.shape[-1] != self._columns or x.dtype not in native.DTYPE_CODES:
            arguments.check_linear(x, (self._rows[0], self._columns), None, x)
        x = native.ready(x)
        outs = [x.new_empty((*x.shape[:-1], rows)) for rows in self._rows]
        M, address, code = _row_count(x), x.data_ptr(), native.DTYPE_CODES[x.dtype]
        items = self._struct.from_buffer_copy(self._template)
        threads = native.thread_count()
        for item, out in zip(items, outs, strict=True):
            item.x, item.x_dtype, item.M, item.out = address, code, M, out.data_ptr()
            item.call.threads = threads
        key = (M, x.dtype, threads)
        size = self._workspace_bytes.get(key)
        if size is None:
            needed = self._kernels.workspace_bytes(self._entry, items, len(outs))
            size = _remember(self._workspace_bytes, key, needed)
        call = items[0].call
        call.batch_invariant = native.batch_invariant()
        call.workspace, call.workspace_bytes = WORKSPACE.at_least(size), size
        status = self._function(items, len(outs))
        if status:
            self._kernels.check_status(self._entry, status)
        return outs


def direct_4bit(
    activations: str,
    weight: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, int],
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
    bias: torch.Tensor | None,
) -> Direct:
    """ops.linear_4bit, or linear_4bit_int8, on this weight, `weight` as the layer holds it. Raises ShapeError."""
    arguments.check_format(quant_type, blocksize)
    count = arguments.element_count(shape)
    arguments.check_statistics(packed, absmax, blocksize, count, nested_absmax, offset, nested_blocksize)
    _check_bias(bias, shape, packed)
    return Direct(
        "hb_linear4" if activations == "float" else "hb_linear4_int8",
        shape,
        weight,
        absmax,
        bias,
        packed=native.ready(packed),
        format=native.FORMAT_CODES[quant_type],
        blocksize=blocksize,
        absmax=native.ready(absmax),
        nested_absmax=native.ready_or_none(nested_absmax),
        offset=native.ready_or_none(offset),
        nested_blocksize=nested_blocksize,
    )


def direct_8bit(
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    outliers: str,
    bias: torch.Tensor | None,
) -> Direct:
    """ops.linear_8bit on this weight. Raises ShapeError as it does."""
    arguments.check_int8(CB, SCB)
    arguments.check_outliers(threshold, outliers)
    shape = (CB.shape[0], CB.shape[1])
    _check_bias(bias, shape, CB)
    return Direct(
        "hb_linear8",
        shape,
        CB,
        SCB,
        bias,
        codes=native.ready(CB),
        absmax=native.ready(SCB),
        threshold=threshold,
        outlier_rule=native.OUTLIER_CODES[outliers],
    )


def _check_bias(bias: torch.Tensor | None, shape: tuple[int, int], weight: torch.Tensor) -> None:
    arguments.check_linear(torch.empty(0, shape[1]), shape, bias, weight)
    if bias is not None and not bias.is_contiguous():
        raise ShapeError(f"bias has strides {list(bias.stride())}; it must be contiguous")
