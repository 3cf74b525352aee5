"""What `batch_invariant` costs: tokens a second of the same model with it and without, on a CPU.

    python -m benchmarks.batch_invariance [--rounds 7] [--threads N] [--directory DIR]

Each contender is a process of its own that has loaded the same checkpoint (1.1 billion random parameters, TinyLlama's
shape, NF4 with double quantization) into the server's runner and answers one question at a time; they take turns, in
another order every round, and medians are reported. Decoding starts after 16 tokens. That the tokens are the same is a
test (tests/server/test_batch_invariance.py). Results: benchmarks/results/batch_invariance.*.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks import RESULTS
from benchmarks.child import Child
from benchmarks.hardware import describe, load_line, machine_line
from benchmarks.load_memory import make_checkpoint
from benchmarks.model_speed import DECODE_TOKENS, OURS, PREFILL_TOKENS, start_ours

MODELS: Final = ("halfbyte nf4-dq", "halfbyte nf4-dq, int8 head")
TASKS: Final = {
    f"decode {sequences}": (f"decode {sequences} {DECODE_TOKENS}", sequences * DECODE_TOKENS)
    for sequences in (1, 2, 3, 4, 8, 16)
} | {f"prefill {PREFILL_TOKENS}": (f"prefill {PREFILL_TOKENS}", PREFILL_TOKENS)}
"""What a child is asked, and how many tokens that is."""


@dataclass(frozen=True)
class Result:
    """Tokens a second of every run, without the setting and with it."""

    model: str
    task: str
    without: list[float]
    invariant: list[float]

    @property
    def cost(self) -> float:
        """How much longer a token takes with the setting: 0.1 is a tenth."""
        return statistics.median(self.without) / statistics.median(self.invariant) - 1


def measure(model: str, children: list[Child], rounds: int) -> list[Result]:
    """children: one without the setting, one with it."""
    results = [Result(model, task, [], []) for task in TASKS]
    for number in range(rounds):
        for result, (question, tokens) in zip(results, TASKS.values(), strict=True):
            runs = list(zip(children, (result.without, result.invariant), strict=True))
            for child, speeds in runs if number % 2 else reversed(runs):
                speeds.append(round(tokens / float(child.ask(question)), 2))
            print(
                f"{model:28} {result.task:12} {result.without[-1]:8.2f} {result.invariant[-1]:8.2f} tok/s", flush=True
            )
    return results


def table(results: list[Result]) -> str:
    lines = [
        "# What `batch_invariant` costs on a CPU, tokens a second",
        "",
        "A 1.1-billion-parameter Llama; medians of alternating runs, each contender a process of its own. Made by",
        "`python -m benchmarks.batch_invariance`.",
        "",
        "| model | task | without | with | longer by |",
        "|---|---|---:|---:|---:|",
    ]
    for one in results:
        without, invariant = (statistics.median(runs) for runs in (one.without, one.invariant))
        lines.append(f"| {one.model} | {one.task} | {without:.1f} | {invariant:.1f} | {100 * one.cost:.0f} % |")
    return "\n".join([*lines, "", load_line(), machine_line()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--directory", type=Path, help="where the checkpoint is, or is kept")
    parser.add_argument("--dry", action="store_true", help="print, and write no result files")
    arguments = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = make_checkpoint(arguments.directory or Path(temporary))
        for model in MODELS:
            settings = [OURS[model] | {"batch_invariant": invariant} for invariant in (False, True)]
            children = [start_ours(checkpoint, options, arguments.threads) for options in settings]
            results += measure(model, children, arguments.rounds)
            for child in children:
                child.end()
    print(table(results))
    if not arguments.dry:
        RESULTS.mkdir(exist_ok=True)
        record = {"machine": describe(), "results": [asdict(result) for result in results]}
        (RESULTS / "batch_invariance.json").write_text(json.dumps(record) + "\n")
        (RESULTS / "batch_invariance.md").write_text(table(results))


if __name__ == "__main__":
    main()
