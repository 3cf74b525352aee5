"""Guesses of what a sequence says next, looked up in what it has said: speculation without a second model.

The last few tokens are sought in the sequence itself, prompt included, and what followed them there is guessed to
follow again (prompt lookup decoding: Saxena, 2023):

    ... the cat sat on the mat ...... the cat sat  ->  on the mat
        ^^^^^^^^^^^                   ^^^^^^^^^^^      what followed the latest such place

A step that has guesses for a row checks them all at once, and tokens are drawn as they would be without; a guess costs
a row, nothing else. Whether that pays is decided per sequence and step, by the two numbers below. Guesses are made and
compared with what was drawn even where none is checked, so a sequence that turns repetitive is noticed at no cost.

No torch, no blocks: the scheduler asks, and decides what there is room for.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

SHORTEST: Final = 3
LONGEST: Final = 6
"""How many of the last tokens must be found again: so many at least, and more rather than fewer."""
_FIRST_RATE: Final = 0.5
_MEMORY: Final = 8
"""The rate of right guesses is that of about the last so many."""
_TYPE: Final = "i"
_SIZE: Final = array(_TYPE).itemsize


class Lookup:
    """One sequence's text as it can be searched, and how often guesses about it were right."""

    def __init__(self) -> None:
        self.rate = _FIRST_RATE
        """How often a guess was right whose predecessors were, lately."""
        self._text = bytearray()
        self._guess: list[int] = []

    def worth(self, rows: int, most: int, fixed_rows: int) -> int:
        """How many guesses pay in a step that has `rows` rows without them; `most` at most.

        A row more takes 1 where the step takes fixed_rows + rows, for which it gives `rows` sequences a token each.
        The n-th guess gives one with a probability of rate^n; it pays where that costs less than a token does anyway.
        """
        count, chance = 0, self.rate
        while count < most and chance * (fixed_rows + rows) > rows:
            count += 1
            chance *= self.rate
        return count

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that may follow the sequence's tokens; empty where nothing like its end is found."""
        self._text += array(_TYPE, tokens[len(self._text) // _SIZE :]).tobytes()
        self._guess = []
        place = self._followed()
        if place is not None:
            known = len(tokens)
            for source in range(place, place + count):  # where it reaches the end, it goes on with its own beginning
                self._guess.append(tokens[source] if source < known else self._guess[source - known])
        return self._guess

    def learn(self, drawn: Sequence[int]) -> None:
        """Compares the last guess with the tokens that were drawn, as far as one can tell."""
        if not self._guess:
            return
        for guess, token in zip(self._guess, drawn, strict=False):
            self.rate += ((guess == token) - self.rate) / _MEMORY
            if guess != token:
                break
        self._guess = []

    def _followed(self) -> int | None:
        """Where the tokens begin that followed the latest place that ends like the text does; the longer likeness."""
        found = None
        for length in range(SHORTEST, LONGEST + 1):
            place = self._find(self._text[-length * _SIZE :]) if len(self._text) > length * _SIZE else -1
            if place < 0:
                break
            found = place // _SIZE + length
        return found

    def _find(self, end: bytearray) -> int:
        """Where these last bytes begin the last time before, at a token's first byte; -1 for nowhere."""
        place = self._text.rfind(end, 0, -_SIZE)
        while place % _SIZE and place > 0:
            place = self._text.rfind(end, 0, place + len(end) - 1)
        return place if place % _SIZE == 0 else -1
