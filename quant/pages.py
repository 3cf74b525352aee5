"""Where packed weights lie on a CPU: one behind the other in memory that the kernel may back with huge pages.

A product with one row reads each weight once, at the speed of the memory, and that speed is lower by a sixth where
every four kilobytes need an entry of their own in the processor's table of pages. Huge pages need aligned, contiguous
memory, which an allocation of its own for each weight is not. Weights of packed files stay in the mapped file. Not
here: which tensors are placed (native.py, experts.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Final

import torch

SMALLEST: Final = 64 << 10
"""Bytes of a tensor that is worth placing: smaller ones are read from the cache."""
_CHUNK: Final = 32 << 20
"""Of address space; only what is written becomes memory."""
_HUGE_PAGE: Final = 2 << 20
_ALIGNMENT: Final = 64


class Arena:
    """Hands out memory from the front of a chunk; a chunk goes when the last tensor in it does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: Callable[[], mmap.mmap | None] = lambda: None
        """The chunk in use, which its tensors alone keep alive."""
        self._used = 0
        self._chunks: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
        """All that are alive, by their address."""

    def ranges(self) -> list[tuple[int, int]]:
        """First and last address of the chunks that some tensor lies in."""
        with self._lock:
            return sorted((address, address + len(chunk)) for address, chunk in self._chunks.items())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros: memory that nobody has written yet."""
        count = math.prod(shape)
        with self._lock:
            start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
            chunk = self._chunk()
            if chunk is None or start + count * dtype.itemsize > len(chunk):
                chunk, start = _mapped(max(count * dtype.itemsize, _CHUNK)), 0
                self._chunk = weakref.ref(chunk)
                self._chunks[ctypes.addressof(ctypes.c_char.from_buffer(chunk))] = chunk
            self._used = start + count * dtype.itemsize
        with torch.inference_mode(False):
            return torch.frombuffer(chunk, dtype=dtype, count=count, offset=start).view(*shape)


def _mapped(size: int) -> mmap.mmap:
    """Private memory of at least `size` bytes, whole huge pages."""
    chunk = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: the same memory, in small ones
            chunk.madvise(mmap.MADV_HUGEPAGE)
    return chunk


_ARENA: Final = Arena()


def ranges() -> list[tuple[int, int]]:
    """The process's arena: first and last address of each chunk."""
    return _ARENA.ranges()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty for a tensor that will be read many times: in the process's arena where that gains something."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    return _ARENA.empty(shape, dtype)


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.stack into such a tensor."""
    first = tensors[0]
    if first.device.type != "cpu":
        return torch.stack(list(tensors))
    return torch.stack(list(tensors), out=empty((len(tensors), *first.shape), first.dtype, first.device))
