"""What the engine itself costs in a step that decodes: everything around the model's forward call.

    python -m benchmarks.engine_overhead [--sequences 16 256] [--context 512] [--steps 300] [--threads N] [--dry]

The real loop, scheduler and paged runner serve requests with a model of a few lines, an embedding and a head over a
small vocabulary, whose own time is taken out. Reports are encoded and written to another process, as to the server.

    schedule   who runs, with which blocks           sample   logits to tokens
    prepare    filling the runner's input buffers    apply    sequences grow, outputs are made
                                                     rest     the loop, the report, and writing it

Not in it: what attention makes of a batch for its kernels once per step, and what a larger vocabulary costs to sample.
Steps are single samples, and medians are reported. Results: benchmarks/results/engine_overhead.*.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import IO, Any, Final

import torch

from benchmarks import RESULTS
from benchmarks.hardware import describe, machine_line
from server.engine.blocks import BlockPool
from server.engine.loop import EngineLoop
from server.engine.scheduler import Scheduler
from server.model.batch import Batch, StepResult
from server.model.paged_cache import PagedCache
from server.model.runner import PagedRunner
from server.records import Generate, SamplingParams, SequenceOutput, Shutdown, StepReport, ToEngine, encode_frame

VOCABULARY: Final = 512
TARGETS: Final = {16: 1.0, 256: 3.0}
"""Milliseconds per step, by sequences."""
PARTS: Final = ("schedule", "prepare", "sample", "apply", "rest")
WARM_UP_STEPS: Final = 50


class FewLines(torch.nn.Module):
    """An embedding and a head; it notes when its forward call begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY, bias=False)
        self.began = self.ended = 0.0

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.began = time.perf_counter()
        logits = self.head(self.embedding(input_ids[:, logits_to_keep]))
        self.ended = time.perf_counter()
        return SimpleNamespace(logits=logits)


class TimedScheduler(Scheduler):
    seconds = 0.0
    """Of the last `schedule`."""
    apply_seconds = 0.0

    def schedule(self) -> Batch | None:
        began = time.perf_counter()
        batch = super().schedule()
        self.seconds = time.perf_counter() - began
        return batch

    def apply(self, batch: Batch, result: StepResult) -> list[SequenceOutput]:
        began = time.perf_counter()
        outputs = super().apply(batch, result)
        self.apply_seconds = time.perf_counter() - began
        return outputs


class TimedRunner(PagedRunner):
    began = ended = 0.0

    def step(self, batch: Batch) -> StepResult:
        self.began = time.perf_counter()
        result = super().step(batch)
        self.ended = time.perf_counter()
        return result


@dataclass(frozen=True)
class Result:
    """Median milliseconds of a step's parts, and of their sum."""

    sequences: int
    context: int
    parts: dict[str, float]
    overhead: float
    slowest_tenth: float
    """Where the slowest tenth of the steps begins."""


def measure(sequences: int, context: int, steps: int, sink: IO[bytes]) -> Result:
    """Decodes `steps` tokens of each of so many sequences, whose prompts have `context` tokens."""
    tokens = WARM_UP_STEPS + steps
    length = context + tokens
    pool = BlockPool(sequences * (-(-length // 16) + 1))
    limits = {"max_batch_tokens": max(2048, sequences), "max_sequences": sequences, "max_model_len": length}
    scheduler = TimedScheduler(pool, **limits)
    model: Any = FewLines().eval()
    runner = TimedRunner(model, PagedCache([], pool.total), **limits)
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    last = 0.0

    def report(record: StepReport) -> None:
        nonlocal last
        sink.write(encode_frame(record))
        sink.flush()
        now = time.perf_counter()
        if record.decode_tokens == sequences:
            found = {
                "schedule": scheduler.seconds,
                "prepare": model.began - runner.began,
                "sample": runner.ended - model.ended,
                "apply": scheduler.apply_seconds,
            }
            found["rest"] = now - last - (model.ended - model.began) - sum(found.values())
            for part, seconds in found.items():
                samples[part].append(1000 * seconds)
        if not scheduler.has_work:
            inbox.put(Shutdown())
        last = time.perf_counter()

    for number in range(sequences):
        prompt = tuple((number + 7 * place) % VOCABULARY for place in range(context))
        inbox.put(Generate(str(number), prompt, SamplingParams(max_tokens=tokens, temperature=0.0)))
    loop = EngineLoop(scheduler, runner, inbox, report, vocab_size=VOCABULARY)
    gc.collect()
    gc.freeze()
    loop.run()
    sums = [sum(parts) for parts in zip(*samples.values(), strict=True)][WARM_UP_STEPS // 2 :]
    return Result(
        sequences,
        context,
        {part: round(statistics.median(values[WARM_UP_STEPS // 2 :]), 3) for part, values in samples.items()},
        round(statistics.median(sums), 3),
        round(statistics.quantiles(sums, n=10)[-1], 3),
    )


def table(results: list[Result]) -> str:
    lines = [
        "# What the engine costs in a step, milliseconds",
        "",
        "Decode steps without the model's forward call, medians. Made by `python -m benchmarks.engine_overhead`.",
        "",
        f"| sequences | context | {' | '.join(PARTS)} | all | slowest tenth from | target |",
        "|---|---|" + "---:|" * (len(PARTS) + 3),
    ]
    for result in results:
        target = f"{TARGETS[result.sequences]:.1f}" if result.sequences in TARGETS else ""
        parts = " | ".join(f"{result.parts[part]:.2f}" for part in PARTS)
        lines.append(
            f"| {result.sequences} | {result.context} | {parts} | {result.overhead:.2f} | {result.slowest_tenth:.2f} "
            f"| {target} |"
        )
    load = f"{torch.get_num_threads()} threads, load average at the end {os.getloadavg()[0]:.1f}."
    lines += ["", load, machine_line()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry", action="store_true", help="print, and write no result files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
        if reader.stdin is None:
            raise RuntimeError("the reading process was started without the pipe that was asked for")
        results = [measure(count, arguments.context, arguments.steps, reader.stdin) for count in arguments.sequences]
    print(table(results))
    if not arguments.dry:
        RESULTS.mkdir(exist_ok=True)
        record = {"machine": describe(), "results": [asdict(result) for result in results]}
        (RESULTS / "engine_overhead.json").write_text(json.dumps(record) + "\n")
        (RESULTS / "engine_overhead.md").write_text(table(results))


if __name__ == "__main__":
    main()
