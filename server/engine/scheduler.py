"""Who runs in the next step, and with how many tokens. No torch, no clock, no sockets: lists and counting.

Two queues, each in order of rank:

    running  [ s1 s3 s4 ]    hold blocks for every token they have
    waiting  [ s2 s5 ... ]   hold none

A request's rank is the time it came, plus PRIORITY_SECONDS for each step of its priority (lower is earlier, as in
vLLM). So among equals it is first come, first served, and a request can be overtaken only by those that come within a
fixed time after it: it does not starve, and a rank never changes. Who runs isn't thrown out to let a newcomer in.

A step's tokens are given out in this order: one to each running sequence that decodes, then, by rank, to prefills in
chunks of what the budget leaves; those that wait are admitted as their turn comes. Where somebody decodes the budget is
half of max_batch_tokens, or more where many do. A newcomer is admitted when the blocks for all its tokens are free,
and one more for each sequence already running, so that it isn't thrown out again at once. Blocks that still hold its
beginning are shared instead of computed, but never all of it: the last token's logits are needed. A block can be found
by others once the step that filled it was taken in without an error.

What is left of the budget then may go to guesses (lookup.py) of what the sequences that decode say next, on blocks that
are free, so they displace nobody. When the step is taken in, blocks beyond what came true are given back.

A model may compute sequences beyond some length in another way, all of their tokens (server/model/rope.py). One that
grows beyond it waits again and is computed anew, and its blocks have other names from then on.

Blocks are not reserved for tokens that a sequence may never generate. When a decode needs a block and none is free,
the running sequence of the last rank waits again and loses its blocks; later its tokens are computed anew, as far as
they aren't found (none is drawn anew). The first in rank is never a victim of another, and the pool holds at least
one sequence of the greatest length, so somebody always gets on and everybody ends.
"""

from __future__ import annotations

import secrets
from bisect import insort
from collections.abc import Iterator
from typing import Final

import msgspec

from server.engine.blocks import BlockPool
from server.engine.lookup import Lookup
from server.engine.prefix import PrefixNames
from server.engine.sequence import Sequence, Tokens
from server.errors import ConfigError, RequestError
from server.model.batch import FIXED_ROWS, Batch, Chunk, StepResult
from server.model.history import History
from server.records import GUESSED_ROWS, FinishReason, Generate, SequenceOutput

PRIORITY_SECONDS: Final = 10.0
"""How much later a request of the next priority may come and still be served first."""
TOKENS_BESIDE: Final = 6
"""A step may have so many tokens for each sequence that decodes in it, where that is more than half of the most: many
sequences end often, and for each a prompt comes."""
_SEED_BITS: Final = 64


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
        prefix_caching: bool = True,
        speculative_tokens: int = 0,
    ) -> None:
        """Raises ConfigError where the limits contradict each other."""
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ConfigError(
                f"max_sequences is {max_sequences} and max_batch_tokens {max_batch_tokens}; accepted is "
                "1 <= max_sequences <= max_batch_tokens, so that every running sequence gets a token in every step"
            )
        if pool.blocks_for(max_model_len) > pool.total:
            raise ConfigError(
                f"a sequence of max_model_len {max_model_len} needs {pool.blocks_for(max_model_len)} KV blocks, "
                f"and the cache has {pool.total}; lower max_model_len or raise kv_cache.tokens"
            )
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self.prefix_caching = prefix_caching
        """Whether blocks are shared and found again; to be changed before the first request only."""
        self.speculative_tokens = speculative_tokens
        """How many tokens are guessed at most, per sequence and step; to be changed before the first request only."""
        self.fixed_rows = FIXED_ROWS
        """Of the runner, by which guesses are weighed."""
        self.switch_length: int | None = None
        """The runner's; to be changed before the first request only."""
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preempted: list[str] = []
        """Requests that lost their blocks in the last `schedule`; a runner may hold state for them."""
        self.queried_tokens = 0
        """Prompt tokens of requests that first ran in the last `schedule`, and were looked for in the cache."""
        self.hit_tokens = 0
        """How many of those were found."""
        self.accepted_tokens = 0
        """How many tokens of the last `apply` had been guessed."""
        self._sequences: dict[str, Sequence] = {}
        self._names = PrefixNames(pool.block_tokens)
        self._added = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def holds(self, request_id: str) -> bool:
        """Whether a request of this id is open."""
        return request_id in self._sequences

    def add(self, request: Generate, now: float) -> None:
        """Lets a request wait for its turn; raises RequestError for one that can never be served.

        now: seconds by the clock that deadlines are of; it never runs backwards.
        """
        length, limit = len(request.prompt), request.sampling.max_tokens
        if self.holds(request.request_id):
            raise RequestError(f"request id {request.request_id!r} is in use; each open request needs its own")
        if length < 1 or limit < 1:
            raise RequestError(f"the prompt has {length} tokens and max_tokens is {limit}; both must be 1 or more")
        if length + limit > self.max_model_len:
            raise RequestError(
                f"the prompt has {length} tokens and max_tokens is {limit}; together they may be {self.max_model_len}"
            )
        seed, switched = request.sampling.seed, self._is_beyond(length)
        sequence = Sequence(
            request=request,
            tokens=list(request.prompt),
            seed=secrets.randbits(_SEED_BITS) if seed is None else seed,
            stop_ids=frozenset(request.sampling.stop_token_ids),
            arrived=now,
            rank=(now + PRIORITY_SECONDS * request.priority, self._added),
            names=self._names.start(request.cache_salt, switched=switched),
            switched=switched,
            history=History.needed(request.sampling, request.prompt[request.encoder_tokens :]),
            lookup=Lookup(),
        )
        self._added += 1
        self._sequences[request.request_id] = sequence
        insort(self.waiting, sequence, key=_rank)

    def abort(self, request_id: str) -> SequenceOutput | None:
        """Ends a request between steps; None for an id that is not here, because it may just have ended."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        return self._end(sequence, "abort")

    def expire(self, now: float) -> list[SequenceOutput]:
        """Ends, between steps, the requests whose deadline has come, whether they wait or run."""
        late = [
            sequence
            for sequence in self._sequences.values()
            if sequence.request.deadline is not None and sequence.request.deadline <= now
        ]
        return [self._end(sequence, "timeout", error=sequence.too_late(now)) for sequence in late]

    def schedule(self) -> Batch | None:
        """Chooses the chunks of the next step and gives them their blocks; None where there is nothing to do."""
        self.preempted.clear()
        self.queried_tokens = self.hit_tokens = self.accepted_tokens = 0
        decoding = [sequence for sequence in self.running.copy() if sequence.remaining == 1 and self._grow(sequence)]
        most = self._step_tokens(len(decoding))
        budget = most - len(decoding)
        chunks: list[Chunk] = []
        prefills = self._prefills()
        while budget > 0 and (prefill := next(prefills, None)) is not None:
            chunks.append(prefill.chunk(min(prefill.remaining, budget)))
            budget -= len(chunks[-1].tokens)
        drafts = self._drafts(decoding, most - budget, budget)
        decodes = (sequence.chunk(1, draft) for sequence, draft in zip(decoding, drafts, strict=True))
        return Batch((*decodes, *chunks)) if decoding or chunks else None

    def apply(self, batch: Batch, result: StepResult) -> list[SequenceOutput]:
        """Takes in what a step computed: sequences grow by their new token, and those that are done end."""
        outputs: list[SequenceOutput] = []
        has_logprobs = bool(result.logprobs or result.prompt_logprobs)
        for chunk in batch.chunks:
            sequence = self._sequences[chunk.request_id]
            if chunk.request_id in result.errors:
                sentence, refused = result.errors[chunk.request_id], chunk.request_id in result.refused
                outputs.append(self._end(sequence, "error", error=sentence, refused=refused))
                continue
            sequence.scored += chunk.scored
            if chunk.draw is not None:
                output = self._append(sequence, chunk, result.tokens[chunk.request_id])
                outputs.append(_with_logprobs(output, result) if has_logprobs else output)
                continue
            sequence.computed = chunk.end
            self._name_blocks(sequence)
            if chunk.scored:
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
        if needed <= 0:
            return True
        while needed > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(self.pool.take(needed))
        return True

    def _step_tokens(self, decoding: int) -> int:
        """Tokens of the next step at most: fewer where somebody in the middle of an answer waits for its end."""
        if not decoding:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, max(self.max_batch_tokens // 2, TOKENS_BESIDE * decoding))

    def _drafts(self, decoding: list[Sequence], rows: int, budget: int) -> list[list[int]]:
        """Guesses for each of these sequences, from the first in rank on, as far as they pay and there is room."""
        if not self.speculative_tokens or rows > GUESSED_ROWS:
            return [[] for _ in decoding]
        budget = min(budget, GUESSED_ROWS - rows)
        drafts = []
        for sequence in decoding:
            drafts.append(self._draft(sequence, rows, budget))
            budget -= len(drafts[-1])
        return drafts

    def _draft(self, sequence: Sequence, rows: int, budget: int) -> list[int]:
        """Guesses for one sequence, with blocks for them; none for its first token, and its last one is never one."""
        blocks, pool, length = sequence.blocks, self.pool, len(sequence.tokens)
        rest = sequence.request.sampling.max_tokens - sequence.generated - 1
        if self.switch_length is not None and not sequence.switched:
            rest = min(rest, self.switch_length - length)  # what comes behind is drawn in the other way
        if rest < 1 or not sequence.generated:
            return []
        room = (len(blocks) + pool.free) * pool.block_tokens - length
        count = sequence.lookup.worth(rows, min(self.speculative_tokens, rest, budget, room), self.fixed_rows)
        draft = sequence.lookup.guess(sequence.tokens, max(count, 1))[:count]
        blocks.extend(pool.take(max(0, pool.blocks_for(length + len(draft)) - len(blocks))))
        return draft

    def _preempt(self, sequence: Sequence) -> None:
        self._wait_again(sequence)
        self.preempted.append(sequence.request.request_id)

    def _wait_again(self, sequence: Sequence) -> None:
        """Out of the running ones, without blocks; all its tokens are to be computed anew."""
        self.running.remove(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.computed = 0
        insort(self.waiting, sequence, key=_rank)

    def _is_beyond(self, tokens: int) -> bool:
        return self.switch_length is not None and tokens > self.switch_length

    def _prefills(self) -> Iterator[Sequence]:
        """By rank, who has more than one token to compute; who waits is admitted when its turn comes, if it can be."""
        unfinished = [sequence for sequence in reversed(self.running) if sequence.remaining > 1]
        while True:
            is_next = self.waiting and (not unfinished or self.waiting[0].rank < unfinished[-1].rank)
            newcomer = self._admit() if is_next and not self.preempted else None
            if newcomer is not None:
                yield newcomer
            elif unfinished:
                yield unfinished.pop()
            else:
                return

    def _admit(self) -> Sequence | None:
        """The head of the waiting queue, made running with blocks for all its tokens; None while it must wait."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        pool, sequence = self.pool, self.waiting[0]
        shared = self._cached_beginning(sequence)
        needed = pool.blocks_for(len(sequence.tokens)) - len(shared)
        if needed + pool.unheld(shared) + len(self.running) > pool.free:
            return None
        del self.waiting[0]
        insort(self.running, sequence, key=_rank)
        pool.hold(shared)  # first, so that none of them is taken for the rest
        sequence.blocks.extend(shared)
        sequence.blocks.extend(pool.take(needed))
        sequence.named = len(shared)
        sequence.computed = len(shared) * pool.block_tokens
        if sequence.reused is None:
            sequence.reused = sequence.computed
            if self._is_looked_for(sequence):
                self.queried_tokens += len(sequence.tokens)
                self.hit_tokens += sequence.computed
        return sequence

    def _is_looked_for(self, sequence: Sequence) -> bool:
        """Not a prompt that is scored: its logits are wanted, and those are not in the cache."""
        return self.prefix_caching and sequence.request.sampling.prompt_logprobs is None

    def _cached_beginning(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the sequence's first tokens, as far as there are any; at least one token is left."""
        if not self._is_looked_for(sequence):
            return []
        blocks = (len(sequence.tokens) - 1) // self.pool.block_tokens
        self._names.extend(sequence.names, sequence.tokens, blocks)
        return self.pool.find(sequence.names[1 : blocks + 1])

    def _name_blocks(self, sequence: Sequence) -> None:
        """Lets others find the blocks that have become full."""
        full = sequence.computed // self.pool.block_tokens
        if full == sequence.named or not self.prefix_caching:
            return
        self._names.extend(sequence.names, sequence.tokens, full)
        for block in range(sequence.named, full):
            self.pool.name(sequence.blocks[block], sequence.names[block + 1])
        sequence.named = full

    def _append(self, sequence: Sequence, chunk: Chunk, drawn: Tokens) -> SequenceOutput:
        """The sequence grows by what was drawn, up to where it ends; what its blocks hold beyond that is forgotten."""
        tokens, reason = sequence.up_to_its_end(drawn)
        sequence.lookup.learn(tokens)
        if chunk.drafted:
            self.accepted_tokens += sum(1 for guess, token in zip(chunk.draft, tokens, strict=False) if guess == token)
        sequence.tokens += tokens
        if sequence.history is not None:
            for token in tokens:
                sequence.history.append(token)
        sequence.computed = len(sequence.tokens) - 1
        self._name_blocks(sequence)
        if reason is not None:
            return self._end(sequence, reason, tokens)
        if not sequence.switched and self._is_beyond(len(sequence.tokens)):
            sequence.switched = True
            sequence.names = self._names.start(sequence.request.cache_salt, switched=True)
            self._wait_again(sequence)
            return sequence.output(tokens)
        if chunk.drafted:  # else none were taken beyond its tokens
            self._give_back_spare(sequence)
        return sequence.output(tokens)

    def _give_back_spare(self, sequence: Sequence) -> None:
        """The blocks that were taken for guesses, where they did not come true."""
        spare = sequence.blocks[self.pool.blocks_for(len(sequence.tokens)) :]
        if spare:
            del sequence.blocks[-len(spare) :]
            self.pool.give_back(spare)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        tokens: Tokens = (),
        error: str | None = None,
        *,
        refused: bool = False,
    ) -> SequenceOutput:
        """The one way out: leaves its queue, gives its blocks back, and says why."""
        del self._sequences[sequence.request.request_id]
        if reason == "error" and not refused:
            self.pool.forget(sequence.blocks)  # what else went wrong with it, nobody knows
        if sequence.blocks:
            self.running.remove(sequence)
            self.pool.give_back(sequence.blocks)
        else:
            self.waiting.remove(sequence)
        return sequence.output(tokens, reason, error, refused=refused)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


def _with_logprobs(output: SequenceOutput, result: StepResult) -> SequenceOutput:
    own, prompt = result.logprobs.get(output.request_id, ()), result.prompt_logprobs.get(output.request_id, ())
    if not own and not prompt:
        return output
    kept = len(output.token_ids)
    return msgspec.structs.replace(output, logprobs=tuple(own[:kept]), prompt_logprobs=tuple(prompt))
