"""What the sampler must know of one sequence's tokens, kept up to date token by token: no step reads a sequence anew.

The scheduler keeps one beside each sequence whose parameters ask for it, so it outlives a preemption; the sampler only
reads. numpy, no torch: what is counted here is counted once per token, on the host.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from server.records import SamplingParams

Tokens = npt.NDArray[np.int64]


class History:
    """The counts of one sequence's tokens, and its last few for the bad words."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int]) -> None:
        self.params = params
        self.counts = TokenCounts(prompt) if penalised(params) else None
        self.biased: Tokens = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self.biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self.allowed = None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, dtype=np.int64)
        self._generated = 0
        self._endings: dict[tuple[int, ...], list[int]] = {}
        """Last tokens of bad words by the tokens before them."""
        for *beginning, end in params.bad_words:
            self._endings.setdefault(tuple(beginning), []).append(end)
        self._lengths = sorted({len(beginning) for beginning in self._endings})
        self._tail = deque(prompt, maxlen=max(self._lengths, default=0))

    @classmethod
    def needed(cls, params: SamplingParams, prompt: Iterable[int]) -> History | None:
        """A history where these parameters change logits, else None: a sequence without one costs nothing."""
        changes = (
            penalised(params),
            params.logit_bias,
            params.allowed_token_ids is not None,
            params.bad_words,
            params.min_tokens > 0,
        )
        return cls(params, prompt) if any(changes) else None

    def append(self, token: int) -> None:
        """Takes in the token that was just generated."""
        self._generated += 1
        self._tail.append(token)
        if self.counts is not None:
            self.counts.add(token)

    def followed_by(self, token: int) -> History:
        """The history as it would be after this token; a copy, this one stays as it is."""
        after = copy.copy(self)
        after._tail = self._tail.copy()
        after.counts = None if self.counts is None else self.counts.copy()
        after.append(token)
        return after

    def banned(self) -> list[int]:
        """What must not be drawn next: the ends of bad words that have begun, and stop ids before `min_tokens`."""
        tail = tuple(self._tail)
        banned: list[int] = []
        for length in self._lengths:
            if length <= len(tail):
                banned += self._endings.get(tail[len(tail) - length :], ())
        if self._generated < self.params.min_tokens:
            banned += self.params.stop_token_ids
        return banned


class TokenCounts:
    """The distinct tokens of a sequence, and how often each was generated (0: it is in the prompt only)."""

    def __init__(self, prompt: Iterable[int]) -> None:
        tokens = list(dict.fromkeys(prompt))
        self._place = {token: place for place, token in enumerate(tokens)}
        self._tokens: Tokens = np.array(tokens, dtype=np.int64)
        self._counts: Tokens = np.zeros(len(tokens), dtype=np.int64)

    def add(self, token: int) -> None:
        """Counts a generated token; the arrays double where they are full, so it costs the same at any length."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            room = max(16, place)
            self._tokens = np.concatenate([self._tokens, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.int64)])
        self._tokens[place] = token
        self._counts[place] += 1

    def copy(self) -> TokenCounts:
        twin = copy.copy(self)
        twin._place, twin._tokens, twin._counts = self._place.copy(), self._tokens.copy(), self._counts.copy()
        return twin

    @property
    def tokens(self) -> Tokens:
        return self._tokens[: len(self._place)]

    @property
    def generated(self) -> Tokens:
        """One count per entry of `tokens`."""
        return self._counts[: len(self._place)]


def penalised(params: SamplingParams) -> bool:
    """Whether the tokens of the sequence change the logits of the next one."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
