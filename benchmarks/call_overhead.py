"""Microseconds of one layer call where the layer is so small that nothing but the call takes time.

    python -m benchmarks.call_overhead [--size 64] [--calls 2000] [--rounds 30] [--dry]

One row against a square weight of `size`, in inference mode; ours starts no second thread for so few values. nn.Linear
in the same dtype and each layer of ours take turns in a new order each round; medians over the rounds of a
call's mean time. The target is nn.Linear plus three microseconds. Results: benchmarks/results/call_overhead.*.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Final

import torch
from torch import nn

from benchmarks import RESULTS
from benchmarks.hardware import describe, load_line, machine_line
from quant import BitsAndBytesConfig, Linear4bit, Linear8bit

ALLOWED: Final = 3.0
"""Microseconds more than nn.Linear."""
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TORCH: Final = "nn.Linear"


def layers(size: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """nn.Linear and each layer of the same weight, which compute in `dtype`; all with a bias."""
    linear = nn.Linear(size, size)
    four: dict[str, object] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    configs = {
        "nf4": BitsAndBytesConfig(**four),
        "nf4-dq": BitsAndBytesConfig(**four, bnb_4bit_use_double_quant=True),
        "nf4, int8 activations": BitsAndBytesConfig(**four, bnb_4bit_activations="int8"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "int8 weights only": BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers="all"),
    }
    ours: dict[str, nn.Module] = {
        name: (Linear8bit if config.load_in_8bit else Linear4bit).from_float(linear, config)
        for name, config in configs.items()
    }
    return {TORCH: linear.to(dtype), **ours}


def call_time(layer: nn.Module, x: torch.Tensor, calls: int) -> float:
    """The mean of so many calls, in microseconds."""
    began = time.perf_counter()
    for _ in range(calls):
        layer(x)
    return (time.perf_counter() - began) / calls * 1e6


@torch.inference_mode()
def measure(size: int, dtype: torch.dtype, calls: int, rounds: int) -> dict[str, float]:
    contenders = layers(size, dtype)
    x = torch.randn(1, size, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            layer = contenders[name]
            call_time(layer, x, calls // 10)  # code comes back into the caches
            times[name].append(call_time(layer, x, calls))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def table(size: int, results: dict[str, dict[str, float]]) -> str:
    lines = [
        f"# One call of a layer of {size} by {size}, one row, microseconds",
        "",
        "Medians of alternating rounds. Made by `python -m benchmarks.call_overhead`.",
        "",
        "| dtype | layer | a call | more than nn.Linear | target |",
        "|---|---|---:|---:|---:|",
    ]
    for dtype, times in results.items():
        for name, taken in times.items():
            compared = " | " if name == TORCH else f"{taken - times[TORCH]:+.1f} | {ALLOWED:.1f}"
            lines.append(f"| {dtype} | {name} | {taken:.1f} | {compared} |")
    return "\n".join([*lines, "", load_line(), machine_line()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dry", action="store_true", help="print, and write no result files")
    arguments = parser.parse_args()
    results = {
        name: measure(arguments.size, dtype, arguments.calls, arguments.rounds) for name, dtype in DTYPES.items()
    }
    page = table(arguments.size, results)
    print(page)
    if not arguments.dry:
        RESULTS.mkdir(exist_ok=True)
        record = {"machine": describe(), "size": arguments.size, "microseconds": results}
        (RESULTS / "call_overhead.json").write_text(json.dumps(record) + "\n")
        (RESULTS / "call_overhead.md").write_text(page)


if __name__ == "__main__":
    main()
