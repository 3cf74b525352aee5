"""Steps whose sequences have one row each, recorded: CUDA graphs, one for each of some numbers of rows.

A step of such rows is a few hundred kernels, most of which take less time than Python takes to start the next one. What
it starts for n rows is the same each time but for numbers in tensors, so it is recorded once, when the engine starts,
and replayed in one call. A batch takes the smallest recording that it fits in, and rows that it lacks are copies of its
last one: they write to its place what it writes there, and nobody reads what they give.

    rows the batch has      1   2   3   4   5 .. 8   9 .. 16   17 .. 24       in eights up to 256, then in 64s
    rows recorded           1   2   4   4     8        16         24

Attention shares its work out by how long sequences may be, not by how long they are. So there are recordings for
tables of few blocks beside those for tables of as many as a sequence can have, and a batch takes the narrowest it fits.

A recording must not depend on a batch but by its tensors, which stay where they are (runner.py's buffers), and may not
wait for the device. Both are CUDA's rules; that each does what the same calls do without it is proven at the start
(probe.py). Prompts are not recorded: their shapes differ from step to step, and they are long enough not to wait for
Python. Not here: what is computed, nor which batches may be replayed (runner.py).
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Final, NamedTuple, Protocol

import torch

from server.model.attention import Call, Tables, attend_by_tables, write_rows
from server.model.paged_cache import PagedCache

FINE_STEP: Final = 8
FINE_UP_TO: Final = 256
COARSE_STEP: Final = 64
NARROWEST: Final = 256
"""Blocks in the narrowest tables that steps are recorded with; 4,096 tokens."""
WIDENED: Final = 8
"""How many times as wide the next ones are."""


class SingleRows:
    """The attention's context of a forward call in which every sequence has one row, all of it in tensors that may be
    filled anew: a call makes nothing of a batch but by them.
    """

    def __init__(self, cache: PagedCache, slots: torch.Tensor, tables: Tables) -> None:
        self._cache = cache
        self._slots = slots
        self._tables = tables
        self._calls = 0

    def attend(self, call: Call) -> torch.Tensor:
        stores = self._cache.layers[self._calls]
        self._calls += 1
        write_rows(call, stores, self._slots)
        return attend_by_tables(call, stores, self._tables)


class Recorder(Protocol):
    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Does the work, and gives what does it again, without asking Python what it is. Raises RuntimeError where the
        work can't be recorded."""
        ...


class CudaRecorder:
    """CUDA graphs of one device. None runs beside another, so they share the memory of what is computed in between, and
    one stream to be recorded on, since libraries keep a workspace for each stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            outside = torch.cuda.current_stream()
            try:
                # First uses (libraries, their workspaces, a kernel's code) may wait or allocate, which a graph can't
                # hold; what waits all the same is found before anything is captured, since of a failed capture torch
                # leaves its allocator in doubt.
                self._stream.wait_stream(outside)
                with torch.cuda.stream(self._stream):
                    work()
                    with _waiting_forbidden():
                        work()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    work()
            finally:
                torch.cuda.set_stream(outside)
                outside.wait_stream(self._stream)
        return graph.replay


class Size(NamedTuple):
    """Of a step that is recorded."""

    width: int
    """Blocks in a row of its table."""
    rows: int


class Graphs:
    """The recordings of `work`, which computes a step of the size it is given from buffers into buffers."""

    def __init__(self, work: Callable[[Size], None], most_rows: int, most_blocks: int, recorder: Recorder) -> None:
        """For batches of up to `most_rows` rows. The largest is recorded first: the others fit in its memory."""
        self._rows, self._widths = recorded_rows(most_rows), recorded_widths(most_blocks)
        self.sizes = [Size(width, rows) for width in self._widths for rows in self._rows]
        self._replays = {size: recorder(partial(work, size)) for size in reversed(self.sizes)}

    def fitting(self, rows: int, blocks: int) -> Size | None:
        """The smallest recording that holds so many rows, of sequences with up to so many blocks, if there is one."""
        row, width = bisect_left(self._rows, rows), bisect_left(self._widths, blocks)
        if row == len(self._rows) or width == len(self._widths):
            return None
        return Size(self._widths[width], self._rows[row])

    def replay(self, size: Size) -> None:
        """Does the work of a size that `fitting` gave, on the current stream."""
        self._replays[size]()


def recorded_rows(most: int) -> list[int]:
    """How many rows recordings have, where batches have up to `most`."""
    steps = chain((1, 2, 4), range(FINE_STEP, FINE_UP_TO, FINE_STEP), range(FINE_UP_TO, most, COARSE_STEP))
    return [*(rows for rows in steps if rows < most), most]


def recorded_widths(most: int) -> list[int]:
    """How many blocks a row of their tables has, where sequences have up to `most`."""
    widths = []
    width = NARROWEST
    while width < most:
        widths.append(width)
        width *= WIDENED
    return [*widths, most]


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """While this is open, what makes the host wait for the device raises RuntimeError, as torch knows it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
