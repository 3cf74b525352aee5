"""Load on our server and on its peers: tokens a second, latencies, memory; and what a shared prefix saves.

    python -m benchmarks.serve [--llama-server BINARY --gguf-python PYTHON] [--vllm PYTHON [--vllm-dtype D]]
        [--transformers-serve PYTHON] [--rounds 2] [--concurrency 1 4 16 64] [--shared-prefix] [--directory DIR]
        [--resume]

Every server loads the same checkpoint (checkpoint.py, made under DIR), and they take turns, one at a time. The bare
runner, our engine without server and scheduler, runs a single stream beside them. Peers that are not named are left
out; each has an environment of its own. Results: benchmarks/results/serve.*, written after every level, so that
--resume goes on where a run was stopped.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import RESULTS
from benchmarks.serve.bare_runner import bare_runner
from benchmarks.serve.checkpoint import make_checkpoint, make_gguf
from benchmarks.serve.load import measure, ready
from benchmarks.serve.prefix import measure_prefix
from benchmarks.serve.prompts import prompt
from benchmarks.serve.results import Results, tables
from benchmarks.serve.servers import (
    CACHE_TOKENS,
    OURS,
    VLLM_DTYPES,
    Contestant,
    llama_server,
    ours,
    transformers_serve,
    vllm,
)
from server.text.tokenizer import Tokenizer

LOADS: Final = (1, 4, 16, 64)
WAVES: Final = 4
"""How many times as many requests a load has as there are at a time."""
PREFIX_TOKENS: Final = 1000
PREFIXES: Final = 3
"""Different prefixes, one after the other, on one server."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    concurrency: tuple[int, ...]
    rounds: int
    words: int
    tokens: int
    prefix_tokens: int
    """How long the shared prefix is; with 0 none is measured."""


def contestants(arguments: argparse.Namespace, checkpoint: Path) -> list[Contestant]:
    """Ours, then the peers that the command line names."""
    threads = len(os.sched_getaffinity(0))
    found = [ours(name, checkpoint, quantization) for name, quantization in OURS.items()]
    if arguments.llama_server is not None:
        file = make_gguf(checkpoint, "q4_0", arguments.gguf_python)
        found.append(llama_server(arguments.llama_server, file, threads))
    if arguments.vllm is not None:
        found.append(vllm(arguments.vllm, checkpoint, threads, arguments.vllm_dtype))
    if arguments.transformers_serve is not None:
        found.append(transformers_serve(arguments.transformers_serve, checkpoint))
    return found


def requests_of(concurrency: int) -> int:
    return WAVES * concurrency


def measure_server(contestant: Contestant, plan: Plan, results: Results, number: int) -> None:
    """The levels that this round lacks of one server."""
    loads = [load for load in plan.concurrency if not results.has(contestant.name, load, number)]
    if not loads:
        return
    with ready(contestant) as (running, seconds):
        for load in loads:
            level = measure(
                running,
                load,
                requests_of(load),
                words=plan.words,
                tokens=plan.tokens,
                number=number,
                ready_seconds=seconds,
            )
            results.add(level)


def measure_bare(
    name: str, checkpoint: Path, quantization: dict[str, Any], plan: Plan, results: Results, number: int
) -> None:
    """The one level that a bare runner has."""
    if results.has(name, 1, number):
        return
    with bare_runner(checkpoint, quantization) as runner:
        runner.measure(name, 1, words=plan.words, tokens=4, number=-1)
        results.add(runner.measure(name, requests_of(1), words=plan.words, tokens=plan.tokens, number=number))


def measure_prefixes(contestant: Contestant, plan: Plan, results: Results, checkpoint: Path) -> None:
    """The prefixes, one after the other, on one server."""
    numbers = [number for number in range(PREFIXES) if not results.has_prefix(contestant.name, number)]
    if not numbers:
        return
    with ready(contestant) as (running, _):
        for number in numbers:
            prefix = long_prefix(checkpoint, number, plan.prefix_tokens)
            results.add_prefix(measure_prefix(running, prefix, number=number))


def long_prefix(checkpoint: Path, number: int, tokens: int) -> str:
    """A text of so many tokens."""
    tokenizer = Tokenizer.from_directory(checkpoint)
    return tokenizer.decode(tokenizer.encode(prompt(tokens, f"prefix {number}"), add_special_tokens=False)[:tokens])


def run(checkpoint: Path, servers: list[Contestant], plan: Plan, results: Results) -> None:
    """All rounds. Who fails is left out from then on, and said to have failed."""
    for number in range(plan.rounds):
        for name, quantization in OURS.items():
            bare = f"bare runner of {name}"
            attempt(results, bare, partial(measure_bare, bare, checkpoint, quantization, plan, results, number))
        for server in servers:
            attempt(results, server.name, partial(measure_server, server, plan, results, number))
    if plan.prefix_tokens:
        for server in servers:
            if server.name in OURS:
                attempt(results, server.name, partial(measure_prefixes, server, plan, results, checkpoint))


def attempt(results: Results, name: str, step: Callable[[], None]) -> None:
    if name in results.failures:
        return
    try:
        step()
    except RuntimeError as error:
        results.fail(name, str(error))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-server", type=Path, metavar="BINARY")
    parser.add_argument("--gguf-python", type=Path, metavar="PYTHON", help="an interpreter that has gguf and numpy")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of the environment that vllm is installed in")
    parser.add_argument("--vllm-dtype", choices=VLLM_DTYPES, default="bf16")
    parser.add_argument("--transformers-serve", type=Path, metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(LOADS))
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shared-prefix", action="store_true", help="measure that too; alone with --rounds 0")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is made, and kept")
    parser.add_argument("--resume", action="store_true", help="go on with the result file as it is")
    parser.add_argument("--results", type=Path, default=RESULTS / "serve.json", metavar="FILE")
    arguments = parser.parse_args()
    if (arguments.llama_server is None) != (arguments.gguf_python is None):
        parser.error("--llama-server and --gguf-python come together")
    return arguments


def main() -> None:
    arguments = parse()
    plan = Plan(
        concurrency=tuple(arguments.concurrency),
        rounds=arguments.rounds,
        words=arguments.words,
        tokens=arguments.tokens,
        prefix_tokens=PREFIX_TOKENS if arguments.shared_prefix else 0,
    )
    settings = {"words": plan.words, "tokens": plan.tokens, "cache_tokens": CACHE_TOKENS}
    if not arguments.resume:
        arguments.results.unlink(missing_ok=True)
    results = Results.resume(arguments.results, settings)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = make_checkpoint(arguments.directory or Path(temporary))
        run(checkpoint, contestants(arguments, checkpoint), plan, results)
    print(tables(results))


if __name__ == "__main__":
    main()
