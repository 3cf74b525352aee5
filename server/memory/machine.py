"""What the operating system says of memory: what is free on this machine, and what a process holds. No torch here.

Every function reads /proc or the control group's files anew. Where a file is not there, or may not be read, it says
None and leaves it to the caller what that means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

_KIB: Final = 1024


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


def machine_available(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """MemAvailable: what new work may take before the machine swaps, page cache that can be dropped included."""
    return _fields(meminfo).get("MemAvailable")


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
