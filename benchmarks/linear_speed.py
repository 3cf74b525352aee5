"""Milliseconds of one linear layer on a CPU, beside torch's in bfloat16 and bitsandbytes' own, with cold weights.

    python -m benchmarks.linear_speed [--bitsandbytes DIR] [--shapes 2048x2048 ...] [--rows 1 2 ...] [--seconds 1.0]

Contenders take turns, call by call, in a new order each round: whoever follows a large weight is slower. Each has a
list of layers that together are larger than any cache: a weight has left the cache when its turn comes again.
Activations are bfloat16, the layers' compute dtype too; a few columns hold outliers, as those of language models do.
Medians of wall time; the roof is what torch's sum reads a large tensor with.

bitsandbytes is found in this environment or in DIR (`pip install --no-deps --target DIR bitsandbytes==0.50.2`); without
it its columns stay empty. Results: benchmarks/results/linear_speed.json and .md.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.hardware import describe
from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, native
from quant.linear import PackedLinear

RESULTS: Final = Path(__file__).parent / "results"
DTYPE: Final = torch.bfloat16
COLD_BYTES: Final = 192 << 20
"""Weights of one contender; several times the caches of the machines that this was run on."""
OUTLIER_COLUMNS: Final = 6
FOUR_BIT: Final[dict[str, Any]] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": DTYPE,
}
CONFIGS: Final = {
    "nf4": BitsAndBytesConfig(**FOUR_BIT),
    "nf4-dq": BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_use_double_quant=True),
    "nf4, int8 activations": BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_activations="int8"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8 weights only": BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers="all"),
}
THEIRS: Final = ("bitsandbytes nf4", "bitsandbytes nf4-dq", "bitsandbytes int8")
TORCH: Final = "torch bfloat16"


@dataclass(frozen=True)
class Result:
    """Median milliseconds of one shape, number of rows and contender."""

    shape: str
    rows: int
    contender: str
    milliseconds: float
    weight_bytes: int
    calls: int


def ours(linear: nn.Linear, name: str) -> PackedLinear:
    config = CONFIGS[name]
    return (Linear8bit if config.load_in_8bit else Linear4bit).from_float(linear, config)


def bitsandbytes_layer(linear: nn.Linear, name: str) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    out_features, in_features = linear.weight.shape
    if name == "bitsandbytes int8":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(
            in_features, out_features, False, DTYPE, compress_statistics=name.endswith("dq"), quant_type="nf4"
        )
    layer.load_state_dict({"weight": linear.weight.detach()})
    packed: nn.Module = layer.to("cpu").eval()
    return packed


def contenders(directory: str | None) -> dict[str, Callable[[nn.Linear], nn.Module]]:
    found: dict[str, Callable[[nn.Linear], nn.Module]] = {TORCH: lambda linear: linear}
    for name in CONFIGS:
        found[name] = lambda linear, name=name: ours(linear, name)  # type: ignore[misc]
    if directory is not None:
        sys.path.append(directory)
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        return found
    for name in THEIRS:
        found[name] = lambda linear, name=name: bitsandbytes_layer(linear, name)  # type: ignore[misc]
    return found


def size_of(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(layer.parameters(), layer.buffers()))


def activations(rows: int, columns: int) -> torch.Tensor:
    x = torch.randn(rows, columns)
    x[:, torch.arange(OUTLIER_COLUMNS) * 37 % columns] *= 10
    return x.to(DTYPE)


def measure(shape: tuple[int, int], rows: list[int], directory: str | None, seconds: float) -> Iterator[Result]:
    """All contenders on one shape [N, K]."""
    N, K = shape
    layers: dict[str, list[nn.Module]] = {}
    for name, make in contenders(directory).items():
        first = make(nn.Linear(K, N, bias=False, dtype=DTYPE))
        count = max(2, -(-COLD_BYTES // size_of(first)))
        layers[name] = [first, *(make(nn.Linear(K, N, bias=False, dtype=DTYPE)) for _ in range(count - 1))]
    for M in rows:
        x = activations(M, K)
        times: dict[str, list[float]] = {name: [] for name in layers}
        for own in layers.values():  # what is packed or started on first use
            for layer in own:
                layer(x)
        turn, end = 0, time.perf_counter() + seconds * len(layers)
        while turn < 7 or time.perf_counter() < end:
            for name, own in random.sample(list(layers.items()), len(layers)):
                layer = own[turn % len(own)]
                start = time.perf_counter()
                layer(x)
                times[name].append(time.perf_counter() - start)
            turn += 1
        for name, own in layers.items():
            median = round(statistics.median(times[name]) * 1e3, 4)
            yield Result(f"{N}x{K}", M, name, median, size_of(own[0]), turn)


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
        "Median milliseconds of alternating calls. The last columns: NF4's bytes a second against the memory's, and "
        "how many times faster than bitsandbytes. Made by `python -m benchmarks.linear_speed`.",
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
    machine = ", ".join(f"{key} {value}" for key, value in describe().items())
    level = native.kernels("cpu").level
    lines.append(f"Read bandwidth {bandwidth:.1f} GB/s with {torch.get_num_threads()} threads; level {level}.")
    lines.append(f"Load average at the end {os.getloadavg()[0]:.1f}. Machine: {machine}.")
    return "\n".join(lines) + "\n"


def _times(by_name: dict[str, Result], name: str) -> str:
    theirs = by_name.get(f"bitsandbytes {name}")
    return "" if theirs is None else f"{theirs.milliseconds / by_name[name].milliseconds:.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitsandbytes", metavar="DIR")
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "5632x2048", "2048x5632"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 3, 4, 8, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender, shape and number of rows")
    arguments = parser.parse_args()
    results: list[Result] = []
    bandwidth = read_bandwidth()
    with torch.inference_mode():
        for shape in arguments.shapes:
            N, K = map(int, shape.split("x"))
            for result in measure((N, K), arguments.rows, arguments.bitsandbytes, arguments.seconds):
                print(f"{result.shape} {result.rows:5} {result.contender:22} {result.milliseconds:9.4f} ms", flush=True)
                results.append(result)
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": describe(), "read_gb_per_s": bandwidth, "results": [asdict(result) for result in results]}
    (RESULTS / "linear_speed.json").write_text(json.dumps(record) + "\n")
    (RESULTS / "linear_speed.md").write_text(table(results, bandwidth))
    print(table(results, bandwidth))


if __name__ == "__main__":
    main()
