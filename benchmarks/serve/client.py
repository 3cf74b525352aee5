"""One process of the load: `python -m benchmarks.serve.client`. Standard library only, so that it starts at once.

    standard input     {"host", "port", "path", "workers", "bodies": [...], "timeout"}, then, when told to, go
    standard output    ready, then {"answers": [Answer, ...], "cpu_seconds": own processor time}

Closed loop: each worker sends the next body when its last answer has ended. Several such processes run side by side,
because one event loop that is busy with a token is late for the next one, and would count that as the server's time.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.serve.sse import BrokenStreamError, StatusError, stream


@dataclass
class Answer:
    """One request as the client saw it; times are time.monotonic, which the processes of a machine share."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    """When each piece of text arrived."""
    ended: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


def text_of(chunk: dict[str, Any]) -> str:
    """The text in a chunk of a completion."""
    return "".join(choice.get("text") or "" for choice in chunk.get("choices") or ())


async def ask(host: str, port: int, path: str, body: dict[str, Any], timeout: float) -> Answer:
    """One streamed completion. What goes wrong is in the answer."""
    answer = Answer(time.monotonic())
    try:
        async with asyncio.timeout(timeout), aclosing(stream(host, port, path, body)) as events:
            async for event in events:
                chunk = event.data or {}
                if "error" in chunk:
                    answer.error = str(chunk["error"])
                if text_of(chunk):
                    answer.pieces.append(event.seconds)
                if usage := chunk.get("usage"):
                    answer.prompt_tokens = usage["prompt_tokens"]
                    answer.completion_tokens = usage["completion_tokens"]
                    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (StatusError, BrokenStreamError) as error:
        answer.error = str(error)
    except TimeoutError:
        answer.error = f"no end after {timeout:.0f} s"
    answer.ended = time.monotonic()
    return answer


async def run(job: dict[str, Any]) -> list[Answer]:
    """All bodies of a job, `workers` at a time."""
    waiting = iter(job["bodies"])

    async def work() -> list[Answer]:
        return [await ask(job["host"], job["port"], job["path"], body, job["timeout"]) for body in waiting]

    parts = await asyncio.gather(*(work() for _ in range(job["workers"])))
    return [answer for part in parts for answer in part]


def main() -> None:
    job = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    sys.stdin.readline()
    before = resource.getrusage(resource.RUSAGE_SELF)
    answers = asyncio.run(run(job))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"answers": [asdict(answer) for answer in answers], "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()
