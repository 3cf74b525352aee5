"""A prefix that many requests share: the first token of the first of them, against that of the later ones.

One request at a time, so that nothing but the prefix decides. Each adds a few words of its own to the prefix.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from benchmarks.serve.client import Answer, ask
from benchmarks.serve.load import REQUEST_SECONDS, body, quantile
from benchmarks.serve.prompts import prompt
from benchmarks.serve.servers import COMPLETIONS, HOST, Running

REQUESTS: Final = 32
OWN_WORDS: Final = 8
ANSWER_TOKENS: Final = 8


@dataclass(frozen=True)
class SharedPrefix:
    """Seconds to the first token; `number` says which prefix it was."""

    server: str
    number: int
    requests: int
    prompt_tokens: int
    first: float
    later_p50: float
    later_p95: float
    later_most: float
    cached_tokens: int
    """Fewest that the server said it had found in its cache, of the later requests; 0 where it says nothing."""


def measure_prefix(running: Running, prefix: str, *, number: int, requests: int = REQUESTS) -> SharedPrefix:
    """`requests` requests one after the other. Raises RuntimeError where one fails."""
    answers = asyncio.run(_ask_all(running, [prefix + prompt(OWN_WORDS, f"{number} own {i}") for i in range(requests)]))
    bad = next((answer.error for answer in answers if answer.error), None)
    if bad or not all(answer.pieces for answer in answers):
        raise RuntimeError(f"a request with the shared prefix failed: {bad or 'no text came'}")
    first, *later = [answer.pieces[0] - answer.sent for answer in answers]
    return SharedPrefix(
        server=running.contestant.name,
        number=number,
        requests=requests,
        prompt_tokens=answers[0].prompt_tokens,
        first=round(first, 4),
        later_p50=round(quantile(later, 0.5), 4),
        later_p95=round(quantile(later, 0.95), 4),
        later_most=round(max(later), 4),
        cached_tokens=min(answer.cached_tokens for answer in answers[1:]),
    )


async def _ask_all(running: Running, texts: list[str]) -> list[Answer]:
    bodies = [body(running, text, ANSWER_TOKENS) for text in texts]
    return [await ask(HOST, running.port, COMPLETIONS, one, REQUEST_SECONDS) for one in bodies]
