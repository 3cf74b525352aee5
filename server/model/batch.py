"""What passes between the engine's loop and a runner: the work of one step, and what came of it.

A chunk is a run of tokens of one sequence that this step computes; a decode is a chunk of one token, a prefill one
or more chunks of many. No torch: the scheduler builds batches and its tests never load a model. What is made by the
hundred in each step is a struct of msgspec, which is made in a tenth of the time of a frozen dataclass.

    sequence tokens   t0 t1 t2 t3 t4 t5 t6 t7
                      |- computed -|- chunk -|        start = 4, tokens = (t4 .. t7)
                                          `-- the last token of all: its logits choose t8, so `draw` is set

A chunk that draws may go on with drafted tokens, guesses of what will be drawn. Each row from the last known token on
then draws the token after it, as if the guesses before had come true, and what was drawn counts as long as they did:

    t7 | d8 d9     draws a, b, c        a != d8: a is t8           a = d8, b != d9: t8 = a, t9 = b        all three
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from server.model.history import History
from server.records import Batching, SamplingParams, TokenLogprobs

FIXED_ROWS: Final = 4
FIXED_ROWS_ON_TILES: Final = 24
"""How many rows cost as much as reading the weights: of 1.1 billion parameters in 4 bits, on two cores, without
AMX a step of eight sequences takes 69 ms and one of a single sequence 28, so a row takes 6 ms and the rest 22; with AMX
44 and 34 (benchmarks/results/model_speed.md). Where rows cost less than that (int8), less is guessed than would pay."""


class StepError(Exception):
    """A step that failed as a whole, with one sentence for everyone who took part in it."""


def failure_sentence(error: Exception) -> str:
    """What a request is told of an error that nobody foresaw. Its words may name paths and code; the log has them."""
    return f"the model failed in a step of this request ({type(error).__name__}); the engine's log has the details"


class Draw(msgspec.Struct, frozen=True):
    """How a chunk's next token is chosen: the request's parameters, its seed, and which of its tokens this is."""

    params: SamplingParams
    seed: int
    """The request's own seed, or a random one that it keeps; 64 bits."""
    index: int
    """0 for the first generated token; the random number is a function of seed and index alone."""
    history: History | None = None
    """The sequence's tokens as far as they change its logits; None where the parameters ask for nothing of the kind."""


class Score(msgspec.Struct, frozen=True):
    """Prompt tokens whose logprobs are wanted: those that follow the chunk's last `len(tokens)` rows.

    Where the chunk also draws, its last row is the draw's, and the tokens follow the rows before it.
    """

    tokens: Sequence[int]
    top: int
    """How many of the likeliest tokens come with each."""


class Chunk(msgspec.Struct, frozen=True):
    request_id: str
    tokens: Sequence[int]
    start: int
    """Position of the first token in its sequence; everything before it is in the cache."""
    blocks: Sequence[int]
    """The sequence's cache blocks in order; they cover at least start + len(tokens) positions."""
    draw: Draw | None
    """None while the chunk does not reach the sequence's last token."""
    score: Score | None = None
    """None where no prompt token's logprob hangs on this chunk."""
    encoder_tokens: int = 0
    """How many of the sequence's first tokens an encoder reads; the others are a decoder's."""
    drafted: int = 0
    """How many of `tokens`, at their end, are guesses. None without a draw, nor beside a score."""
    switched: bool = False
    """Whether its sequence has more tokens than the runner's `switch_length`."""

    @property
    def draft(self) -> Sequence[int]:
        return self.tokens[len(self.tokens) - self.drafted :]

    @property
    def draws(self) -> int:
        """Rows that draw a token."""
        return 0 if self.draw is None else 1 + self.drafted

    def each_draw(self) -> Iterator[Draw]:
        """One per row that draws: the numbers go on, and each history has the guesses before it, in a copy."""
        draw = self.draw
        if draw is None:
            return
        yield draw
        for token in self.draft:
            history = None if draw.history is None else draw.history.followed_by(token)
            draw = Draw(draw.params, draw.seed, draw.index + 1, history)
            yield draw

    def kept(self, drawn: Sequence[int]) -> Sequence[int]:
        """Of one token per row that draws: those behind guesses that all came true."""
        for place, (guess, token) in enumerate(zip(self.draft, drawn, strict=False)):
            if guess != token:
                return drawn[: place + 1]
        return drawn

    def one_by_one(self) -> Iterator[Chunk]:
        """The same work in chunks of one token each, in order; only for chunks without guesses."""
        unwanted = len(self.tokens) - self.wanted
        for place, token in enumerate(self.tokens):
            score = None
            if self.score is not None and unwanted <= place < unwanted + self.scored:
                score = Score(self.score.tokens[place - unwanted :][:1], self.score.top)
            draw = self.draw if place == len(self.tokens) - 1 else None
            yield msgspec.structs.replace(self, tokens=(token,), start=self.start + place, draw=draw, score=score)

    @property
    def scored(self) -> int:
        """Rows whose logits score a prompt token."""
        return len(self.score.tokens) if self.score is not None else 0

    @property
    def wanted(self) -> int:
        """Rows whose logits are wanted; they are the last of the chunk."""
        return self.draws if self.score is None else self.scored + self.draws

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_decode(self) -> bool:
        return len(self.tokens) == 1 + self.drafted and self.draw is not None and self.draw.index > 0


class Batch(msgspec.Struct, frozen=True):
    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def decode_tokens(self) -> int:
        """Chunks that do nothing but extend a sequence; drafted tokens are counted apart."""
        return sum(1 for chunk in self.chunks if chunk.is_decode)

    @property
    def drafted_tokens(self) -> int:
        return sum(chunk.drafted for chunk in self.chunks)

    def passes(self, scored_rows: int) -> list[Batch]:
        """Batches to run one after the other, each of at most `scored_rows` scored rows; mostly just this one.

        A chunk that has more is cut; its pieces follow each other, so each finds those before it in the cache.
        """
        if all(chunk.score is None for chunk in self.chunks):
            return [self]
        passes: list[list[Chunk]] = [[]]
        room = scored_rows
        for chunk in self.chunks:
            rest = chunk
            while rest.scored > room:
                if room:
                    piece, rest = _cut(rest, room)
                    passes[-1].append(piece)
                passes.append([])
                room = scored_rows
            passes[-1].append(rest)
            room -= rest.scored
        return [Batch(tuple(chunks)) for chunks in passes]


def _cut(chunk: Chunk, scored: int) -> tuple[Chunk, Chunk]:
    """A chunk up to the end of its first `scored` scored rows, and the rest, in which there are more."""
    rows = len(chunk.tokens) - chunk.wanted + scored
    tokens, top = (chunk.score.tokens, chunk.score.top) if chunk.score is not None else ((), 0)
    first = msgspec.structs.replace(chunk, tokens=chunk.tokens[:rows], draw=None, score=Score(tokens[:scored], top))
    rest = msgspec.structs.replace(
        chunk, tokens=chunk.tokens[rows:], start=chunk.start + rows, score=Score(tokens[scored:], top)
    )
    return first, rest


@dataclass(slots=True)
class StepResult:
    """What a runner made of a batch. Every chunk that draws appears in exactly one of the two dictionaries."""

    tokens: dict[str, Sequence[int]] = field(default_factory=dict)
    """The next tokens by request id: one, and one more for each guess of a draft that came true."""
    errors: dict[str, str] = field(default_factory=dict)
    """One sentence by request id; may also name chunks that draw nothing. The others of the batch are unharmed."""
    refused: set[str] = field(default_factory=set)
    """Those of `errors` that their own request is to blame for."""
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    """One per token of `tokens`, where the request asks for them."""
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    """One per token of the chunk's `score`."""
    forward_passes: int = 1


class Runner(Protocol):
    """Computes batches. It knows sequences by request id and cache blocks, and nothing of queues or sockets."""

    decoder_prompt: tuple[int, ...]
    """What an encoder-decoder's answers begin after, in the place of their prompt; empty for all others."""
    batching: Batching
    shares_blocks: bool
    """Whether what it caches is in the blocks, all of it, so that another sequence may go on from full ones."""
    switch_length: int | None
    """How many tokens a sequence may have before it is computed in another way, all of it; None where its length makes
    no difference."""
    fixed_rows: int | None
    """How many rows cost as much as a step costs without any, by which guesses are weighed. None where chunks may not
    have drafted tokens; elsewhere what is cached of wrong guesses is overwritten, and never read."""

    def step(self, batch: Batch) -> StepResult:
        """Runs every chunk of the batch and draws where asked; raises StepError where the step failed as a whole."""
        ...

    def release(self, request_id: str) -> None:
        """Forgets what it may hold of a sequence that ended or that will be computed anew; unknown ids are ignored."""
        ...
