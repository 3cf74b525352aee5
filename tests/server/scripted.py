"""A runner of a few lines, for tests of everything above it: the next token follows from the sequence, no model.

It keeps what it was fed by request, as a cache would, so that a chunk at the wrong position, or a token computed
without those before it, is an error of the test and not a different answer. Not a test itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.model.batch import Batch, StepError, StepResult

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
            elif chunk.draw is not None:
                result.tokens[chunk.request_id] = next_token(cached)
        return result

    def release(self, request_id: str) -> None:
        self.cached.pop(request_id, None)
