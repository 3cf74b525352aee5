"""Runners of a few lines, for tests of everything above them: the next token follows from the sequence, no model.

They keep what they were fed as a cache would, one by request and one by block, so that a chunk at the wrong position,
or a token computed without those before it, is an error of the test and not a different answer. Not a test itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.model.batch import FIXED_ROWS, Batch, Chunk, StepError, StepResult
from server.records import Batching, TokenLogprobs

VOCABULARY = 1000
REPETITIVE = 900
"""A sequence that begins with this token goes in circles of PERIOD tokens, and breaks out of them now and then."""
PERIOD = 5


def next_token(tokens: Sequence[int]) -> int:
    """What the scripted model says after these tokens: a number that depends on all of them."""
    number = sum((place + 1) * token for place, token in enumerate(tokens)) * 31 + len(tokens)
    if tokens[0] == REPETITIVE and len(tokens) > PERIOD and number % 8:
        return tokens[-PERIOD]
    return number % VOCABULARY


def expected_answer(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens after a prompt, computed the slow way."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def scored(tokens: Sequence[int], start: int) -> list[TokenLogprobs]:
    """What the scripted model gives for logprobs: numbers that say which token was scored, and at which position."""
    return [TokenLogprobs(-float(token), (start + place,), (0.0,)) for place, token in enumerate(tokens)]


def read_out(chunk: Chunk, tokens: Sequence[int], result: StepResult) -> None:
    """Puts into the result what is asked of a chunk; tokens: the sequence's up to the chunk's end."""
    if chunk.score is not None:
        scores = scored(chunk.score.tokens, chunk.end - chunk.scored - (chunk.draw is not None) + 1)
        result.prompt_logprobs[chunk.request_id] = scores
    if chunk.draw is not None:
        known = len(tokens) - chunk.drafted
        drawn = chunk.kept([next_token(tokens[:end]) for end in range(known, len(tokens) + 1)])
        result.tokens[chunk.request_id] = drawn
        if chunk.draw.params.logprobs is not None:
            result.logprobs[chunk.request_id] = scored(drawn, known)


class ScriptedRunner:
    batching: Batching = "packed"
    decoder_prompt: tuple[int, ...] = ()
    shares_blocks = False
    switch_length: int | None = None
    fixed_rows: int | None = None

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.cached: dict[str, list[int]] = {}
        self.fail_next: Exception | None = None
        self.poisoned: set[str] = set()
        """Requests whose rows come back as errors."""

    def step(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        result = StepResult()
        for chunk in batch.chunks:
            cached = self.cached.setdefault(chunk.request_id, [])
            if len(cached) != chunk.start:
                raise StepError(f"{chunk.request_id} continues at {chunk.start}, but {len(cached)} tokens are cached")
            cached.extend(chunk.tokens)
            if chunk.request_id in self.poisoned:
                result.errors[chunk.request_id] = "a scripted error"
                continue
            read_out(chunk, cached, result)
        return result

    def release(self, request_id: str) -> None:
        self.cached.pop(request_id, None)


class PagedScriptedRunner:
    """Keeps in each slot of a block all the tokens that what a layer stores there depends on, and who wrote it in which
    way: sequences of more than `switch_length` tokens are computed in another.

    A step that fails, as a whole or for one request, leaves garbage where it wrote.
    """

    batching: Batching = "packed"
    decoder_prompt: tuple[int, ...] = ()
    shares_blocks = True
    fixed_rows: int | None = FIXED_ROWS

    def __init__(self, block_tokens: int, switch_length: int | None = None) -> None:
        self.block_tokens = block_tokens
        self.switch_length = switch_length
        self.slots: dict[tuple[int, int], tuple[int, ...] | None] = {}
        self.writers: dict[tuple[int, int], str] = {}
        self.switched: dict[tuple[int, int], bool] = {}
        self.poisoned: set[str] = set()
        """Requests whose rows come back as errors."""
        self.computed_tokens = 0

    def step(self, batch: Batch) -> StepResult:
        result = StepResult()
        for chunk in batch.chunks:
            tokens = self.read(chunk.blocks, chunk.start, switched=chunk.switched)
            for position, token in enumerate(chunk.tokens, start=chunk.start):
                tokens = (*tokens, token)
                slot = self.slot(chunk.blocks, position)
                self.slots[slot] = None if chunk.request_id in self.poisoned else tokens
                self.writers[slot] = chunk.request_id
                self.switched[slot] = chunk.switched
            self.computed_tokens += len(chunk.tokens)
            if chunk.request_id in self.poisoned:
                result.errors[chunk.request_id] = "a scripted error"
                continue
            read_out(chunk, tokens, result)
        return result

    def spoil(self, batch: Batch) -> None:
        """What a step leaves that failed as a whole."""
        for chunk in batch.chunks:
            for position in range(chunk.start, chunk.end):
                self.slots[self.slot(chunk.blocks, position)] = None

    def read(self, blocks: Sequence[int], count: int, *, switched: bool) -> tuple[int, ...]:
        """The first `count` tokens of who has these blocks; an error where a slot was filled after others, or in the
        other way.
        """
        if count == 0:
            return ()
        tokens = self.slots[self.slot(blocks, count - 1)]
        assert tokens is not None, "garbage is read"
        for position in range(count):
            slot = self.slot(blocks, position)
            assert (self.slots[slot], self.switched[slot]) == (tokens[: position + 1], switched)
        return tokens

    def slot(self, blocks: Sequence[int], position: int) -> tuple[int, int]:
        return blocks[position // self.block_tokens], position % self.block_tokens

    def release(self, request_id: str) -> None:
        """What is in the blocks stays."""
