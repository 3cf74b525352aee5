"""Stop strings, across token boundaries: text is held back as long as it could still become one.

The text ends at the stop string that is complete first (of several complete at the same character, the longest),
however the text was cut into pieces. The stop string itself is never given out. Nothing here knows about tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one text; `stops` are non-empty strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to be before any stop string; empty once stopped."""
        if self.stopped:
            return ""
        self._held += text
        cut = first_stop(self._held, self._stops)
        if cut is not None:
            self.stopped = True
            return self._give(cut, keep=False)
        return self._give(len(self._held) - self._undecided(), keep=True)

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        return "" if self.stopped else self._give(len(self._held), keep=False)

    def _give(self, count: int, *, keep: bool) -> str:
        text = self._held[:count]
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


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the text must be cut: the start of the stop string that ends first, or None."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None
