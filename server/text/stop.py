"""Stop strings, across token boundaries: text is held back as long as it could still become one.

The text ends at the stop string that is complete first (of several complete at the same character, the longest),
however the text was cut into pieces. The stop string itself is given out only where it is asked for. Nothing here
knows about tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one text; `stops` are non-empty strings. With `keep`, the text ends behind its stop string."""

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops = tuple(stops)
        self._keep = keep
        self._held = ""
        self._early = 0
        """Held characters that came while the text might not stop: a stop string must end behind them."""
        self.stopped = False

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The part of the text so far that is certain to be before any stop string; empty once stopped.

        Where the text may not stop yet, a stop string that is complete by now is text like any other.
        """
        if self.stopped:
            return ""
        self._held += text
        if not may_stop:
            self._early = len(self._held)
        found = first_stop(self._held, self._stops, self._early)
        if found is not None:
            self.stopped = True
            start, end = found
            return self._give(end if self._keep else start, keep=False)
        return self._give(len(self._held) - self._undecided(), keep=True)

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        return "" if self.stopped else self._give(len(self._held), keep=False)

    def _give(self, count: int, *, keep: bool) -> str:
        text = self._held[:count]
        self._early = max(0, self._early - count)
        self._held = self._held[count:] if keep else ""
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def first_stop(text: str, stops: Sequence[str], behind: int = 0) -> tuple[int, int] | None:
    """Start and end of the stop string that ends first of those that end behind a place, or None."""
    starts = [(stop, text.find(stop, max(0, behind - len(stop) + 1))) for stop in stops]
    found = [(start + len(stop), start) for stop, start in starts if start >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end
