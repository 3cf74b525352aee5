"""How many requests of one model may be open, and when a refused client should come back. No engine, no HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from server.errors import OverloadedError, RequestError

LONGEST_RETRY_SECONDS: Final = 600
_REMEMBERED: Final = 32
MOST_OWED: Final = 2
"""Times its capacity, that many requests an engine may have before it has ended any."""


class Admission:
    """Counts one model's open requests against a fixed capacity: those that run and those that may wait."""

    def __init__(self, model: str, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._capacity = capacity
        self._clock = clock
        self._stays: deque[float] = deque(maxlen=_REMEMBERED)
        """For how long the places were held that were freed last."""
        self.open = 0
        self.used = clock()
        """When it last had a request, on the clock's scale."""
        self.empty = asyncio.Event()
        """Set while no request is open."""
        self.empty.set()

    def touch(self) -> None:
        """Counts as a use."""
        self.used = self._clock()

    @contextmanager
    def enter(self, count: int = 1, owed: int = 0) -> Iterator[None]:
        """Holds `count` places while the block runs; raises OverloadedError when they are not free, and RequestError
        for more than there are.

        `owed` requests the engine still has, given up by their clients or not. Their places are free once they are
        given up, for an engine forgets them at its next step; where that does not come, there must be an end to them.
        """
        if count > self._capacity:
            raise RequestError(
                f"the request asks for {count} texts; model {self._model!r} accepts at most {self._capacity} at a time"
            )
        if self.open + count > self._capacity:
            seconds = self.retry_after(count)
            raise OverloadedError(
                f"model {self._model!r} has {self.open} requests open and accepts at most {self._capacity}; "
                f"try again in {seconds} s",
                retry_after=seconds,
            )
        if owed + count > MOST_OWED * self._capacity:
            raise OverloadedError(
                f"the engine of model {self._model!r} has {owed} requests that it has not ended, given up by their "
                f"clients most of them; {MOST_OWED * self._capacity} at most are sent to it",
                retry_after=_whole_seconds(self._mean_stay()),
            )
        self.open += count
        self.empty.clear()
        entered = self._clock()
        try:
            yield
        finally:
            self.open -= count
            self.touch()
            self._stays.extend([self.used - entered] * count)
            if not self.open:
                self.empty.set()

    def retry_after(self, count: int) -> int:
        """Whole seconds until `count` places should be free.

        Where places are held so long on average, as many as are held become free in that time (Little's law). So it
        does not matter how long nobody asked for anything before.
        """
        needed = self.open + count - self._capacity
        if not self._stays or not self.open:
            return 1
        return _whole_seconds(needed * self._mean_stay() / self.open)

    def _mean_stay(self) -> float:
        """Seconds that the places were held which were freed last; 0 where none has been."""
        return sum(self._stays) / max(1, len(self._stays))


def _whole_seconds(seconds: float) -> int:
    return max(1, min(LONGEST_RETRY_SECONDS, math.ceil(seconds)))
