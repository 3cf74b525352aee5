"""When an engine looks at its memory: at rest, and now and then while it works; never because somebody asked.

What is found is sent and kept by the HTTP process, so that a scrape, and GET /memory, cost the engine nothing. At rest
memory that steps have left behind is given back first. While working a look may take a thousandth of the time at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from server.memory.ledger import Ledger
from server.records import MemoryChanged

SMALLEST_PAUSE: Final = 10.0
"""Seconds between two looks while working."""
SHARE: Final = 1e-3


class Upkeep:
    """Called by the engine's loop."""

    def __init__(self, ledger: Ledger, send: Callable[[MemoryChanged], None]) -> None:
        self._ledger = ledger
        self._send = send
        self._next = time.monotonic() + SMALLEST_PAUSE

    def at_rest(self) -> None:
        """The engine has had nothing to do for a moment."""
        self._ledger.settle()
        self._look()

    def after_step(self) -> None:
        """The engine is working."""
        if time.monotonic() >= self._next:
            self._look()

    def _look(self) -> None:
        started = time.monotonic()
        self._send(MemoryChanged(self._ledger.report()))
        ended = time.monotonic()
        self._next = ended + max(SMALLEST_PAUSE, (ended - started) / SHARE)
