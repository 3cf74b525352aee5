"""Everything the engine knows of one request, and what is made of it for the runner and for who asked. No torch.

What becomes of it, and when, is the scheduler's.
"""

from __future__ import annotations

from array import array
from collections import abc
from dataclasses import dataclass, field

from server.engine.lookup import Lookup
from server.model.batch import Chunk, Draw, Score
from server.model.history import History
from server.records import FinishReason, Generate, SequenceOutput

Tokens = abc.Sequence[int]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, from the time it came to its end."""

    request: Generate
    tokens: list[int]
    """The prompt, then what was generated."""
    seed: int
    stop_ids: frozenset[int]
    history: History | None
    lookup: Lookup
    arrived: float
    rank: tuple[float, int]
    """Lower is served first; no two are equal."""
    names: list[bytes]
    """What its full blocks are called, as far as anybody asked (prefix.py)."""
    switched: bool
    """Whether it has more tokens than the scheduler's `switch_length`."""
    blocks: array[int] = field(default_factory=lambda: array("q"))
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    named: int = 0
    """While it runs: blocks, from the first on, that the pool was told the names of."""
    reused: int | None = None
    """Prompt tokens that were found in the cache when the sequence first ran; None before that."""
    scored: int = 0
    """Prompt tokens whose logprobs have been reported; they are not computed again after a preemption."""

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the next one can be drawn; 1 for a sequence that decodes."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def chunk(self, count: int, draft: Tokens = ()) -> Chunk:
        """The next `count` tokens, which draw where they reach the last one, and guesses behind that."""
        end = self.computed + count
        draw = None
        if end == len(self.tokens):
            draw = Draw(self.request.sampling, self.seed, self.generated, self.history)
        return Chunk(
            request_id=self.request.request_id,
            tokens=(*self.tokens[self.computed : end], *draft),
            start=self.computed,
            blocks=self.blocks[:],
            draw=draw,
            encoder_tokens=self.request.encoder_tokens,
            score=self._score(end),
            drafted=len(draft),
            switched=self.switched,
        )

    def _score(self, end: int) -> Score | None:
        """The prompt tokens that the logits of a chunk up to `end` score for the first time: a row scores the next."""
        top = self.request.sampling.prompt_logprobs
        if top is None:
            return None
        tokens = self.request.prompt[max(self.computed, self.scored) + 1 : end + 1]
        return Score(tokens, top) if tokens else None

    def up_to_its_end(self, drawn: Tokens) -> tuple[Tokens, FinishReason | None]:
        """As many of the drawn tokens as it takes, and why it ends with the last of them, if it does."""
        rest = self.request.sampling.max_tokens - self.generated
        if len(drawn) < rest and self.stop_ids.isdisjoint(drawn):
            return drawn, None
        kept = drawn[:rest]
        place = next((place for place, token in enumerate(kept, start=1) if token in self.stop_ids), None)
        return (kept, "length") if place is None else (kept[:place], "stop")

    def output(
        self,
        tokens: Tokens,
        reason: FinishReason | None = None,
        error: str | None = None,
        *,
        refused: bool = False,
    ) -> SequenceOutput:
        """What is reported of it when these tokens have been appended."""
        return SequenceOutput(
            self.request.request_id,
            token_ids=tuple(tokens),
            finish_reason=reason,
            error=error,
            refused=refused,
            cached_tokens=self.reused if self.reused and tokens and self.generated == 1 else 0,
        )

    def too_late(self, now: float) -> str:
        """The sentence for one whose deadline has come."""
        return (
            f"the request's time was up, {now - self.arrived:.3g} seconds after it had reached the engine, with "
            f"{self.generated} of at most {self.request.sampling.max_tokens} tokens generated"
        )
