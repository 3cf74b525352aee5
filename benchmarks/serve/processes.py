"""A process and all its descendants, as /proc shows them: who they are, and what memory they take."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Final

from server.memory.machine import process_bytes

SAMPLE_SECONDS: Final = 5.0
"""Between two looks at a tree's memory: a look walks all its pages, some 20 ms for a few gigabytes."""


def tree(pid: int) -> list[int]:
    """The process and its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def proportional_bytes(pid: int) -> int:
    """PSS of a process and its descendants: what they take, each shared page divided by those who share it."""
    return sum(found.pss for one in tree(pid) if (found := process_bytes(one)) is not None)


class MemoryWatch:
    """Looks at a tree's proportional memory while a block runs; `most` is the largest it saw."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.most = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, proportional_bytes(self._pid))

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.most = max(self.most, proportional_bytes(self._pid))
