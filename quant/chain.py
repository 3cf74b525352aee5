"""A layer's calls for up to MOST_ROWS rows, one after the other in one call of the library (hb_run).

Between two calls from Python some ten microseconds pass in which nobody reads weights, and a decoder layer has a dozen
calls. A chain lays them out once for a number of rows: which call reads what another has written, in buffers that all
chains of a thread share, since they run one after the other. What changes from run to run (where the rows come from,
the cache) is set in the structs that the methods return.

Results are those of the calls alone, bit for bit. For inference on a CPU; not here: whether that is so
(`quant.direct.is_direct`), what a layer consists of (server/model/fuse_layer.py), what is computed (csrc).
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from typing import Any, Final

import torch

from quant import arguments, native
from quant.direct import Direct, DirectGroup, Workspace
from quant.errors import ShapeError

MOST_ROWS: Final = 256
"""As many as a CPU's step has. A chain saves a tenth of 256 rows' time, and activations that would be made anew."""


class _Buffers(threading.local):
    """What the chains of one thread compute in: the n-th buffer of each is the same memory."""

    def __init__(self) -> None:
        self._spaces: list[Workspace] = []

    def tensor(self, index: int, size: int) -> torch.Tensor:
        while len(self._spaces) <= index:
            self._spaces.append(Workspace())
        return self._spaces[index].tensor(size)

    @property
    def nbytes(self) -> int:
        return sum(space.nbytes for space in self._spaces)


BUFFERS: Final = _Buffers()


class Chain:
    """Calls over `rows` rows of one dtype. Tensors that a method is given must stay where they are.

    A chain that goes on from another one leaves that one's results alone.
    """

    def __init__(self, rows: int, dtype: torch.dtype, goes_on_from: Chain | None = None) -> None:
        self.rows, self.dtype = rows, dtype
        self.threads = native.thread_count()
        self._kernels = native.kernels("cpu")
        self._items: list[tuple[int, Any, int]] = []
        self.steps: list[native.Step] = []
        self._kept: list[torch.Tensor | Direct] = []
        self._buffers: int = 0 if goes_on_from is None else goes_on_from._buffers
        self._places: list[tuple[int, int]] = []
        """Its buffers' numbers and addresses."""
        self._workspace_bytes = 0

    def rms_norm(self, x: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[Any, torch.Tensor]:
        """ops.rms_norm of x [any, K], or of `rows` rows that are set later: the struct and out."""
        K = weight.shape[0]
        out = self._buffer(self.rows if x is None else x.shape[0], K)
        arguments.check_rms_norm(out if x is None else x, weight, eps)
        fields = {"x": x, "weight": self._keep(weight.detach()), "eps": eps, "out": out}
        return self._add("hb_rms_norm", dtype=self._code, M=out.shape[0], K=K, **fields), out

    def linear(self, x: torch.Tensor, directs: Sequence[Direct]) -> list[torch.Tensor]:
        """The products of x [rows, K] with several weights: [rows, N] each."""
        for direct in directs:
            arguments.check_linear(x, (direct.rows, direct.columns), None, x)
        outs = [self._buffer(self.rows, direct.rows) for direct in directs]
        structs = [direct.arguments_for(x, out) for direct, out in zip(directs, outs, strict=True)]
        self._kept += directs
        together = len(directs) if DirectGroup.may_be_grouped(directs) else 1
        for first in range(0, len(structs), together):
            entry, some = directs[first].entry, structs[first : first + together]
            items = (type(some[0]) * together)(*some)
            if entry in native.GROUPS:
                needed = self._kernels.workspace_bytes(f"{entry}_group", items, together)
            else:
                needed = self._kernels.workspace_bytes(entry, items[0])
            self._workspace_bytes = max(self._workspace_bytes, needed)
            self._items.append((native.STEP_CODES[entry], items, together))
        return outs

    def rotary(self, query: torch.Tensor, key: torch.Tensor) -> Any:
        """ops.rotary of query [rows, H, D] and key [rows, G, D] in place; the struct, without cos and sin."""
        _, H, D = query.shape
        angles = query[:, 0]
        arguments.check_rotary(query, key, angles, angles)
        return self._add("hb_rotary", query=query, key=key, dtype=self._code, T=self.rows, H=H, G=key.shape[1], D=D)

    def cache_write(self, key: torch.Tensor, value: torch.Tensor) -> Any:
        """ops.cache_write of key [rows, G, D] and value [rows, G, E]; the struct, without slots and cache."""
        keys, values = key.new_empty(0, 0, *key.shape[1:]), value.new_empty(0, 0, *value.shape[1:])
        slots = torch.zeros(self.rows, dtype=torch.int64)
        arguments.check_cache_write(key, value, keys, values, slots, None)
        return self._add("hb_cache_write", **native.cache_write_fields(key, value, keys, values, slots, None))

    def attention(self, heads: int, size: int) -> tuple[int, torch.Tensor]:
        """A place for ops.paged_attention, to be filled by `Run.set_step`, and its out [rows, heads, size]."""
        self._items.append((native.STEP_CODES["hb_paged_attention"], None, 1))
        return len(self._items) - 1, self._buffer(self.rows, heads, size)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """ops.swiglu."""
        arguments.check_swiglu(gate, up)
        out = self._buffer(*gate.shape)
        self._add("hb_swiglu", gate=gate, up=up, dtype=self._code, n=gate.numel(), out=out)
        return out

    def add(self, a: torch.Tensor | None, b: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """a + b, or what is set later and b: the struct and out."""
        if a is not None and a.shape != b.shape:
            raise ShapeError(f"a has shape {list(a.shape)} and b {list(b.shape)}; they must be alike.")
        out = self._buffer(*b.shape)
        return self._add("hb_add", a=a, b=b, dtype=self._code, n=b.numel(), out=out), out

    def ready(self) -> None:
        """To be called once, after the last step has been added."""
        workspace = self._keep(BUFFERS.tensor(0, _doubling(self._workspace_bytes)))
        for _, items, _ in self._items:
            for item in items if isinstance(items, ctypes.Array) else ():
                item.call.workspace, item.call.workspace_bytes = workspace.data_ptr(), self._workspace_bytes
        self.steps = [
            native.Step(code, None if items is None else ctypes.addressof(items), count)
            for code, items, count in self._items
        ]

    @property
    def _code(self) -> int:
        return native.DTYPE_CODES[self.dtype]

    def _add(self, entry: str, **fields: Any) -> Any:
        args = native.filled(entry, **fields)
        args.call.threads = self.threads
        self._items.append((native.STEP_CODES[entry], args, 1))
        return args

    def _buffer(self, *shape: int) -> torch.Tensor:
        self._buffers += 1  # the first is the workspace
        size = math.prod(shape) * self.dtype.itemsize
        room = -(-size // self.rows) * _doubling(self.rows)
        buffer = BUFFERS.tensor(self._buffers, room)
        self._places.append((self._buffers, buffer.data_ptr()))
        return self._keep(buffer[:size].view(self.dtype).view(shape))

    def has_current_buffers(self) -> bool:
        """Whether it computes where chains do that are made now; they were replaced where one has needed more."""
        return all(BUFFERS.tensor(index, 0).data_ptr() == address for index, address in self._places)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        return tensor


def _doubling(size: int) -> int:
    """The next power of two. Chains keep the buffers that they were made with: of sizes that double, the smaller ones
    are no more together than the last."""
    return 1 << (size - 1).bit_length() if size else 0


class Run:
    """Chains that are ready, one behind the other in one call; they share their threads."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._kept = list(chains)
        self._threads = chains[0].threads
        steps = [step for chain in chains for step in chain.steps]
        self._steps = (native.Step * len(steps))(*steps)
        self._firsts = [0]
        for chain in chains:
            self._firsts.append(self._firsts[-1] + len(chain.steps))
        self._kernels = native.kernels("cpu")
        self._function = self._kernels.library.hb_run

    def set_step(self, chain: int, index: int, args: Any) -> None:
        """Fills a place of the chain with this number with a struct, which must live until the call is over."""
        self._steps[self._firsts[chain] + index].args = ctypes.addressof(args)

    def __call__(self, chains: int | None = None) -> None:
        """The first so many chains, or all of them. Raises NativeError where a call refuses."""
        count = len(self._steps) if chains is None else self._firsts[chains]
        status = self._function(self._steps, count, self._threads)
        if status:
            self._kernels.check_status("hb_run", status)
