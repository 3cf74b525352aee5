"""The server's memory, cache and queue while a soak runs, and whether any of it grew."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.serve.processes import tree
from benchmarks.soak.counts import Series, total
from server.memory.machine import anonymous_bytes
from server.metrics import catalog
from server.records import PSS

ENGINE: Final = b"server.engine.process"
MB: Final = 1e6
WARM: Final = 0.2
"""Part of a process's samples in which buffers and caches may still grow to their size."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment. Bytes are anonymous resident memory, or what the metric says."""

    seconds: float
    requests: int
    """That had ended."""
    engine: int
    """Process id; 0 while there is none that is ready."""
    http_bytes: int
    engine_bytes: int
    unaccounted_bytes: int
    pss_bytes: int
    """Of the engine, in the ledger's last report, as the components are."""
    components: dict[str, int]
    """As measured; empty where there was no report."""
    blocks_used: int
    blocks_cached: int
    running: int
    waiting: int


@dataclass(frozen=True)
class Growth:
    """One process from when it was warm to its end: medians of the samples at either end."""

    process: str
    requests: int
    start_mb: float
    end_mb: float

    @property
    def bytes_per_request(self) -> float:
        return (self.end_mb - self.start_mb) * MB / max(1, self.requests)


def engine_of(server: int) -> int:
    """The process id of the server's engine; 0 where there is none."""
    return next((pid for pid in tree(server) if ENGINE in _command(pid)), 0)


def take(server: int, series: Series, seconds: float, requests: int) -> Sample:
    """What the server is now."""
    engine = engine_of(server) if total(series, catalog.ENGINE_UP) else 0
    return Sample(
        seconds=round(seconds, 1),
        requests=requests,
        engine=engine,
        http_bytes=anonymous_bytes(server) or 0,
        engine_bytes=anonymous_bytes(engine) or 0,
        unaccounted_bytes=round(total(series, catalog.MEMORY_UNACCOUNTED)),
        pss_bytes=round(total(series, catalog.PROCESS_MEMORY, kind=PSS)),
        components=_components(series),
        blocks_used=round(total(series, catalog.KV_USED)),
        blocks_cached=round(total(series, catalog.KV_CACHED)),
        running=round(total(series, catalog.REQUESTS_RUNNING)),
        waiting=round(total(series, catalog.REQUESTS_WAITING)),
    )


def _components(series: Series) -> dict[str, int]:
    return {
        dict(labels)["component"]: round(value)
        for (name, labels), value in series.items()
        if name == catalog.MEMORY.exposed_name
    }


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of the HTTP process, and of each engine in turn."""
    found = [_growth("HTTP process", samples, lambda one: one.http_bytes)]
    lives = dict.fromkeys(one.engine for one in samples if one.engine)
    for number, engine in enumerate(lives, 1):
        own = [one for one in samples if one.engine == engine]
        found.append(_growth(f"engine {number}", own, lambda one: one.engine_bytes))
    return found


def _growth(process: str, samples: Sequence[Sample], size: Callable[[Sample], int]) -> Growth:
    warm = samples[int(WARM * len(samples)) :]
    few = max(1, len(warm) // 10)
    start, end = ([size(one) for one in part] for part in (warm[:few], warm[-few:]))
    requests = warm[-1].requests - warm[0].requests
    return Growth(process, requests, statistics.median(start) / MB, statistics.median(end) / MB)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
