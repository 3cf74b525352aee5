"""What passes between the engine's loop and a runner: the work of one step, and what came of it.

A chunk is a run of tokens of one sequence that this step computes; a decode is a chunk of one token, a prefill one
or more chunks of many. Plain Python, no torch: the scheduler builds batches and its tests never load a model.

    sequence tokens   t0 t1 t2 t3 t4 t5 t6 t7
                      |- computed -|- chunk -|        start = 4, tokens = (t4 .. t7)
                                          `-- the last token of all: its logits choose t8, so `sampling` is set
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.records import SamplingParams


class StepError(Exception):
    """A step that failed as a whole, with one sentence for everyone who took part in it."""


def failure_sentence(error: Exception) -> str:
    """What a request is told of an error that nobody foresaw: one line; the traceback is in the log."""
    return f"the model failed in a step of this request ({type(error).__name__}: {error})".splitlines()[0]


@dataclass(frozen=True, slots=True)
class Draw:
    """How a chunk's next token is chosen: the request's parameters, its seed, and which of its tokens this is."""

    params: SamplingParams
    seed: int
    """The request's own seed, or a random one that it keeps; 64 bits."""
    index: int
    """0 for the first generated token; the random number is a function of seed and index alone."""


@dataclass(frozen=True, slots=True)
class Chunk:
    request_id: str
    tokens: Sequence[int]
    start: int
    """Position of the first token in its sequence; everything before it is in the cache."""
    blocks: Sequence[int]
    """The sequence's cache blocks in order; they cover at least start + len(tokens) positions."""
    draw: Draw | None
    """None while the chunk does not reach the sequence's last token."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_decode(self) -> bool:
        return len(self.tokens) == 1 and self.draw is not None and self.draw.index > 0


@dataclass(frozen=True, slots=True)
class Batch:
    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def decode_tokens(self) -> int:
        """Chunks that do nothing but extend a sequence by one token."""
        return sum(1 for chunk in self.chunks if chunk.is_decode)


@dataclass(slots=True)
class StepResult:
    """What a runner made of a batch. Every chunk that draws appears in exactly one of the two dictionaries."""

    tokens: dict[str, int] = field(default_factory=dict)
    """The next token by request id."""
    errors: dict[str, str] = field(default_factory=dict)
    """One sentence by request id; may also name chunks that draw nothing. The others of the batch are unharmed."""
    forward_passes: int = 1


class Runner(Protocol):
    """Computes batches. It knows sequences by request id and cache blocks, and nothing of queues or sockets."""

    def step(self, batch: Batch) -> StepResult:
        """Runs every chunk of the batch and draws where asked; raises StepError where the step failed as a whole."""
        ...

    def release(self, request_id: str) -> None:
        """Forgets what it may hold of a sequence that ended or that will be computed anew; unknown ids are ignored."""
        ...
