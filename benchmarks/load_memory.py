"""Memory while loading and quantizing a 1.1-billion-parameter checkpoint: the curve, its peak, and what it may be.

    python -m benchmarks.load_memory [--quantization nf4] [--directory DIR]

Writes a random bfloat16 checkpoint (2.2 GB, kept under --directory), loads it in a process of its own through
transformers and `quant`, and samples that process's /proc/PID/status every 10 ms. Anonymous memory is what the process
alone pays for; mapped file pages are the checkpoint's own, which the kernel may drop at any time: the two are reported
apart. What is not quantized (embedding, output head) stays a view of the mapped file in transformers' loader, so the
peak can lie below runtime plus model. Results: benchmarks/results/load_memory_<quantization>.json and .png.
"""

from __future__ import annotations

import argparse
import json
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import matplotlib as mpl
import torch
import transformers

from benchmarks import RESULTS
from benchmarks.hardware import describe

VOCABULARY: Final = 32000
HIDDEN: Final = 2048
SAMPLE_SECONDS: Final = 0.01
CURVE_POINTS: Final = 200
MB: Final = 1e6

CHILD: Final = """
import sys, time, torch, transformers
import quant
transformers.logging.disable_progress_bar()
from quant.config import from_spec
from quant.memory import measure_weights
print("imported", flush=True)
sys.stdin.readline()
started = time.monotonic()
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=from_spec(sys.argv[2], compute_dtype=torch.bfloat16), dtype=torch.bfloat16,
    local_files_only=True)
seconds = time.monotonic() - started
print(seconds, sum(measure_weights(model).values()), flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Result:
    """One load; all sizes in bytes, the curve as (seconds, anonymous, mapped)."""

    quantization: str
    load_seconds: float
    model_bytes: int
    runtime_anonymous_bytes: int
    peak_anonymous_bytes: int
    final_anonymous_bytes: int
    peak_mapped_file_bytes: int
    largest_tensor_bytes: int
    curve: list[tuple[float, int, int]]

    @property
    def above_model_and_runtime(self) -> int:
        """What the peak held beyond the packed model and the runtime."""
        return self.peak_anonymous_bytes - self.runtime_anonymous_bytes - self.model_bytes


def make_checkpoint(directory: Path) -> Path:
    """Writes the random checkpoint once, in bfloat16, in TinyLlama's shape."""
    target = directory / "llama-1b-random"
    if not (target / "config.json").is_file():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=22,
            intermediate_size=5632,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            dtype=torch.bfloat16,
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        model.save_pretrained(target)
    return target


def sample(pid: int) -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of a process now."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


def measure(checkpoint: Path, quantization: str) -> Result:
    """Loads in a child process and samples it from here until it says that it is done."""
    command = [sys.executable, "-c", CHILD, str(checkpoint), quantization]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the child process was started without the pipes that were asked for")
        child.stdout.readline()
        runtime, _ = sample(child.pid)
        started = time.monotonic()
        child.stdin.write("go\n")
        child.stdin.flush()
        curve = []
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not selector.select(timeout=SAMPLE_SECONDS):
                curve.append((round(time.monotonic() - started, 3), *sample(child.pid)))
        seconds, model_bytes = child.stdout.readline().split()
        final, _ = sample(child.pid)
        child.stdin.write("end\n")
    return Result(
        quantization=quantization,
        load_seconds=float(seconds),
        model_bytes=int(model_bytes),
        runtime_anonymous_bytes=runtime,
        peak_anonymous_bytes=max(anonymous for _, anonymous, _ in curve),
        final_anonymous_bytes=final,
        peak_mapped_file_bytes=max(mapped for _, _, mapped in curve),
        largest_tensor_bytes=VOCABULARY * HIDDEN * torch.bfloat16.itemsize,
        curve=curve,
    )


def plot(result: Result, path: Path) -> None:
    """Anonymous memory, mapped pages, and the two lines that the peak is held against."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    seconds = [point[0] for point in result.curve]
    floor = result.runtime_anonymous_bytes
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(seconds, [point[1] / MB for point in result.curve], label="anonymous memory")
    axes.plot(seconds, [point[2] / MB for point in result.curve], label="mapped file pages", linestyle=":")
    axes.axhline(floor / MB, color="grey", linewidth=0.8, label="runtime before loading")
    packed = (floor + result.model_bytes) / MB
    axes.axhline(packed, color="black", linewidth=0.8, linestyle="--", label="runtime + packed model")
    axes.set(xlabel="seconds", ylabel="MB", title=f"Loading 1.1 billion parameters as {result.quantization}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints, and writes the two result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    result = measure(make_checkpoint(arguments.directory), arguments.quantization)
    path = RESULTS / f"load_memory_{result.quantization}"
    plot(result, path.with_suffix(".png"))
    thinned = replace(result, curve=result.curve[:: max(1, len(result.curve) // CURVE_POINTS)])
    figures = asdict(thinned) | {"above_model_and_runtime_bytes": result.above_model_and_runtime}
    path.with_suffix(".json").write_text(json.dumps({"hardware": describe()} | figures) + "\n")
    for name, value in figures.items():
        if name.endswith("_bytes"):
            print(f"{name:32}{value / MB:10.1f} MB")
    print(f"{'load_seconds':32}{result.load_seconds:10.1f} s")


if __name__ == "__main__":
    main()
