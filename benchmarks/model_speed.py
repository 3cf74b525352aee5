"""Tokens a second of a whole model on a CPU: prefill, decode of one and of eight sequences, beside the peers.

    python -m benchmarks.model_speed [--bitsandbytes DIR] [--llama-cpp PYTHON] [--rounds 3] [--directory DIR]

Every contender is a process of its own that has loaded the same checkpoint (1.1 billion random parameters, TinyLlama's
shape) and answers one question at a time; they take turns, and medians are reported. Ours runs through the server's
runner, transformers' models through their own forward call and cache. Decoding starts after 16 tokens.

bitsandbytes is found in this environment or in DIR; llama.cpp in the environment of the interpreter PYTHON, which has
llama-cpp-python, gguf and numpy. Who is not there is left out. Results: benchmarks/results/model_speed.*.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks import RESULTS
from benchmarks.child import Child
from benchmarks.hardware import describe, load_line, machine_line
from benchmarks.load_memory import make_checkpoint
from server.engine.process import OPENMP_WAITING

PREFILL_TOKENS: Final = 256
DECODE_TOKENS: Final = 24
TASKS: Final = {
    "prefill 256": (f"prefill {PREFILL_TOKENS}", PREFILL_TOKENS),
    "decode 1": (f"decode 1 {DECODE_TOKENS}", DECODE_TOKENS),
    "decode 8": (f"decode 8 {DECODE_TOKENS}", 8 * DECODE_TOKENS),
}
"""What a child is asked, and how many tokens that is."""
LLAMA_CPP_SIDE: Final = Path(__file__).parent / "llama_cpp_side.py"
OURS: Final = {
    "halfbyte nf4-dq": {"quantization": "nf4-dq", "head": None},
    "halfbyte nf4-dq, int8 head": {
        "quantization": "nf4-dq",
        "head": {"load_in_8bit": True, "llm_int8_outliers": "all"},
    },
    "halfbyte nf4-dq, int8 activations and head": {
        "quantization": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_activations": "int8",
        },
        "head": {"load_in_8bit": True, "llm_int8_outliers": "all"},
    },
    "halfbyte int8": {"quantization": "int8", "head": None},
    "halfbyte int8, int8 head": {"quantization": "int8", "head": {"load_in_8bit": True, "llm_int8_outliers": "all"}},
}
THEIRS: Final = {
    "transformers bfloat16": None,
    "transformers + bitsandbytes nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "transformers + bitsandbytes int8": {"load_in_8bit": True},
}
LLAMA_CPP: Final = {"llama.cpp Q4_0": "q4_0", "llama.cpp Q8_0": "q8_0"}

COMMON: Final = """
import json, sys, time, torch, transformers
transformers.logging.disable_progress_bar()
path, options, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
prompt = lambda count: [7 + 31 * i % 20000 for i in range(count)]
def answer(prefill, decode):
    prefill(16), decode(1, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        task, *numbers = line.split()
        print({"prefill": prefill, "decode": decode}[task](*map(int, numbers)), flush=True)
"""
OUR_CHILD: Final = (
    COMMON
    + """
import quant
from quant.config import from_spec
from server.memory import allocator
from server.model.batch import Batch, Chunk, Draw
from server.model.probe import choose_runner, warm_up
from server.records import ModelSpec, SamplingParams
config = from_spec(options["quantization"], compute_dtype=torch.bfloat16)
if options["head"] is not None:
    config = quant.BitsAndBytesConfig(**(config.to_diff_dict() | {"module_overrides": {"lm_head": options["head"]}}))
model = transformers.AutoModelForCausalLM.from_pretrained(
    path, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
allocator.keep_much()  # as an engine does
spec = ModelSpec("m", path, max_batch_tokens=1024, batch_invariant=options.get("batch_invariant", False))
quant.set_batch_invariant(spec.batch_invariant)
runner = choose_runner(model, spec, blocks=1024, max_model_len=1024)
warm_up(runner)
greedy = lambda index: Draw(SamplingParams(max_tokens=1024, temperature=0.0), seed=0, index=index)
blocks = lambda which: list(range(64 * which, 64 * which + 64))

def prefill(count):
    start = time.perf_counter()
    runner.step(Batch((Chunk("0", prompt(count), 0, blocks(0), greedy(0)),)))
    return time.perf_counter() - start

def decode(sequences, count):
    for which in range(sequences):
        runner.step(Batch((Chunk(str(which), prompt(16), 0, blocks(which), greedy(0)),)))
    tokens = {str(which): (5,) for which in range(sequences)}
    start = time.perf_counter()
    for at in range(16, 16 + count):
        tokens = runner.step(Batch(tuple(
            Chunk(name, last[-1:], at, blocks(int(name)), greedy(at)) for name, last in tokens.items()))).tokens
    return time.perf_counter() - start

answer(prefill, decode)
"""
)
THEIR_CHILD: Final = (
    COMMON
    + """
import inspect
config = None if options is None else transformers.BitsAndBytesConfig(**options)
model = transformers.AutoModelForCausalLM.from_pretrained(
    path, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}).eval()
name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

@torch.inference_mode()
def forward(ids, cache):
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache}).logits[:, -1].argmax(-1)

def prefill(count):
    start = time.perf_counter()
    forward(torch.tensor([prompt(count)]), transformers.DynamicCache(config=model.config))
    return time.perf_counter() - start

def decode(sequences, count):
    cache = transformers.DynamicCache(config=model.config)
    forward(torch.tensor([prompt(16)] * sequences), cache)
    tokens = torch.full((sequences,), 5)
    start = time.perf_counter()
    for _ in range(count):
        tokens = forward(tokens[:, None], cache)
    return time.perf_counter() - start

answer(prefill, decode)
"""
)


@dataclass(frozen=True)
class Result:
    """One contender's median tokens a second, and every run's."""

    contender: str
    task: str
    tokens_per_second: float
    runs: list[float]


def start_ours(checkpoint: Path, options: Mapping[str, object], threads: int) -> Child:
    """A process of ours with the checkpoint in it; `options` are those of OURS, and `batch_invariant`."""
    command = [sys.executable, "-c", OUR_CHILD, str(checkpoint), json.dumps(options), str(threads)]
    return Child(command, os.environ | dict([OPENMP_WAITING]))


def start(checkpoint: Path, bitsandbytes: str | None, llama_cpp: str | None, threads: int) -> dict[str, Child]:
    """Every contender that this machine has, loaded."""
    found = {name: start_ours(checkpoint, options, threads) for name, options in OURS.items()}
    environment = os.environ | ({} if bitsandbytes is None else {"PYTHONPATH": bitsandbytes})
    probe = subprocess.run(
        [sys.executable, "-c", "import bitsandbytes"], env=environment, capture_output=True, check=False
    )
    for name, their_options in THEIRS.items():
        if their_options is None or probe.returncode == 0:
            command = [sys.executable, "-c", THEIR_CHILD, str(checkpoint), json.dumps(their_options), str(threads)]
            found[name] = Child(command, environment)
    for name, kind in LLAMA_CPP.items():
        if llama_cpp is None:
            continue
        file = checkpoint.with_name(f"{checkpoint.name}-{kind}.gguf")
        if not file.is_file():
            subprocess.run([llama_cpp, LLAMA_CPP_SIDE, "write", checkpoint, file, kind], check=True)
        found[name] = Child([llama_cpp, str(LLAMA_CPP_SIDE), "serve", str(file), str(threads)], dict(os.environ))
    return found


def measure(children: dict[str, Child], rounds: int) -> list[Result]:
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for task, (question, tokens) in TASKS.items():
            for name, child in children.items():
                speed = tokens / float(child.ask(question))
                seconds.setdefault((name, task), []).append(round(speed, 2))
                print(f"{task:12} {name:36} {speed:8.2f} tok/s", flush=True)
    return [Result(*key, round(statistics.median(runs), 1), runs) for key, runs in seconds.items()]


def table(results: list[Result]) -> str:
    lines = [
        "# A 1.1-billion-parameter Llama on a CPU, tokens a second",
        "",
        "Medians of alternating runs, each contender a process of its own. Made by `python -m benchmarks.model_speed`.",
        "",
        f"| | {' | '.join(TASKS)} |",
        "|---|" + "---:|" * len(TASKS),
    ]
    for name in dict.fromkeys(result.contender for result in results):
        own = {result.task: result.tokens_per_second for result in results if result.contender == name}
        lines.append(f"| {name} | {' | '.join(f'{own[task]:.1f}' for task in TASKS)} |")
    return "\n".join([*lines, "", load_line(), machine_line()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitsandbytes", metavar="DIR")
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = make_checkpoint(arguments.directory or Path(temporary))
        children = start(checkpoint, arguments.bitsandbytes, arguments.llama_cpp, arguments.threads)
        results = measure(children, arguments.rounds)
        for child in children.values():
            child.end()
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": describe(), "results": [asdict(result) for result in results]}
    (RESULTS / "model_speed.json").write_text(json.dumps(record) + "\n")
    (RESULTS / "model_speed.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
