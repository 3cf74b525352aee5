"""Load from several client processes, and what it came to."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from benchmarks.serve.client import Answer, ask
from benchmarks.serve.processes import MemoryWatch
from benchmarks.serve.prompts import prompt
from benchmarks.serve.servers import COMPLETIONS, HOST, READY_SECONDS, Contestant, Running, started

CLIENT_PROCESSES: Final = 4
"""At most; a level of lower concurrency has one for each request at a time."""
REQUEST_SECONDS: Final = 900.0
WARM_UP_REQUESTS: Final = 4
WARM_UP_WORDS: Final = 100
ROOT: Final = Path(__file__).parent.parent.parent
MB: Final = 1e6


@dataclass(frozen=True)
class Level:
    """One server under one load. Seconds; quantiles over requests (first tokens) and over pieces of text (gaps)."""

    server: str
    concurrency: int
    round: int
    requests: int
    prompt_tokens: float
    """Mean of a prompt."""
    tokens_per_second: float
    """All answers' tokens over the time from the first request to the last token."""
    burst_p50: float
    burst_p95: float
    """To the first token of as many requests as there are at a time: the first ones, which all come at once."""
    first_token_p50: float
    first_token_p95: float
    """To the first token of all others, each of which comes when another one ends; NaN where there are none."""
    gap_p50: float
    gap_p95: float
    tokens_per_piece: float
    """1 where each token was sent alone; more where the server sends several at once, which hides gaps."""
    memory_mb: float
    """Largest proportional memory of all server processes."""
    client_cpu: float
    """Processor time of all client processes over the time measured: 1 is one core."""
    ready_seconds: float
    """From the start of the process to the end of a first answer of one token."""


def quantile(values: Sequence[float], part: float) -> float:
    """Nearest rank: the smallest value that `part` of all values do not exceed. NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


def body(running: Running, text: str, tokens: int) -> dict[str, Any]:
    """A greedy completion of exactly so many tokens, streamed."""
    return {
        "model": running.contestant.model,
        "prompt": text,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | running.contestant.fields


@contextmanager
def ready(contestant: Contestant) -> Iterator[tuple[Running, float]]:
    """The server, started and warm, and the seconds from its start to the end of a first answer of one token."""
    began = time.monotonic()
    with started(contestant) as running:
        seconds = wait_ready(running) - began
        texts = [prompt(WARM_UP_WORDS, f"warm-up {i}") for i in range(WARM_UP_REQUESTS)]
        send(running, [body(running, text, 4) for text in texts], WARM_UP_REQUESTS)
        yield running, seconds


def wait_ready(running: Running) -> float:
    """Asks for one token until an answer comes; when it did. Raises RuntimeError."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        answer = asyncio.run(ask(HOST, running.port, COMPLETIONS, body(running, prompt(2, "first"), 1), READY_SECONDS))
        if answer.error is None:
            return answer.ended
        if running.process.poll() is not None:
            raise RuntimeError(f"it ended with {running.process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise RuntimeError(f"it was not ready after {READY_SECONDS:.0f} s: {answer.error}")
        time.sleep(0.1)


def send(running: Running, bodies: list[dict[str, Any]], concurrency: int) -> tuple[list[Answer], float]:
    """All answers, and the clients' processor time; the bodies are dealt out to the client processes."""
    count = min(CLIENT_PROCESSES, concurrency)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client()) for _ in range(count)]
        for which, client in enumerate(clients):
            client.prepare(running, bodies[which::count], len(range(which, concurrency, count)))
        for client in clients:
            client.go()
        records = [client.record() for client in clients]
    answers = [Answer(**answer) for record in records for answer in record["answers"]]
    return answers, sum(record["cpu_seconds"] for record in records)


class Client:
    """One client process, from outside."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.serve.client"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.__exit__(kind, value, trace)

    def prepare(self, running: Running, bodies: list[dict[str, Any]], workers: int) -> None:
        job = {"host": HOST, "port": running.port, "path": COMPLETIONS, "timeout": REQUEST_SECONDS}
        self._write(json.dumps(job | {"workers": workers, "bodies": bodies}) + "\n")

    def go(self) -> None:
        """Once the process has read its job, so that all begin together."""
        self._read()
        self._write("go\n")

    def record(self) -> dict[str, Any]:
        """What it measured."""
        record: dict[str, Any] = json.loads(self._read())
        return record

    def _write(self, text: str) -> None:
        stdin = pipe(self._process.stdin)
        stdin.write(text)
        stdin.flush()

    def _read(self) -> str:
        line = pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"a client process ended with {self._process.wait()}")
        return line


def pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("a process was started without the pipes that were asked for")
    return stream


def measure(
    running: Running, concurrency: int, requests: int, *, words: int, tokens: int, number: int, ready_seconds: float
) -> Level:
    """One level of load. Raises RuntimeError where an answer failed or has another length than was asked for."""
    bodies = [body(running, prompt(words, f"{number} {concurrency} {i}"), tokens) for i in range(requests)]
    with MemoryWatch(running.process.pid) as watch:
        answers, cpu = send(running, bodies, concurrency)
    bad = next((answer.error for answer in answers if answer.error), None)
    lengths = {answer.completion_tokens for answer in answers}
    if bad or lengths != {tokens}:
        raise RuntimeError(f"answers of {sorted(lengths)} tokens, where {tokens} were asked for; {bad}")
    return summarise(answers, cpu, running.contestant.name, concurrency, number, watch.most / MB, ready_seconds)


def summarise(
    answers: list[Answer],
    cpu: float,
    server: str,
    concurrency: int,
    number: int,
    memory_mb: float,
    ready_seconds: float,
) -> Level:
    """What the answers say together."""
    seconds = max(answer.pieces[-1] for answer in answers) - min(answer.sent for answer in answers)
    answers = sorted(answers, key=lambda answer: answer.sent)
    first = [answer.pieces[0] - answer.sent for answer in answers]
    burst, later = first[:concurrency], first[concurrency:]
    gaps = [b - a for answer in answers for a, b in zip(answer.pieces, answer.pieces[1:], strict=False)]
    tokens = sum(answer.completion_tokens for answer in answers)
    return Level(
        server=server,
        concurrency=concurrency,
        round=number,
        requests=len(answers),
        prompt_tokens=round(sum(answer.prompt_tokens for answer in answers) / len(answers), 1),
        tokens_per_second=round(tokens / seconds, 2),
        burst_p50=round(quantile(burst, 0.5), 4),
        burst_p95=round(quantile(burst, 0.95), 4),
        first_token_p50=round(quantile(later, 0.5), 4),
        first_token_p95=round(quantile(later, 0.95), 4),
        gap_p50=round(quantile(gaps, 0.5), 4),
        gap_p95=round(quantile(gaps, 0.95), 4),
        tokens_per_piece=round(tokens / sum(len(answer.pieces) for answer in answers), 2),
        memory_mb=round(memory_mb, 1),
        client_cpu=round(cpu / seconds, 3),
        ready_seconds=round(ready_seconds, 1),
    )
