"""Milliseconds of one linear layer on a CPU, beside torch's in bfloat16 and bitsandbytes' own, with cold weights.

    python -m benchmarks.linear_speed [--bitsandbytes DIR] [--shapes 2048x2048 ...] [--rows 1 2 ...] [--rounds 5]

Contenders take turns in a new order each round. Each is a process of its own (linear_side.py), since threads of two
libraries in one process look for work on each other's processors, and has layers that together are larger than any
cache: in a turn one call follows the other, and a weight has left the cache when its turn comes again. Activations are
bfloat16, the layers' compute dtype too; a few columns hold outliers, as those of language models do. Medians over all
calls of wall time; the roof is what torch's sum reads a large tensor with, before the shapes and after each.

bitsandbytes is found in this environment or in DIR (`pip install --no-deps --target DIR bitsandbytes==0.50.2`); without
it its columns stay empty. Results: benchmarks/results/linear_speed.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Final

import torch

from benchmarks import RESULTS
from benchmarks.child import Child
from benchmarks.hardware import describe, machine_line
from benchmarks.linear_side import CONFIGS, THEIRS, TORCH
from quant import native
from server.engine.process import OPENMP_WAITING

PAUSE_SECONDS: Final = 0.03
"""Between two turns: until threads that look for work have gone to sleep."""


@dataclass(frozen=True)
class Result:
    """Median milliseconds of one shape, number of rows and contender."""

    shape: str
    rows: int
    contender: str
    milliseconds: float
    weight_bytes: int
    calls: int


def start(shape: str, directory: str | None) -> dict[str, Child]:
    """Every contender that this machine has, with its layers; ours wait for work as they do in an engine."""
    theirs = os.environ | ({} if directory is None else {"PYTHONPATH": directory})
    ours = os.environ | dict([OPENMP_WAITING])
    probe = [sys.executable, "-c", "import bitsandbytes"]
    found = subprocess.run(probe, env=theirs, capture_output=True, check=False).returncode == 0
    names = [TORCH, *CONFIGS, *(THEIRS if found else ())]
    return {
        name: Child(
            [sys.executable, "-m", "benchmarks.linear_side", name, shape], dict(ours if name in CONFIGS else theirs)
        )
        for name in names
    }


def measure(shape: str, rows: list[int], directory: str | None, rounds: int, seconds: float) -> Iterator[Result]:
    """All contenders on one shape NxK."""
    with ExitStack() as stack:
        children = start(shape, directory)
        for child in children.values():
            stack.callback(child.end)
        for M in rows:
            times: dict[str, list[float]] = {name: [] for name in children}
            sizes: dict[str, int] = {}
            for _ in range(rounds):
                for name in random.sample(list(children), len(children)):
                    time.sleep(PAUSE_SECONDS)
                    answer = json.loads(children[name].ask(f"{M} {seconds}"))
                    times[name] += answer["milliseconds"]
                    sizes[name] = answer["weight_bytes"]
            for name, own in times.items():
                yield Result(shape, M, name, round(statistics.median(own), 4), sizes[name], len(own))


def read_bandwidth() -> float:
    """GB/s of reading half a gigabyte."""
    large = torch.ones(1 << 27)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        large.sum()
        best = min(best, time.perf_counter() - start)
    return large.nbytes / best / 1e9


def table(results: list[Result], bandwidth: float) -> str:
    names = list(dict.fromkeys(result.contender for result in results))
    lines = [
        "# One linear layer on a CPU, cold weights, bfloat16 activations",
        "",
        "Median milliseconds of calls in alternating turns, each contender a process of its own. The last columns: "
        "NF4's bytes a second against the memory's, and how many times faster than bitsandbytes. Made by "
        "`python -m benchmarks.linear_speed`.",
        "",
    ]
    for shape in dict.fromkeys(result.shape for result in results):
        own = [result for result in results if result.shape == shape]
        lines += [
            f"## {shape}",
            "",
            f"| rows | {' | '.join(names)} | nf4 of roof | nf4, times | int8, times |",
            "|---:|" + "---:|" * (len(names) + 3),
        ]
        for M in dict.fromkeys(result.rows for result in own):
            by_name = {result.contender: result for result in own if result.rows == M}
            speed = by_name["nf4"].weight_bytes / by_name["nf4"].milliseconds / 1e6
            lines.append(
                f"| {M} | {' | '.join(f'{by_name[name].milliseconds:.3f}' for name in names)} "
                f"| {speed / bandwidth:.0%} | {_times(by_name, 'nf4')} | {_times(by_name, 'int8')} |"
            )
        lines.append("")
    level = native.kernels("cpu").level
    lines.append(f"Read bandwidth {bandwidth:.1f} GB/s with {torch.get_num_threads()} threads; level {level}.")
    lines.append(f"Load average at the end {os.getloadavg()[0]:.1f}. {machine_line()}")
    return "\n".join(lines) + "\n"


def _times(by_name: dict[str, Result], name: str) -> str:
    theirs = by_name.get(f"bitsandbytes {name}")
    return "" if theirs is None else f"{theirs.milliseconds / by_name[name].milliseconds:.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitsandbytes", metavar="DIR")
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "5632x2048", "2048x5632"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 3, 4, 8, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.15, help="of a turn")
    arguments = parser.parse_args()
    results: list[Result] = []
    bandwidths = [read_bandwidth()]
    for shape in arguments.shapes:
        for result in measure(shape, arguments.rows, arguments.bitsandbytes, arguments.rounds, arguments.seconds):
            print(f"{result.shape} {result.rows:5} {result.contender:22} {result.milliseconds:9.4f} ms", flush=True)
            results.append(result)
        bandwidths.append(read_bandwidth())
    bandwidth = statistics.median(bandwidths)
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": describe(), "read_gb_per_s": bandwidth, "results": [asdict(result) for result in results]}
    (RESULTS / "linear_speed.json").write_text(json.dumps(record) + "\n")
    (RESULTS / "linear_speed.md").write_text(table(results, bandwidth))
    print(table(results, bandwidth))


if __name__ == "__main__":
    main()
