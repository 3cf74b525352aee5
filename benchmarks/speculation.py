"""What guessing by lookup gives where text repeats itself, and what it costs where it never does, on a CPU.

    python -m benchmarks.speculation [--rounds 5] [--threads N] [--directory DIR]

The checkpoint of benchmarks/load_memory.py (1.1 billion random parameters, TinyLlama's shape) in NF4 with double
quantization answers through the engine's loop, with the default number of guesses and without any, in turns; medians
are reported. Two texts: "repeats", greedy among a few tokens, where a model of random weights soon goes in circles; and
"never repeats", drawn at temperature 1 from the whole vocabulary. What real text gives lies between the two. Results:
benchmarks/results/speculation.*.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
import transformers

from benchmarks import RESULTS
from benchmarks.hardware import describe, load_line, machine_line
from benchmarks.load_memory import make_checkpoint
from quant.config import from_spec
from server.engine.blocks import BlockPool
from server.engine.loop import EngineLoop
from server.engine.scheduler import Scheduler
from server.model.batch import Runner
from server.model.probe import choose_runner, warm_up
from server.records import Generate, ModelSpec, SamplingParams, Shutdown, StepReport, ToEngine

BLOCKS: Final = 512
LENGTH: Final = 256
STEP_TOKENS: Final = 2048
ANSWER_TOKENS: Final = 96
SEQUENCES: Final = (1, 4, 8)
TEXTS: Final = {
    "repeats": SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, allowed_token_ids=tuple(range(100, 108))),
    "never repeats": SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0, seed=1),
}


@dataclass(frozen=True)
class Result:
    """Tokens a second of every run; guesses that were checked and that came true, in one run."""

    text: str
    sequences: int
    without: list[float]
    guessing: list[float]
    checked: int
    accepted: int


def serve(runner: Runner, params: SamplingParams, sequences: int, guesses: int) -> tuple[float, int, int]:
    """Answers so many requests at once; tokens a second after the prompts, guesses checked, guesses that came true."""
    pool = BlockPool(BLOCKS)
    scheduler = Scheduler(
        pool,
        max_batch_tokens=STEP_TOKENS,
        max_sequences=64,
        max_model_len=LENGTH,
        prefix_caching=False,
        speculative_tokens=guesses,
    )
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    reports: list[StepReport] = []
    times: list[float] = []

    def report(record: StepReport) -> None:
        reports.append(record)
        times.append(time.perf_counter())
        if not scheduler.has_work:
            inbox.put(Shutdown())

    for number in range(sequences):
        prompt = tuple(7 + (31 * place + 97 * number) % 20000 for place in range(16))
        inbox.put(Generate(str(number), prompt, params))
    EngineLoop(scheduler, runner, inbox, report, vocab_size=32000).run()
    tokens = sum(len(output.token_ids) for record in reports[1:] for output in record.outputs)
    checked, accepted = (
        sum(getattr(record, name) for record in reports) for name in ("draft_tokens", "accepted_draft_tokens")
    )
    return tokens / (times[-1] - times[0]), checked, accepted


def measure(runner: Runner, rounds: int) -> list[Result]:
    guesses = ModelSpec("", "").speculative_tokens
    results = []
    for text, params in TEXTS.items():
        for sequences in SEQUENCES:
            speeds: dict[int, list[float]] = {0: [], guesses: []}
            counts = (0, 0)
            for number in range(rounds):
                for count in (0, guesses) if number % 2 else (guesses, 0):
                    speed, checked, accepted = serve(runner, params, sequences, count)
                    speeds[count].append(round(speed, 2))
                    if count:
                        counts = checked, accepted
            results.append(Result(text, sequences, speeds[0], speeds[guesses], *counts))
            print(results[-1], flush=True)
    return results


def table(results: list[Result]) -> str:
    lines = [
        "# What guessing by lookup gives and costs on a CPU, tokens a second",
        "",
        "A 1.1-billion-parameter Llama in NF4 with double quantization; medians of alternating runs. Made by",
        "`python -m benchmarks.speculation`.",
        "",
        f"| text | sequences | without | guessing | faster by | checked of {ANSWER_TOKENS} tokens each | came true |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        without, guessing = statistics.median(one.without), statistics.median(one.guessing)
        lines.append(
            f"| {one.text} | {one.sequences} | {without:.1f} | {guessing:.1f} | {100 * (guessing / without - 1):.0f} % "
            f"| {one.checked} | {one.accepted} |"
        )
    return "\n".join([*lines, "", load_line(), machine_line()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--directory", type=Path, help="where the checkpoint is, or is kept")
    parser.add_argument("--dry", action="store_true", help="print, and write no result files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = make_checkpoint(arguments.directory or Path(temporary))
        config = from_spec("nf4-dq", compute_dtype=torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        spec = ModelSpec("m", str(checkpoint), max_batch_tokens=STEP_TOKENS)
        runner = choose_runner(model, spec, blocks=BLOCKS, max_model_len=LENGTH)
        warm_up(runner)
        results = measure(runner, arguments.rounds)
    print(table(results))
    if not arguments.dry:
        RESULTS.mkdir(exist_ok=True)
        record = {"machine": describe(), "results": [asdict(result) for result in results]}
        (RESULTS / "speculation.json").write_text(json.dumps(record) + "\n")
        (RESULTS / "speculation.md").write_text(table(results))


if __name__ == "__main__":
    main()
