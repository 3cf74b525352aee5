"""A runner of a few lines, for tests of everything above it: the next token follows from the sequence, no model.

It keeps what it was fed by request, as a cache would, so that a chunk at the wrong position, or a token computed
without those before it, is an error of the test and not a different answer. Not a test itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.model.batch import Batch, StepError, StepResult
from server.records import TokenLogprobs

VOCABULARY = 1000


def next_token(tokens: Sequence[int]) -> int:
    """What the scripted model says after these tokens: a number that depends on all of them."""
    return (sum((place + 1) * token for place, token in enumerate(tokens)) * 31 + len(tokens)) % VOCABULARY


def expected_answer(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens after a prompt, computed the slow way."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def scored(tokens: Sequence[int], start: int) -> list[TokenLogprobs]:
    """What the scripted model gives for logprobs: numbers that say which token was scored, and at which position."""
    return [TokenLogprobs(-float(token), (start + place,), (0.0,)) for place, token in enumerate(tokens)]


class ScriptedRunner:
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
            if chunk.score is not None:
                scores = scored(chunk.score.tokens, chunk.end - chunk.scored - (chunk.draw is not None) + 1)
                result.prompt_logprobs[chunk.request_id] = scores
            if chunk.draw is not None:
                token = result.tokens[chunk.request_id] = next_token(cached)
                if chunk.draw.params.logprobs is not None:
                    (result.logprobs[chunk.request_id],) = scored([token], len(cached))
        return result

    def release(self, request_id: str) -> None:
        self.cached.pop(request_id, None)
