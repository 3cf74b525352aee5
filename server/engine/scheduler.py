"""Who runs in the next step, and with how many tokens. No torch, no clock, no sockets: lists and counting.

First come, first served, in two queues that together stay in order of arrival:

    running  [ s1 s2 s3 ]    hold blocks for every token they have computed
    waiting  [ s4 s5 ... ]   hold none

A step's tokens are given out in this order: one to each running sequence that decodes, then to prefills, oldest
first, in chunks of what the budget leaves, then to newcomers. A newcomer is admitted when the blocks for all its
tokens are free, and one more for each sequence already running, so that it isn't thrown out again at once.

Blocks are not reserved for tokens that a sequence may never generate. When a decode needs a block and none is free,
the youngest running sequence goes back to the head of the waiting queue and loses its blocks; later its tokens are
computed anew (none is drawn anew). The oldest is never a victim of another, and the pool holds at least one sequence
of the greatest length, so somebody always gets on and everybody ends.
"""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import msgspec

from server.engine.blocks import BlockPool
from server.errors import ConfigError, RequestError
from server.model.batch import Batch, Chunk, Draw, Score, StepResult
from server.model.history import History
from server.records import FinishReason, Generate, SequenceOutput

_SEED_BITS: Final = 64


@dataclass(slots=True, eq=False)
class Sequence:
    """Everything the engine knows of one request."""

    request: Generate
    tokens: list[int]
    """The prompt, then what was generated."""
    seed: int
    stop_ids: frozenset[int]
    history: History | None
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    scored: int = 0
    """Prompt tokens whose logprobs have been reported; they are not computed again after a preemption."""

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the next one can be drawn; 1 for a sequence that decodes."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Scheduler:
    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_sequences: int, max_model_len: int) -> None:
        """Raises ConfigError where the limits contradict each other."""
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ConfigError(
                f"max_sequences is {max_sequences} and max_batch_tokens {max_batch_tokens}; accepted is "
                "1 <= max_sequences <= max_batch_tokens, so that every running sequence gets a token in every step"
            )
        if pool.blocks_for(max_model_len) > pool.total:
            raise ConfigError(
                f"a sequence of max_model_len {max_model_len} needs {pool.blocks_for(max_model_len)} KV blocks, "
                f"and the cache has {pool.total}; lower max_model_len or raise kv_cache_tokens"
            )
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preempted: list[str] = []
        """Requests that lost their blocks in the last `schedule`; a runner may hold state for them."""
        self._sequences: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def holds(self, request_id: str) -> bool:
        """Whether a request of this id is open."""
        return request_id in self._sequences

    def add(self, request: Generate) -> None:
        """Puts a request at the end of the waiting queue; raises RequestError for one that can never be served."""
        length, limit = len(request.prompt), request.sampling.max_tokens
        if self.holds(request.request_id):
            raise RequestError(f"request id {request.request_id!r} is in use; each open request needs its own")
        if length < 1 or limit < 1:
            raise RequestError(f"the prompt has {length} tokens and max_tokens is {limit}; both must be 1 or more")
        if length + limit > self.max_model_len:
            raise RequestError(
                f"the prompt has {length} tokens and max_tokens is {limit}; together they may be {self.max_model_len}"
            )
        seed = request.sampling.seed
        sequence = Sequence(
            request=request,
            tokens=list(request.prompt),
            seed=secrets.randbits(_SEED_BITS) if seed is None else seed,
            stop_ids=frozenset(request.sampling.stop_token_ids),
            history=History.needed(request.sampling, request.prompt),
        )
        self._sequences[request.request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> SequenceOutput | None:
        """Ends a request between steps; None for an id that is not here, because it may just have ended."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        return self._end(sequence, "abort")

    def schedule(self) -> Batch | None:
        """Chooses the chunks of the next step and gives them their blocks; None where there is nothing to do."""
        self.preempted.clear()
        budget = self.max_batch_tokens
        chunks: list[Chunk] = []
        for sequence in self.running.copy():
            if sequence.remaining == 1 and self._grow(sequence):
                chunks.append(_chunk(sequence, 1))
                budget -= 1
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                chunks.append(_chunk(sequence, min(sequence.remaining, budget)))
                budget -= len(chunks[-1].tokens)
        while budget > 0 and not self.preempted and (newcomer := self._admit()) is not None:
            chunks.append(_chunk(newcomer, min(newcomer.remaining, budget)))
            budget -= len(chunks[-1].tokens)
        return Batch(tuple(chunks)) if chunks else None

    def apply(self, batch: Batch, result: StepResult) -> list[SequenceOutput]:
        """Takes in what a step computed: sequences grow by their new token, and those that are done end."""
        outputs: list[SequenceOutput] = []
        for chunk in batch.chunks:
            sequence = self._sequences[chunk.request_id]
            sequence.computed = chunk.end
            if chunk.request_id in result.errors:
                sentence, refused = result.errors[chunk.request_id], chunk.request_id in result.refused
                outputs.append(self._end(sequence, "error", error=sentence, refused=refused))
                continue
            sequence.scored += chunk.scored
            if chunk.draw is not None:
                outputs.append(_with_logprobs(self._append(sequence, result.tokens[chunk.request_id]), result))
            elif chunk.scored:
                outputs.append(_with_logprobs(SequenceOutput(chunk.request_id), result))
        return outputs

    def fail(self, batch: Batch, sentence: str) -> list[SequenceOutput]:
        """Ends every request of a batch whose step failed; the others stay as they are."""
        return [self._end(self._sequences[chunk.request_id], "error", error=sentence) for chunk in batch.chunks]

    def _grow(self, sequence: Sequence) -> bool:
        """Sees to it that the sequence's blocks hold all its tokens; False where it was itself thrown out for that."""
        if not sequence.blocks:
            return False  # thrown out a moment ago, for an older one
        needed = self.pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        while needed > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.take(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preempted.append(sequence.request.request_id)

    def _admit(self) -> Sequence | None:
        """The head of the waiting queue, made running with blocks for all its tokens; None while it must wait."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        needed = self.pool.blocks_for(len(self.waiting[0].tokens))
        if needed + len(self.running) > self.pool.free:
            return None
        sequence = self.waiting.popleft()
        sequence.blocks += self.pool.take(needed)
        self.running.append(sequence)
        return sequence

    def _append(self, sequence: Sequence, token: int) -> SequenceOutput:
        sequence.tokens.append(token)
        if sequence.history is not None:
            sequence.history.append(token)
        if token in sequence.stop_ids:
            return self._end(sequence, "stop", token)
        if sequence.generated >= sequence.request.sampling.max_tokens:
            return self._end(sequence, "length", token)
        return SequenceOutput(sequence.request.request_id, token_ids=(token,))

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token: int | None = None,
        error: str | None = None,
        *,
        refused: bool = False,
    ) -> SequenceOutput:
        """The one way out: leaves its queue, gives its blocks back, and says why."""
        request_id = sequence.request.request_id
        del self._sequences[request_id]
        if sequence.blocks:
            self.running.remove(sequence)
            self.pool.give_back(sequence.blocks)
        else:
            self.waiting.remove(sequence)
        tokens = () if token is None else (token,)
        return SequenceOutput(request_id, token_ids=tokens, finish_reason=reason, error=error, refused=refused)


def _with_logprobs(output: SequenceOutput, result: StepResult) -> SequenceOutput:
    own, prompt = result.logprobs.get(output.request_id), result.prompt_logprobs.get(output.request_id, ())
    if own is None and not prompt:
        return output
    return msgspec.structs.replace(output, logprobs=() if own is None else (own,), prompt_logprobs=tuple(prompt))


def _chunk(sequence: Sequence, count: int) -> Chunk:
    """The next `count` tokens of a sequence; they draw where they reach its last one."""
    end = sequence.computed + count
    draw = None
    if end == len(sequence.tokens):
        draw = Draw(sequence.request.sampling, sequence.seed, sequence.generated, sequence.history)
    return Chunk(
        request_id=sequence.request.request_id,
        tokens=tuple(sequence.tokens[sequence.computed : end]),
        start=sequence.computed,
        blocks=tuple(sequence.blocks),
        draw=draw,
        score=_score(sequence, end),
    )


def _score(sequence: Sequence, end: int) -> Score | None:
    """The prompt tokens that the logits of a chunk up to `end` score for the first time: each row scores the next."""
    top = sequence.request.sampling.prompt_logprobs
    if top is None:
        return None
    tokens = sequence.request.prompt[max(sequence.computed, sequence.scored) + 1 : end + 1]
    return Score(tokens, top) if tokens else None
