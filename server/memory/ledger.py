"""Where an engine's bytes are, after loading: each component from a source of its own, none as what remains.

    weights, kv_cache, workspace    sizes of the tensors themselves
    runtime_context                 the kernel's figure of the process, once, before anything of the model was loaded
    mapped_files                    the kernel's figure of pages with a file behind them, less those of weights
    heap                            malloc's own figure since then, less the tensors that it has handed out
    allocator_slack                 resident pages of the weights' arena, less the weights, and of malloc's heap, less
                                    what is handed out of it; on CUDA torch's figures
    activations                     how far the process, or torch's allocator, has been above its rest: only a peak

What the kernel (PSS) or the CUDA driver says of the whole is in `process`; what no component explains of that is named
`unaccounted` by whoever shows it. Nothing here predicts: plan.py does, and the two meet only in a report.
"""

from __future__ import annotations

import gc
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import torch

from quant import pages
from quant.chain import BUFFERS
from quant.direct import WORKSPACE as SCRATCH
from quant.memory import measure_weights
from server.memory import allocator, machine
from server.memory.components import (
    ACTIVATIONS,
    ALLOCATOR_SLACK,
    HEAP,
    KV_CACHE,
    MAPPED_FILES,
    RUNTIME_CONTEXT,
    WORKSPACE,
)
from server.records import CPU, DEVICE_USED, ELSEWHERE, PSS, MemoryReport

if TYPE_CHECKING:
    from torch import nn

CHECKPOINT_SUFFIX: Final = ".safetensors"
_STATUS: Final = {
    "RssAnon": "rss_anonymous",
    "RssFile": "rss_file",
    "RssShmem": "rss_shared",
    "VmHWM": "peak_rss",
    "VmSwap": "swap",
}
_MALLOCS_HEAP: Final = "[heap]"
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"


class Runner(Protocol):
    """What of a runner is looked at."""

    @property
    def kv_tensors(self) -> list[torch.Tensor]: ...

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Tensors that it keeps from step to step, beside the cache."""
        ...


def measure(model: nn.Module, kv_tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Bytes by component of a loaded model and its cache, from the tensors themselves."""
    measured = measure_weights(model)
    measured[KV_CACHE] = sum(tensor.nbytes for tensor in kv_tensors)
    return dict(measured)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The process before anything of a model is loaded, and after everything that loading needs has been imported."""

    anonymous: int
    heap: int
    kept: int
    device_used: int
    """Of a CUDA device, by everybody: this process's context is in it."""

    @classmethod
    def take(cls, device: str) -> Baseline:
        gc.collect()
        allocator.give_back()
        share = machine.share(os.getpid())
        return cls(share.anonymous if share else 0, allocator.in_use() or 0, _kept(), _device_used(device))


def _kept() -> int:
    """Resident in malloc's main heap and in nobody's hands: what steps have freed, for the next ones. At rest it goes
    back (`Ledger.settle`)."""
    return max(0, machine.mapped_share(_MALLOCS_HEAP) - allocator.in_main_heap())


class Ledger:
    """One engine's books. For the thread that runs the steps: kernels' scratch is each thread's own."""

    def __init__(
        self, model: nn.Module, runner: Runner, device: str, planned: dict[str, int], baseline: Baseline
    ) -> None:
        self._runner = runner
        self._device = device
        self._planned = planned
        self._baseline = baseline
        self._weights = dict(measure_weights(model))
        self._places = _Places.of(_distinct([*model.parameters(), *model.buffers()]))
        self._peak: dict[str, int] = {}
        self._rest = 0
        """Resident bytes when all that a step needs had been given back."""
        self._is_peak_ours = False
        """Whether the kernel's high-water mark is that of serving, not of loading."""

    def begin(self) -> None:
        """From now on peaks are those of serving. To be called once, at rest, when all is loaded."""
        self.settle()
        self._is_peak_ours = _reset_peaks(self._device)

    def settle(self) -> None:
        """Gives back what steps have left behind, and remembers what is held at rest. Some milliseconds."""
        allocator.give_back()
        status = process_memory()
        self._rest = status.get("rss_anonymous", 0) + status.get("rss_file", 0) + status.get("rss_shared", 0)

    def report(self) -> MemoryReport:
        """Everything as it is now. The kernel walks the process's pages for it."""
        process = process_memory()
        measured = dict(self._weights)
        kv, buffers = _distinct(self._runner.kv_tensors), _distinct(self._runner.buffers)
        measured[KV_CACHE] = sum(tensor.nbytes for tensor in kv if _on(tensor, self._device))
        scratch = SCRATCH.nbytes + BUFFERS.nbytes if self._device == CPU else 0
        measured[WORKSPACE] = sum(tensor.nbytes for tensor in buffers if _on(tensor, self._device)) + scratch
        share = machine.share(os.getpid())
        if self._device == CPU and share is not None:
            process[PSS] = share.all
            in_files = machine.mapped_share(CHECKPOINT_SUFFIX) if self._places.in_files else 0
            process[ELSEWHERE] = max(0, self._places.in_files - in_files)
            measured |= self._host(share, min(in_files, self._places.in_files), kv, buffers, scratch)
        elif self._device.startswith("cuda"):
            process[DEVICE_USED] = _device_used(self._device) - self._baseline.device_used
            reserved = torch.cuda.memory_reserved(self._device)
            measured[ALLOCATOR_SLACK] = reserved - torch.cuda.memory_allocated(self._device)
        free, capacity = torch.cuda.mem_get_info(self._device) if self._device != CPU else (0, 0)
        for name, size in (measured | {ACTIVATIONS: self._activations(process)}).items():
            self._peak[name] = max(size, self._peak.get(name, 0))
        return MemoryReport(
            device=self._device,
            planned=self._planned,
            measured=measured,
            process=process,
            device_capacity=capacity,
            device_free=free,
            peak=dict(self._peak),
        )

    def _host(
        self, share: machine.Share, in_files: int, kv: list[torch.Tensor], buffers: list[torch.Tensor], scratch: int
    ) -> dict[str, int]:
        """The components that only a process on a CPU has."""
        others = sum(tensor.nbytes for tensor in (*kv, *buffers) if tensor.device.type == CPU) + scratch
        heap = (allocator.in_use() or 0) - self._baseline.heap - self._places.by_malloc - others
        return {
            RUNTIME_CONTEXT: self._baseline.anonymous,
            MAPPED_FILES: share.file - in_files,
            HEAP: max(0, heap),
            ALLOCATOR_SLACK: self._places.arena_slack + max(0, _kept() - self._baseline.kept),
        }

    def _activations(self, process: dict[str, int]) -> int:
        """The most that steps have taken so far, beyond what is held at rest."""
        if self._device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(self._device)
            return max(0, peak - torch.cuda.memory_allocated(self._device)) if self._is_peak_ours else 0
        return max(0, process.get("peak_rss", 0) - self._rest) if self._is_peak_ours else 0


@dataclass(frozen=True, slots=True)
class _Places:
    """Where weights on the CPU lie. They never move, so this is found out once."""

    by_malloc: int
    in_files: int
    """Bytes of those that are views of a mapped file."""
    arena_slack: int
    """Resident bytes of the arena that no weight lies in."""

    @classmethod
    def of(cls, tensors: list[torch.Tensor]) -> _Places:
        arena = _Ranges(pages.ranges())
        files = _Ranges([(one.start, one.end) for one in machine.mapped_files(CHECKPOINT_SUFFIX)])
        by_malloc = in_arena = in_files = 0
        for tensor in tensors:
            address = tensor.data_ptr()
            if tensor.device.type != CPU:
                continue
            if arena.hold(address):
                in_arena += tensor.nbytes
            elif files.hold(address):
                in_files += tensor.nbytes
            else:
                by_malloc += tensor.nbytes
        return cls(by_malloc, in_files, max(0, allocator.resident_bytes(arena.ranges) - in_arena))


class _Ranges:
    """Ranges of addresses that do not overlap."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self.ranges = sorted(ranges)
        self._starts = [start for start, _ in self.ranges]

    def hold(self, address: int) -> bool:
        index = bisect_right(self._starts, address) - 1
        return index >= 0 and address < self.ranges[index][1]


def process_memory(status: Path = Path("/proc/self/status")) -> dict[str, int]:
    """Resident bytes of this process as the kernel counts them.

    rss_anonymous is memory that only this process pays for; rss_file are mapped file pages, which the kernel may drop
    at any time. Where there is no /proc, the dictionary is empty.
    """
    found = machine.fields(status)
    return {name: found[key] for key, name in _STATUS.items() if key in found}


def _device_used(device: str) -> int:
    if not device.startswith("cuda"):
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def _reset_peaks(device: str) -> bool:
    """Sets the kernel's, or torch's, high-water mark to what is held now; whether that could be done."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those with memory, each place once."""
    return list(
        {(t.device, t.data_ptr(), t.nbytes): t for t in tensors if t.device.type != "meta" and t.nbytes}.values()
    )


def _on(tensor: torch.Tensor, device: str) -> bool:
    return str(tensor.device) == device
