"""A soak: requests of all kinds, clients that leave, engines that are killed, and the count of both sides.

    python -m benchmarks.soak [--requests 10000 | --seconds S] [--rate R] [--kills 2] [--clients 24]
        [--model DIR] [--quantization nf4] [--cache-tokens 2048] [--seed N] [--results FILE] [--dry]

Serves the demo model, or DIR, with a small cache, so that sequences give way to each other. Clients send each request
until it has its end: an answer, its deadline, or they leave. The engine is killed by SIGKILL when a fifth and two
fifths of the soak are over (a third for one kill), so that the last life is the longest. In the end every request
must have ended exactly once, both sides must have counted the same, and no block may be in use. Exit code 1 where any
of that fails; how much memory the processes took from when they were warm to their end is reported, and what the
engine's ledger said all the while. Results: benchmarks/results/soak.*, or FILE and a page beside it.

An hour of memory alone, on a machine that has other things to do: --seconds 3600 --rate 1 --kills 0
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from benchmarks import RESULTS
from benchmarks.serve.load import ready
from benchmarks.serve.servers import HALFBYTE, HOST, Contestant, Running
from benchmarks.soak.attempt import Attempt, attempt
from benchmarks.soak.counts import Count, Series, compare, read_series
from benchmarks.soak.pace import Pace
from benchmarks.soak.report import KEPT_SAMPLES, write
from benchmarks.soak.requests import make_request
from benchmarks.soak.watch import Growth, Sample, engine_of, growths, take
from server.demo import DEMO_MODEL_PATH

MODEL: Final = "soaked"
REQUESTS: Final = 10_000
SEQUENCES: Final = 16
QUEUED: Final = 4
"""Beside the running ones; with more clients than places some are refused because the server is full."""
SAMPLE_SECONDS: Final = 2.0
"""At least; of a longer soak no more samples are taken than are kept."""
LONGEST_PAUSE: Final = 1.0
"""Seconds before a refused request is sent again, whatever the server says: a restart takes a few of these."""
SETTLE_SECONDS: Final = 30.0
REST_SECONDS: Final = 3.0
"""Without requests, after which an engine has looked at what it holds at rest (server/engine/loop.py)."""


@dataclass
class Soak:
    """What has happened, and in the end what it came to."""

    pace: Pace
    kills: int
    attempts: list[Attempt] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    ended: Counter[int] = field(default_factory=Counter)
    """By request: how often it has ended."""
    killed: int = 0
    counts: list[Count] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    """A sentence for every sample that could not be taken."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.samples[-1].seconds if self.samples else 0.0

    @property
    def problems(self) -> list[str]:
        """A sentence for everything that must not be."""
        found = [
            f"request {a.request.number} ({a.request.kind}): {a.problem}" for a in self.attempts if a.end == "wrong"
        ]
        found += [f"request {n} ended {self.ended[n]} times" for n in range(self.pace.begun) if self.ended[n] != 1]
        names = Counter(name for one in self.attempts for name in one.ids)
        found += [f"{count} answers have the name {name}" for name, count in names.items() if count > 1]
        found += [
            f"{one.what}: the server counts {one.server}, the client {one.least} to {one.most}"
            for one in self.counts
            if not one.agrees
        ]
        found += self.unseen
        if self.killed != self.kills:
            found.append(f"{self.killed} engines were killed, where {self.kills} were to be")
        return found


def server_under_soak(model: Path, quantization: str = "nf4", cache_tokens: int = 2048) -> Contestant:
    """Ours, with less room than the clients want."""
    command = [str(HALFBYTE), "serve", str(model), "--name", MODEL, "--host", HOST, "--port", "{port}"]
    command += ["--quantization", quantization, "--kv-cache-tokens", str(cache_tokens)]
    command += ["--max-sequences", str(SEQUENCES), "--max-queued-requests", str(QUEUED), "--log-level", "warning"]
    return Contestant("soak", command, MODEL)


async def soak(running: Running, soaked: Soak, *, clients: int, seed: int) -> None:
    """Sends everything, samples and kills on the way, then compares the counts of a server that has come to rest."""
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{running.port}", timeout=60) as scraper:
        before = read_series((await scraper.get("/metrics")).text)
        await asyncio.sleep(REST_SECONDS)
        soaked.pace.begin()
        watching = asyncio.create_task(_watch(running, scraper, soaked))
        killing = asyncio.create_task(_kill(running, soaked))
        await asyncio.gather(*(_client(running, soaked, seed) for _ in range(clients)))
        for task in (watching, killing):
            task.cancel()
        for task in (watching, killing):
            with contextlib.suppress(asyncio.CancelledError):
                await task
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            series = await _sample(running, scraper, soaked)
            soaked.counts = compare(soaked.attempts, before, series, soaked.killed)
            if all(one.agrees for one in soaked.counts) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(REST_SECONDS)
        await _sample(running, scraper, soaked)
    soaked.growths = growths(soaked.samples)


async def _client(running: Running, soaked: Soak, seed: int) -> None:
    while (number := await soaked.pace.next()) is not None:
        request = make_request(MODEL, seed, number)
        while (found := await attempt(running.port, request)).end == "refused":
            soaked.attempts.append(found)
            await asyncio.sleep(min(LONGEST_PAUSE, found.retry_after or 0.1))
        soaked.attempts.append(found)
        soaked.ended[number] += 1


async def _watch(running: Running, scraper: httpx.AsyncClient, soaked: Soak) -> None:
    while True:
        try:
            await _sample(running, scraper, soaked)
        except httpx.HTTPError as error:
            soaked.unseen.append(f"/metrics did not answer after {soaked.pace.elapsed:.0f} s: {error!r}")
        await asyncio.sleep(max(SAMPLE_SECONDS, (soaked.pace.seconds or 0) / KEPT_SAMPLES))


async def _sample(running: Running, scraper: httpx.AsyncClient, soaked: Soak) -> Series:
    series = read_series((await scraper.get("/metrics")).text)
    soaked.samples.append(take(running.process.pid, series, soaked.pace.elapsed, soaked.ended.total()))
    return series


async def _kill(running: Running, soaked: Soak) -> None:
    """One life after the other, while requests are open."""
    last = 0
    for number in range(soaked.kills):
        while soaked.pace.done(soaked.ended.total()) < (number + 1) / (2 * soaked.kills + 1):
            await asyncio.sleep(0.01)
        while (engine := engine_of(running.process.pid)) in (0, last):
            await asyncio.sleep(0.01)
        os.kill(engine, signal.SIGKILL)
        last = engine
        soaked.killed += 1


def run(server: Contestant, soaked: Soak, *, clients: int, seed: int) -> None:
    """A whole soak on a server of its own."""
    with ready(server) as (running, _):
        asyncio.run(soak(running, soaked, clients=clients, seed=seed))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--requests", type=int, help=f"how many; {REQUESTS} where nothing is said")
    length.add_argument("--seconds", type=float, help="how long, instead of how many")
    parser.add_argument("--rate", type=float, default=math.inf, help="requests a second at most; without it, no limit")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_PATH)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--cache-tokens", type=int, default=2048, help="at least one sequence of the model's length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "soak.json", metavar="FILE")
    parser.add_argument("--dry", action="store_true", help="print, and write no result files")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.rate <= 0:
        parser.error(f"--rate is {arguments.rate}; accepted are positive numbers")
    if arguments.seconds is None and arguments.requests is None:
        arguments.requests = REQUESTS
    return arguments


def command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """What to type for the same soak, as far as it is not the default; without this machine's paths."""
    words = ["python", "-m", "benchmarks.soak"]
    for name, value in vars(arguments).items():
        if value != parser.get_default(name) and name not in ("results", "dry"):
            shown = value.name if isinstance(value, Path) else f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{name.replace('_', '-')}", shown]
    return shlex.join(words)


def main() -> None:
    parser = make_parser()
    arguments = parse(parser)
    soaked = Soak(Pace(arguments.requests, arguments.seconds, arguments.rate), arguments.kills)
    server = server_under_soak(arguments.model, arguments.quantization, arguments.cache_tokens)
    run(server, soaked, clients=arguments.clients, seed=arguments.seed)
    print(write(soaked, command(parser, arguments), None if arguments.dry else arguments.results))
    sys.exit(1 if soaked.problems else 0)


if __name__ == "__main__":
    main()
