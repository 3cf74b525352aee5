"""What the operating system says of memory: what is free on this machine, and what a process holds. No torch here.

Every function reads /proc or the control group's files anew. Where a file is not there, or may not be read, it says
None and leaves it to the caller what that means.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from server import cgroups

_KIB: Final = 1024
_MAPPING: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
_MEMINFO: Final = Path("/proc/meminfo")


class _Files(NamedTuple):
    """How a version of control groups names its files."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]
    """Fields of memory.stat: page cache that is in the usage, and that the kernel drops before it kills anybody."""


_FILES: Final = {
    1: _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: _Files("memory.max", "memory.current", ("inactive_file", "active_file")),
}


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
    found = fields(proc / str(pid) / "smaps_rollup")
    if "Pss" not in found:
        return None
    return ProcessBytes(found["Pss"], found.get("Rss", 0), found.get("Anonymous", 0))


class Share(NamedTuple):
    """A process's part of all resident pages, those of several processes divided among them."""

    anonymous: int
    """Without a file behind them, those in shared memory included."""
    file: int

    @property
    def all(self) -> int:
        return self.anonymous + self.file


def share(pid: int, proc: Path = Path("/proc")) -> Share | None:
    """PSS by kind; None where the process is gone, or the kernel doesn't tell. It walks all pages of the process."""
    found = fields(proc / str(pid) / "smaps_rollup")
    if "Pss_File" not in found:
        return None
    return Share(found["Pss"] - found["Pss_File"], found["Pss_File"])


class Mapping(NamedTuple):
    """One range of addresses with a file's bytes."""

    start: int
    end: int
    file: str


def mapped_files(suffix: str, maps: Path = Path("/proc/self/maps")) -> list[Mapping]:
    """This process's mappings of files with names that end so; empty where there is no /proc."""
    if not maps.is_file():
        return []
    found = []
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, *_, file = line.split(maxsplit=5)
        if file.endswith(suffix):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(Mapping(start, end, file))
    return found


def mapped_share(suffix: str, smaps: Path = Path("/proc/self/smaps")) -> int:
    """This process's share (PSS) of the pages of its mappings of such files; 0 where the kernel doesn't tell."""
    total, is_wanted = 0, False
    try:
        with smaps.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if _MAPPING.match(line):
                    is_wanted = line.rstrip("\n").endswith(suffix)
                elif is_wanted and line.startswith("Pss:"):
                    total += int(line.split()[1]) * _KIB
    except OSError:
        return 0
    return total


def anonymous_bytes(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Anonymous memory of a process in RAM, from a counter: cheap however large the process is."""
    return fields(proc / str(pid) / "status").get("RssAnon")


def machine_available(meminfo: Path = _MEMINFO) -> int | None:
    """MemAvailable: what new work may take before the machine swaps, page cache that can be dropped included."""
    return fields(meminfo).get("MemAvailable")


def available(meminfo: Path = _MEMINFO, cgroup: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> int | None:
    """What this process may take of that: no more than its control groups leave, page cache counted as free there too.

    A checkpoint that has been read is in a group's usage until the kernel needs the room.
    """
    free = machine_available(meminfo)
    return None if free is None else min([free, *(max(0, limit - held) for limit, held in _limits(cgroup, own))])


def capacity(meminfo: Path = _MEMINFO, cgroup: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> int | None:
    """All memory of the machine, or as much of it as the control groups allow."""
    total = fields(meminfo).get("MemTotal")
    return None if total is None else min([total, *(limit for limit, _ in _limits(cgroup, own))])


def _limits(cgroup: Path, own: Path) -> list[tuple[int, int]]:
    """Limit, and what is held and can't be dropped, of each control group that this process is in; empty where there is
    no limit.
    """
    found = []
    for group in cgroups.own_groups("memory", cgroup, own):
        files = _FILES[group.version]
        with contextlib.suppress(OSError, ValueError):  # no such group seen from here, or "max"
            limit, usage = (int((group.path / name).read_text()) for name in (files.limit, files.usage))
            counts = dict(line.split() for line in (group.path / "memory.stat").read_text().splitlines())
            found.append((limit, usage - sum(int(counts.get(name, 0)) for name in files.reclaimable)))
    return found


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that a path is on, such as ext4 or tmpfs; empty where that cannot be told."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, behind = line.partition(" - ")
        if before.split(" ")[2:3] == [number]:
            return behind.split(" ")[0]
    return ""


def fields(file: Path) -> dict[str, int]:
    """The lines `Name:   123 kB` of a file of /proc, in bytes; empty where it can't be read."""
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
