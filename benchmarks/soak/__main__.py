"""A soak: requests of all kinds, clients that leave, engines that are killed, and the count of both sides.

    python -m benchmarks.soak [--requests 10000] [--kills 2] [--clients 24] [--model DIR] [--seed N] [--dry]

Serves the demo model, or DIR, with a small cache, so that sequences give way to each other. Clients send each request
until it has its end: an answer, its deadline, or they leave. The engine is killed by SIGKILL when a fifth and two
fifths of the requests have ended (a third for one kill), so that the last life is the longest. In the end every request
must have ended exactly once, both sides must have counted the same, and no block may be in use. Exit code 1 where any
of that fails; how much memory the processes took from when they were warm to their end is reported. Results:
benchmarks/results/soak.*.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from benchmarks.serve.load import ready
from benchmarks.serve.servers import HALFBYTE, HOST, Contestant, Running
from benchmarks.soak.attempt import Attempt, attempt
from benchmarks.soak.counts import Count, compare, read_series
from benchmarks.soak.report import write
from benchmarks.soak.requests import make_request
from benchmarks.soak.watch import Growth, Sample, engine_of, growths, take
from server.demo import DEMO_MODEL_PATH

MODEL: Final = "soaked"
CACHE_TOKENS: Final = 2048
SEQUENCES: Final = 16
QUEUED: Final = 4
"""Beside the running ones; with more clients than places some are refused because the server is full."""
SAMPLE_SECONDS: Final = 2.0
LONGEST_PAUSE: Final = 1.0
"""Seconds before a refused request is sent again, whatever the server says: a restart takes a few of these."""
SETTLE_SECONDS: Final = 30.0


@dataclass
class Soak:
    """What has happened, and in the end what it came to."""

    requests: int
    kills: int
    attempts: list[Attempt] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    ended: Counter[int] = field(default_factory=Counter)
    """By request: how often it has ended."""
    killed: int = 0
    seconds: float = 0.0
    counts: list[Count] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """A sentence for everything that must not be."""
        found = [
            f"request {a.request.number} ({a.request.kind}): {a.problem}" for a in self.attempts if a.end == "wrong"
        ]
        found += [f"request {n} ended {self.ended[n]} times" for n in range(self.requests) if self.ended[n] != 1]
        names = Counter(name for one in self.attempts for name in one.ids)
        found += [f"{count} answers have the name {name}" for name, count in names.items() if count > 1]
        found += [
            f"{one.what}: the server counts {one.server}, the client {one.least} to {one.most}"
            for one in self.counts
            if not one.agrees
        ]
        if self.killed != self.kills:
            found.append(f"{self.killed} engines were killed, where {self.kills} were to be")
        return found


def server_under_soak(model: Path) -> Contestant:
    """Ours, with less room than the clients want."""
    command = [str(HALFBYTE), "serve", str(model), "--name", MODEL, "--host", HOST, "--port", "{port}"]
    command += ["--quantization", "nf4", "--kv-cache-tokens", str(CACHE_TOKENS), "--max-sequences", str(SEQUENCES)]
    command += ["--max-queued-requests", str(QUEUED), "--log-level", "warning"]
    return Contestant("soak", command, MODEL)


async def soak(running: Running, soaked: Soak, *, clients: int, seed: int) -> None:
    """Sends everything, samples and kills on the way, then compares the counts of a server that has come to rest."""
    numbers = iter(range(soaked.requests))
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{running.port}", timeout=60) as scraper:
        before = read_series((await scraper.get("/metrics")).text)
        watching = asyncio.create_task(_watch(running, scraper, soaked, began))
        killing = asyncio.create_task(_kill(running, soaked))
        await asyncio.gather(*(_client(running, numbers, soaked, seed) for _ in range(clients)))
        soaked.seconds = time.monotonic() - began
        for task in (watching, killing):
            task.cancel()
        await asyncio.gather(watching, killing, return_exceptions=True)
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            series = read_series((await scraper.get("/metrics")).text)
            soaked.counts = compare(soaked.attempts, before, series, soaked.killed)
            if all(one.agrees for one in soaked.counts) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        soaked.samples.append(take(running.process.pid, series, time.monotonic() - began, soaked.ended.total()))
    soaked.growths = growths(soaked.samples)


async def _client(running: Running, numbers: Iterator[int], soaked: Soak, seed: int) -> None:
    for number in numbers:
        request = make_request(MODEL, seed, number)
        while (found := await attempt(running.port, request)).end == "refused":
            soaked.attempts.append(found)
            await asyncio.sleep(min(LONGEST_PAUSE, found.retry_after or 0.1))
        soaked.attempts.append(found)
        soaked.ended[number] += 1


async def _watch(running: Running, scraper: httpx.AsyncClient, soaked: Soak, began: float) -> None:
    while True:
        series = read_series((await scraper.get("/metrics")).text)
        soaked.samples.append(take(running.process.pid, series, time.monotonic() - began, soaked.ended.total()))
        await asyncio.sleep(SAMPLE_SECONDS)


async def _kill(running: Running, soaked: Soak) -> None:
    """One life after the other, while requests are open."""
    last = 0
    for number in range(soaked.kills):
        while soaked.ended.total() < soaked.requests * (number + 1) // (2 * soaked.kills + 1):
            await asyncio.sleep(0.01)
        while (engine := engine_of(running.process.pid)) in (0, last):
            await asyncio.sleep(0.01)
        os.kill(engine, signal.SIGKILL)
        last = engine
        soaked.killed += 1


def run(model: Path, requests: int, kills: int, *, clients: int, seed: int) -> Soak:
    """A whole soak on a server of its own."""
    soaked = Soak(requests, kills)
    with ready(server_under_soak(model)) as (running, _):
        asyncio.run(soak(running, soaked, clients=clients, seed=seed))
    return soaked


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_PATH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, and write no result files")
    arguments = parser.parse_args()
    soaked = run(arguments.model, arguments.requests, arguments.kills, clients=arguments.clients, seed=arguments.seed)
    print(write(soaked, dry=arguments.dry))
    sys.exit(1 if soaked.problems else 0)


if __name__ == "__main__":
    main()
