"""Turns tokens into text as they arrive: the pieces, joined, are the text that decoding all tokens at once gives.

A token is not a piece of text of its own: one character may be spread over several tokens, and a tokenizer may drop a
space at the start of a text. So the last tokens are decoded together with the ones before them, and what is new is the
difference:

    tokens    ... a b c | d e f | g h          window starts at the tokens that gave the last piece
    text            known ^     ^ new          nothing is given out while the end is an incomplete character
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from server.text.tokenizer import NO_CHARACTER, Tokenizer

_LONGEST_WAIT: Final = 8
"""Tokens without text after which their bytes can't all belong to one character: keeps the window small."""
_CHARACTER_BYTES: Final = 4
_CONTEXT: Final = 8
"""Tokens of what goes before that are decoded as context: the first one may lose a space, the last ones don't."""


class IncrementalDecoder:
    """The text of one sequence, piece by piece; `before` are tokens that it follows, whose text is not given out."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._known = _context(tokenizer, before)
        """Tokens whose text was given out last; decoded again as context for the next ones."""
        self._known_text = tokenizer.decode(self._known) if self._known else ""
        self._new: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these tokens; it may be empty."""
        text = ""
        for token in ids:
            if token not in self._tokenizer.special_ids:
                self._new.append(token)
                text += self._advance()
        return text

    def finish(self) -> str:
        """What was held back, incomplete characters included; the decoder is empty afterwards."""
        return self._take(len(self._new), self._fresh()) if self._new else ""

    def _advance(self) -> str:
        fresh = self._fresh()
        if fresh and (not fresh.endswith(NO_CHARACTER) or self._is_whole()):
            return self._take(len(self._new), fresh)
        return self._give_up(fresh) if len(self._new) > _LONGEST_WAIT else ""

    def _is_whole(self) -> bool:
        """Whether the new tokens' bytes are whole characters: the last may be NO_CHARACTER itself, as in any text."""
        try:
            b"".join(self._tokenizer.spell(token).data for token in self._new).decode()
        except UnicodeDecodeError:
            return False
        return True

    def _fresh(self) -> str:
        """The text that the new tokens add to what is known."""
        joined = self._tokenizer.decode(self._known + self._new)
        if joined.startswith(self._known_text):
            return joined[len(self._known_text) :]
        # Bytes that are no character made the decoder change its mind about text that is out already.
        return self._tokenizer.decode(self._new)

    def _give_up(self, fresh: str) -> str:
        """Bytes that never become a character: gives out all but the last ones, cut where no character is cut."""
        for count in range(len(self._new) - 1, len(self._new) - 1 - _CHARACTER_BYTES, -1):
            head = self._tokenizer.decode(self._new[:count])
            if head and head + self._tokenizer.decode(self._new[count:]) == fresh:
                return self._take(count, head)
        return ""

    def _take(self, count: int, text: str) -> str:
        self._known, self._new = self._new[:count], self._new[count:]
        self._known_text = self._tokenizer.decode(self._known)
        return text


def _context(tokenizer: Tokenizer, before: Sequence[int]) -> list[int]:
    """The last tokens with text, from the beginning of a character on: where a run of byte tokens begins inside of one,
    decoders make all of the run NO_CHARACTER, and the text that continues it.
    """
    last = list(islice((token for token in reversed(before) if token not in tokenizer.special_ids), _CONTEXT))[::-1]
    begins = (place for place, token in enumerate(last[:_CHARACTER_BYTES]) if not _continues(tokenizer, token))
    return last[next(begins, 0) :]


def _continues(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token's first byte is not the first of its character, which UTF-8 marks."""
    return b"\x80" <= tokenizer.spell(token).data[:1] < b"\xc0"
