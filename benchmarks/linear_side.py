"""One contender's side of linear_speed.py: its layers, with cold weights, and the times of its calls. Not a benchmark.

    python -m benchmarks.linear_side CONTENDER NxK

Answers a line `ROWS SECONDS` with a list of milliseconds, one for each call.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit

DTYPE: Final = torch.bfloat16
COLD_BYTES: Final = 192 << 20
"""Weights of one contender; several times the caches of the machines that this was run on."""
OUTLIER_COLUMNS: Final = 6
WAKING_CALLS: Final = 5
"""At the beginning of a turn, and not timed: threads wake, and code comes back into the caches."""
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


def make_layer(name: str, linear: nn.Linear) -> nn.Module:
    """The contender's layer of these weights, in memory of its own."""
    if name in CONFIGS:
        config = CONFIGS[name]
        return (Linear8bit if config.load_in_8bit else Linear4bit).from_float(linear, config)
    if name in THEIRS:
        return bitsandbytes_layer(name, linear)
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=DTYPE)
    copy.load_state_dict(linear.state_dict())
    return copy


def bitsandbytes_layer(name: str, linear: nn.Linear) -> nn.Module:
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


def size_of(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(layer.parameters(), layer.buffers()))


def activations(rows: int, columns: int) -> torch.Tensor:
    x = torch.randn(rows, columns)
    x[:, torch.arange(OUTLIER_COLUMNS) * 37 % columns] *= 10
    return x.to(DTYPE)


def turn(layers: Iterator[nn.Module], x: torch.Tensor, seconds: float) -> list[float]:
    """Milliseconds of one call after the other for so long, at least one; each call meets a weight that is cold."""
    for _ in range(WAKING_CALLS):
        next(layers)(x)
    times: list[float] = []
    start = end = time.perf_counter()
    while not times or end - start < seconds:
        layer, before = next(layers), time.perf_counter()
        layer(x)
        end = time.perf_counter()
        times.append(round((end - before) * 1e3, 4))
    return times


@torch.inference_mode()
def main(name: str, shape: str) -> None:
    N, K = map(int, shape.split("x"))
    linear = nn.Linear(K, N, bias=False, dtype=DTYPE)
    first = make_layer(name, linear)
    size = size_of(first)
    layers = [first, *(make_layer(name, linear) for _ in range(max(1, COLD_BYTES // size)))]
    for layer in layers:  # what is packed on first use
        layer(activations(1, K))
    print("ready", flush=True)
    in_turn = itertools.cycle(layers)
    for line in sys.stdin:
        rows, seconds = line.split()
        times = turn(in_turn, activations(int(rows), K), float(seconds))
        print(json.dumps({"milliseconds": times, "weight_bytes": size}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
