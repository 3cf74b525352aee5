"""When the next request of a soak is sent, and how much of the soak is over: by count, or by the clock."""

from __future__ import annotations

import asyncio
import math
import time


class Pace:
    """Deals out the numbers of the requests to all clients, at most `rate` a second."""

    def __init__(self, requests: int | None = None, seconds: float | None = None, rate: float = math.inf) -> None:
        """One of `requests` and `seconds` says when it ends. Raises ValueError where it is not one of them."""
        if (requests is None) == (seconds is None):
            raise ValueError(f"a soak has a number of requests or of seconds; it was given {requests} and {seconds}")
        self._requests = math.inf if requests is None else requests
        self.seconds = seconds
        """How long it is, where the clock says so."""
        self._pause = 1 / rate
        self._began = self._due = time.monotonic()
        self.begun = 0
        """Requests that have been dealt out."""

    def begin(self) -> None:
        """The clock runs from here."""
        self._began = self._due = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    async def next(self) -> int | None:
        """The number of a request, when it is to be sent; None where there is none any more."""
        due = max(self._due, time.monotonic())
        if self.begun >= self._requests or due >= self._began + (self.seconds or math.inf):
            return None
        number = self.begun
        self.begun += 1
        self._due = due + self._pause
        await asyncio.sleep(due - time.monotonic())
        return number

    def done(self, ended: int) -> float:
        """Which part of the soak is over, when so many requests have ended."""
        return max(ended / self._requests, self.elapsed / (self.seconds or math.inf))
