"""Builds the CUDA library, checks every operator on this machine's GPU, times them all, and writes one table.

    python -m benchmarks.cuda_operators [--bitsandbytes DIR] [--shapes 4096x4096 ...] [--rows 1 2 ...] [--seconds 0.2]
                                        [--no-build] [--sanitize memcheck racecheck synccheck initcheck]

Building is `pip install --editable .` for this GPU's architecture; checking is what CHECKS names with the tests that
need a device, and after that every product and attention that is timed against float64. A run that fails either ends
with a sentence and writes nothing. With --sanitize the named tools of compute-sanitizer, which comes with CUDA's
toolkit, go over SANITIZED as well; that takes many times as long, and a finding ends the run too.

Timed are CUDA graphs of calls that go round weights larger than the second-level cache together, so that a weight has
left it when its turn comes again; medians of replays, divided by the calls in a graph. Contenders stand in one process
and run one after the other: the 4-bit matmul with each of its kernels that this GPU runs ("hopper" is the one for
compute capability 9.0), torch in bfloat16 (cuBLAS) and, where it is found in this environment or in DIR, bitsandbytes.
A contender that cannot be captured in a graph is shown without a time. The table opens with what the kernels were to
reach (cuda_targets.py); it has errors and memory beside the times. The roof is what copying a large tensor moves a
second. Results: benchmarks/results/cuda_operators.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from benchmarks import RESULTS
from benchmarks.cuda_measuring import Result, copy_bandwidth, graph_timer, measure, measure_attention
from benchmarks.cuda_table import table, time_of
from benchmarks.hardware import describe
from quant import native

ROOT: Final = Path(__file__).parents[1]
SHAPES: Final = ("4096x4096", "14336x4096", "4096x14336", "8192x28672")
ROWS: Final = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
CHECKS: Final = tuple(
    f"tests/quant/test_{name}.py"
    for name in ("native", "cuda_streams", "linear_8bit_experts", "hopper", "rows", "paged_attention", "cache_write")
)
SANITIZED: Final = (
    "tensor_cores and nested-by-3 or rounds_only and dtype1-nested or absmax_codes or scales and nf4"
    " or (codes_and_values or tiles_of or every_batch or bits_of_products or cpus_bits) and dtype1 and not fp4"
    " or int8_is or of_nothing or to_their_slots or agrees_with_float64 and bfloat16"
)
"""Of CHECKS, what a sanitizer goes over: every kernel, one dtype of most."""
SANITIZERS: Final = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND: Final = 86
"""The exit status that says that a sanitizer found something."""
CACHES: Final = 4
"""Weights that a graph goes round, in second-level caches."""
CACHED: Final = ((1, 1024), (1, 8192), (1, 65536), (8, 4096), (64, 512), (64, 4096))
"""Sequences, and tokens of each in the cache, that attention is timed at."""


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}"


def build() -> None:
    options = {"HALFBYTE_CUDA": "ON", "HALFBYTE_CUDA_ARCHITECTURES": architecture()}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--editable",
        ".",
    ]
    command += [f"--config-settings=cmake.define.{key}={value}" for key, value in options.items()]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise SystemExit("The CUDA library was not built; what pip said stands above.")


def check() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *CHECKS]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise SystemExit("The kernels are not right on this GPU; what the tests said stands above. Nothing was timed.")


def sanitize(tools: list[str]) -> None:
    """Without torch's caching of memory, so that a byte behind a tensor is nobody's."""
    program = shutil.which("compute-sanitizer")
    if tools and program is None:
        raise SystemExit("--sanitize needs compute-sanitizer, which is not on PATH; CUDA's toolkit has it.")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    files = [path for path in CHECKS if "cuda_streams" not in path]  # where a graph is captured, memory must be cached
    for tool in tools:
        command = [str(program), "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "pytest", "-q"]
        command += ["-x", "-m", "cuda", "-o", "timeout=0", *files, "-k", SANITIZED]
        if subprocess.run(command, cwd=ROOT, check=False, env=environment).returncode != 0:
            raise SystemExit(f"{tool} found something on this GPU; it stands above. Nothing was timed.")


def shape_of(text: str) -> tuple[int, int]:
    """[N, K] of a word like 4096x4096."""
    words = text.split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; accepted is NxK with positive numbers, like 4096x14336"
        )
    return int(words[0]), int(words[1])


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows; accepted is a positive one")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitsandbytes", metavar="DIR")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[shape_of(shape) for shape in SHAPES])
    parser.add_argument("--rows", nargs="+", type=positive, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=0.2, help="of replays per shape, number of rows and contender")
    parser.add_argument("--no-build", action="store_true", help="use the CUDA library that is installed")
    parser.add_argument("--sanitize", nargs="+", choices=SANITIZERS, default=[])
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    if not torch.cuda.is_available():
        raise SystemExit(
            "This needs a CUDA device, and torch sees none here; without one, tests/emulation checks the kernels."
        )
    if not options.no_build:
        build()
    check()
    sanitize(options.sanitize)
    timer = graph_timer(options.seconds)
    cold_bytes = CACHES * torch.cuda.get_device_properties(0).L2_cache_size
    results: list[Result] = []
    with torch.inference_mode():
        bandwidth = copy_bandwidth(timer)
        kernels, device = native.kernels("cuda"), torch.device("cuda")
        for shape in options.shapes:
            found = measure(kernels, device, shape, tuple(options.rows), cold_bytes, options.bitsandbytes, timer)
            for result in found:
                print(f"{result.shape} {result.rows:5} {result.contender:22} {time_of(result):>10} us", flush=True)
                results.append(result)
        attention = list(measure_attention(kernels, device, CACHED, cold_bytes, timer))
    RESULTS.mkdir(exist_ok=True)
    record = {
        "machine": describe(),
        "copy_bytes_per_s": bandwidth,
        "results": [asdict(result) for result in results],
        "attention": [asdict(result) for result in attention],
    }
    (RESULTS / "cuda_operators.json").write_text(json.dumps(record) + "\n")
    (RESULTS / "cuda_operators.md").write_text(table(results, attention, bandwidth))
    print(table(results, attention, bandwidth))


if __name__ == "__main__":
    main()
