"""What the operating system says of memory: what is free on this machine, and what a process holds. No torch here.

Every function reads /proc or the control group's files anew. Where a file is not there, or may not be read, it says
None and leaves it to the caller what that means.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final, NamedTuple

_KIB: Final = 1024
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")
_LIMIT_AND_USAGE: Final = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Of control groups, version 2 and 1."""


class ProcessBytes(NamedTuple):
    """What a process has in memory.

    `pss` counts pages it shares in proportion, so over all processes it adds up; `rss` counts them in full. `anonymous`
    is what has no file behind it: the kernel can't drop it, so it is what others must do without.
    """

    pss: int
    rss: int
    anonymous: int


def process_bytes(pid: int, proc: Path = Path("/proc")) -> ProcessBytes | None:
    """The kernel's own sums over a process's mappings; None where the process is gone or not ours to look at."""
    found = _fields(proc / str(pid) / "smaps_rollup")
    if "Pss" not in found:
        return None
    return ProcessBytes(found["Pss"], found.get("Rss", 0), found.get("Anonymous", 0))


def anonymous_bytes(pid: int, proc: Path = Path("/proc")) -> int | None:
    """The same, of a process's memory in RAM, from a counter: cheap however large the process is."""
    return _fields(proc / str(pid) / "status").get("RssAnon")


def machine_available(meminfo: Path = _MEMINFO) -> int | None:
    """MemAvailable: what new work may take before the machine swaps, page cache that can be dropped included."""
    return _fields(meminfo).get("MemAvailable")


def available(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """What this process may take of that: no more than its control group leaves."""
    free = machine_available(meminfo)
    return None if free is None else min([free, *(max(0, limit - usage) for limit, usage in _limits(cgroup))])


def capacity(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """All memory of the machine, or as much of it as the control group allows."""
    total = _fields(meminfo).get("MemTotal")
    return None if total is None else min([total, *(limit for limit, _ in _limits(cgroup))])


def _limits(cgroup: Path) -> list[tuple[int, int]]:
    """Limit and usage of the control group in bytes; empty where there is no limit."""
    found = []
    for limit, usage in _LIMIT_AND_USAGE:
        with contextlib.suppress(OSError, ValueError):  # no such version, or "max"
            found.append((int((cgroup / limit).read_text()), int((cgroup / usage).read_text())))
    return found


def _fields(file: Path) -> dict[str, int]:
    """The lines `Name:   123 kB` of a file of /proc, in bytes."""
    try:
        text = file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number = value.split()
        if len(number) == 2 and number[0].isdigit() and number[1] == "kB":
            found[name] = int(number[0]) * _KIB
    return found
