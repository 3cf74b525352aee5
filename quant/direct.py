"""A packed layer's matmul called straight, for inference on a CPU: what torch's dispatcher costs is left out.

torch.library and ctypes with checked keyword arguments take some 30 microseconds a call, as long as a small product
itself. Here a layer's pointers are checked and packed into the argument struct's bytes once; a call puts what it knows
of x and the output before and behind them, and goes. `Direct.fits` says whether the tensors are still the ones whose
pointers it holds. Only for calls that nothing traces and nobody differentiates (`is_direct`); everything else goes
through ops.py, with the same result. Not here: what is computed (csrc), the operators (ops.py).
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch

from quant import arguments, native

_PLANS_KEPT: Final = 64


def is_direct(x: torch.Tensor) -> bool:
    """Whether this call may leave out torch's dispatcher: a plain CPU tensor, no gradients, no tracing, no vmap."""
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class Workspace(threading.local):
    """Scratch memory of one thread, as large as its largest call so far."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0, dtype=torch.uint8)
        self._bytes = self._address = 0

    def at_least(self, size: int) -> int:
        """The address of at least `size` bytes."""
        if self._bytes < size:
            self.tensor(size)
        return self._address

    def tensor(self, size: int) -> torch.Tensor:
        """At least `size` bytes. Who keeps it may go on using it when another call has got a larger one."""
        if self._bytes < size:
            with torch.inference_mode(False):
                self._tensor = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._bytes, self._address = size, self._tensor.data_ptr()
        return self._tensor

    @property
    def nbytes(self) -> int:
        return self._bytes


WORKSPACE: Final = Workspace()
"""What direct calls of the calling thread work in."""


class _Plan(NamedTuple):
    """What a call takes of x beside its address, and all calls of one key have in common."""

    out_shape: tuple[int, ...]
    """Without the last size, which is that of a weight."""
    M: int
    dtype_code: int
    threads: int
    batch_invariant: int
    workspace_bytes: int


_Key = tuple[torch.Size, torch.dtype, int, int]
"""x's shape and dtype, torch's threads, and whether rows are to have the same bits in any batch."""


class _Plans(dict[_Key, _Plan]):
    """Plans by what they follow from."""

    def add(self, key: _Key, columns: int, needed: Callable[[_Plan], int]) -> _Plan:
        """The plan of a new key; `needed` gives the workspace of one that has none. Raises ShapeError."""
        shape, dtype, threads, is_invariant = key
        if not shape or shape[-1] != columns or dtype not in native.DTYPE_CODES:
            x = torch.empty(shape, dtype=dtype, device="meta")
            arguments.check_linear(x, (1, columns), None, x)
        code, threads = native.DTYPE_CODES[dtype], native.allowed(threads)
        plan = _Plan(tuple(shape[:-1]), math.prod(shape[:-1]), code, threads, is_invariant, workspace_bytes=0)
        plan = plan._replace(workspace_bytes=needed(plan))
        if len(self) >= _PLANS_KEPT:
            self.clear()
        self[key] = plan
        return plan


class Direct:
    """One weight's matmul, ready to be called with activations [..., K]."""

    def __init__(
        self,
        entry: str,
        shape: tuple[int, int],
        held: Sequence[torch.Tensor | None],
        bias: torch.Tensor | None,
        **fields: Any,
    ) -> None:
        """`fields` fill the argument struct of `entry` as native.Kernels.call does; checked by whoever calls this.

        `held` are the tensors that the layer holds, `bias` behind them: what replaces one makes this call stale.
        """
        self._kernels = native.kernels("cpu")
        self._function = self._kernels.taking_bytes(entry)
        self.entry = entry
        self.options = (fields.get("threshold"), fields.get("outlier_rule"))
        """What calls must have in common, beside x, to be made together."""
        self.struct = native.STRUCTS[entry]
        self.rows, self.columns = shape
        bias_dtype = 0 if bias is None else native.DTYPE_CODES[bias.dtype]
        template = native.filled(entry, N=shape[0], K=shape[1], bias=bias, bias_dtype=bias_dtype, **fields)
        self._struct_bytes = ctypes.sizeof(template)
        self._fixed = bytes(template)[native.MATMUL_BEGIN.size : -native.MATMUL_END.size]
        self._tensors = tuple(value for value in fields.values() if isinstance(value, torch.Tensor))  # kept alive
        self._held = tuple((one, 0 if one is None else one.data_ptr()) for one in (*held, bias))
        self._bias_dtype = None if bias is None else bias.dtype
        self._plans = _Plans()

    def fits(self, held: Sequence[torch.Tensor | None], bias: torch.Tensor | None) -> bool:
        """Whether these are the tensors that the call was made for, where they were: `data` may be assigned to them."""
        for one, (known, address) in zip((*held, bias), self._held, strict=True):
            if one is not known or (one is not None and one.data_ptr() != address):
                return False
        return bias is None or bias.dtype is self._bias_dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float32, float16 or bfloat16 -> [..., N]. Raises ShapeError."""
        key = (x.shape, x.dtype, torch.get_num_threads(), native.batch_invariant())
        plan = self._plans.get(key) or self._plans.add(key, self.columns, self._needed)
        x = native.ready(x)
        out = x.new_empty(*plan.out_shape, self.rows)  # sizes in a row: a tuple takes twice as long
        workspace = WORKSPACE.at_least(plan.workspace_bytes)
        status = self._function(self.packed(plan, x.data_ptr(), out.data_ptr(), workspace))
        if status:
            self._kernels.check_status(self.entry, status)
        return out

    def packed(self, plan: _Plan, x: int, out: int, workspace: int = 0) -> bytes:
        """The argument struct for contiguous x and out at these addresses."""
        begin = native.MATMUL_BEGIN.pack(
            self._struct_bytes, 0, workspace, plan.workspace_bytes, plan.threads, plan.batch_invariant, 0,
            x, plan.dtype_code, plan.M,
        )  # fmt: skip
        return begin + self._fixed + native.MATMUL_END.pack(out)

    def arguments_for(self, x: torch.Tensor, out: torch.Tensor) -> Any:
        """The struct for contiguous x [..., K] of a known dtype and out [..., N], all but the workspace."""
        M = math.prod(x.shape[:-1])
        code, threads = native.DTYPE_CODES[x.dtype], native.thread_count()
        plan = _Plan((), M, code, threads, native.batch_invariant(), workspace_bytes=0)
        return self.struct.from_buffer_copy(self.packed(plan, x.data_ptr(), out.data_ptr()))

    def _needed(self, plan: _Plan) -> int:
        return self._kernels.workspace_bytes(self.entry, self.struct.from_buffer_copy(self.packed(plan, 0, 0)))


class DirectGroup:
    """Products of one x with several weights in one call: what each Direct gives, bit for bit."""

    def __init__(self, parts: Sequence[Direct]) -> None:
        """`parts` as may_be_grouped() accepts them."""
        first = parts[0]
        self._kernels = first._kernels
        self._entry = f"{first.entry}_group"
        self._function = self._kernels.taking_bytes(self._entry)
        self._parts = tuple(parts)  # their tensors stay alive
        self._columns = first.columns
        self._plans = _Plans()

    @staticmethod
    def may_be_grouped(parts: Sequence[Direct]) -> bool:
        """Whether they are of one entry, size of x and options, and not too many."""
        kinds = {(part.entry, part.columns, *part.options) for part in parts}
        return len(kinds) == 1 and len(parts) <= native.MAX_GROUP and parts[0].entry in native.GROUPS

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [..., K] -> one [..., N] for each weight. Raises ShapeError."""
        key = (x.shape, x.dtype, torch.get_num_threads(), native.batch_invariant())
        plan = self._plans.get(key) or self._plans.add(key, self._columns, self._needed)
        x = native.ready(x)
        outs = [x.new_empty(*plan.out_shape, part.rows) for part in self._parts]
        workspace, address = WORKSPACE.at_least(plan.workspace_bytes), x.data_ptr()
        items = [
            part.packed(plan, address, out.data_ptr(), workspace) for part, out in zip(self._parts, outs, strict=True)
        ]
        status = self._function(b"".join(items), len(items))
        if status:
            self._kernels.check_status(self._entry, status)
        return outs

    def _needed(self, plan: _Plan) -> int:
        count = len(self._parts)
        items = (self._parts[0].struct * count).from_buffer_copy(
            b"".join(part.packed(plan, 0, 0) for part in self._parts)
        )
        return self._kernels.workspace_bytes(self._entry, items, count)


def direct_4bit(
    activations: str,
    held: Sequence[torch.Tensor | None],
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, int],
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
    bias: torch.Tensor | None,
) -> Direct | None:
    """ops.linear_4bit, or linear_4bit_int8, on this weight, whose layer holds `held` and the bias. None where a tensor
    is not as the C interface asks: a copy would not follow it. Raises ShapeError.
    """
    arguments.check_format(quant_type, blocksize)
    count = arguments.element_count(shape)
    arguments.check_statistics(packed, absmax, blocksize, count, nested_absmax, offset, nested_blocksize)
    _check_bias(bias, shape, packed)
    if not _are_ready(packed, absmax, nested_absmax, offset, bias):
        return None
    return Direct(
        "hb_linear4" if activations == "float" else "hb_linear4_int8",
        shape,
        held,
        bias,
        packed=packed,
        format=native.FORMAT_CODES[quant_type],
        blocksize=blocksize,
        absmax=absmax,
        nested_absmax=nested_absmax,
        offset=offset,
        nested_blocksize=nested_blocksize,
    )


def direct_8bit(
    CB: torch.Tensor,
    SCB: torch.Tensor,
    threshold: float,
    outliers: str,
    bias: torch.Tensor | None,
) -> Direct | None:
    """ops.linear_8bit on this weight, as direct_4bit; the layer holds CB, SCB and the bias. Raises ShapeError."""
    arguments.check_int8(CB, SCB)
    arguments.check_outliers(threshold, outliers)
    shape = (CB.shape[0], CB.shape[1])
    _check_bias(bias, shape, CB)
    if not _are_ready(CB, SCB, bias):
        return None
    return Direct(
        "hb_linear8",
        shape,
        (CB, SCB),
        bias,
        codes=CB,
        absmax=SCB,
        threshold=threshold,
        outlier_rule=native.OUTLIER_CODES[outliers],
    )


def _check_bias(bias: torch.Tensor | None, shape: tuple[int, int], weight: torch.Tensor) -> None:
    arguments.check_linear(torch.empty(0, shape[1], dtype=torch.float32, device=weight.device), shape, bias, weight)


def _are_ready(*tensors: torch.Tensor | None) -> bool:
    return all(tensor is None or native.is_ready(tensor) for tensor in tensors)
