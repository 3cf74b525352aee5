"""Milliseconds of the experts of one layer on a CPU: 4-bit stacks in one call, expert by expert, and bfloat16.

    python -m benchmarks.experts_speed [--layers 128x8x2048x768 ...] [--tokens 1 8 ...] [--seconds 1.0]

A layer is EXPERTSxCHOSENxHIDDENxINTERMEDIATE, gated, as Mixtral and Qwen3-MoE have them; the default is one of
Qwen3-30B-A3B. Contenders take turns, call by call, with other experts in each turn, so that most weights have left the
cache: transformers' own loop over the active experts with torch's linear layers in bfloat16; NF4 with one product per
expert and matrix; NF4 in one call per stack, plain and double-quantized. Before anything is timed each result is
compared with bfloat16's. Medians of wall time. Results: benchmarks/results/experts_speed.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks import RESULTS
from benchmarks.hardware import describe, machine_line
from quant import BitsAndBytesConfig, native, ops, reference
from quant.experts import PackedExperts, Projection
from quant.state import Packed4bit

DTYPE: Final = torch.bfloat16
TORCH: Final = "torch bfloat16"
ONE_BY_ONE: Final = "nf4, one by one"
FOUR_BIT: Final[dict[str, Any]] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": DTYPE,
}
CONFIGS: Final = {
    ONE_BY_ONE: BitsAndBytesConfig(**FOUR_BIT),
    "nf4": BitsAndBytesConfig(**FOUR_BIT),
    "nf4-dq": BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_use_double_quant=True),
}
ROUTINGS: Final = 16
"""Choices of experts that calls go round."""

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a layer of experts takes: hidden states, chosen experts, their weights."""


@dataclass(frozen=True)
class Size:
    """EXPERTSxCHOSENxHIDDENxINTERMEDIATE."""

    experts: int
    chosen: int
    hidden: int
    intermediate: int

    @classmethod
    def parse(cls, text: str) -> Size:
        numbers = text.split("x")
        if len(numbers) != 4 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no layer; accepted is EXPERTSxCHOSENxHIDDENxINTERMEDIATE with positive numbers"
            )
        size = cls(*map(int, numbers))
        if size.chosen > size.experts:
            raise argparse.ArgumentTypeError(f"{text!r} chooses {size.chosen} of {size.experts} experts")
        return size

    def __str__(self) -> str:
        return f"{self.experts}x{self.chosen}x{self.hidden}x{self.intermediate}"


@dataclass(frozen=True)
class Result:
    """Median milliseconds of one layer, number of tokens and contender."""

    layer: str
    tokens: int
    contender: str
    milliseconds: float
    calls: int


class OneByOne(PackedExperts):
    """One product per active expert and matrix, as before there was an operator for all of them."""

    def _project_4bit(self, leaf: str, template: Packed4bit, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        projection = self.projections[leaf]
        codes, absmax = self._codes(leaf).view(torch.uint8), getattr(self, f"{leaf}_absmax")
        shape = [projection.rows, projection.columns]
        out = x.new_empty(len(x), len(projection.names) * projection.rows)
        for expert, rows in reference.expert_rows(ends):
            for part in range(len(projection.names)):
                product = ops.linear_4bit(
                    x[rows], codes[expert, part], absmax[expert, part], template.quant_type, template.blocksize, shape
                )
                out[rows, part * projection.rows : (part + 1) * projection.rows] = product
        return out


def original(size: Size) -> MixtralExperts:
    config = MixtralConfig(num_local_experts=size.experts, hidden_size=size.hidden, intermediate_size=size.intermediate)
    config._experts_implementation = "eager"
    module = MixtralExperts(config).to(DTYPE)
    for stack in module.parameters():
        nn.init.normal_(stack, std=stack.shape[-1] ** -0.5)
    return module


def packed(size: Size, source: MixtralExperts, name: str) -> PackedExperts:
    """The stacks of `source`, packed; it keeps them."""
    experts, hidden, intermediate = size.experts, size.hidden, size.intermediate
    projections = (
        Projection("gate_up_proj", ("{expert}.w1", "{expert}.w3"), experts, intermediate, hidden, False),
        Projection("down_proj", ("{expert}.w2",), experts, hidden, intermediate, False),
    )
    with torch.device("meta"):
        shell = MixtralExperts(source.config)
    shell.gate_up_proj, shell.down_proj = source.gate_up_proj, source.down_proj
    return (OneByOne if name == ONE_BY_ONE else PackedExperts)(shell, projections, CONFIGS[name])


def contenders(size: Size) -> dict[str, Layer]:
    source = original(size)
    return {TORCH: source, **{name: packed(size, source, name) for name in CONFIGS}}


def routings(size: Size, tokens: int) -> Iterator[Routing]:
    """Experts drawn evenly for each token."""
    for _ in range(ROUTINGS):
        chosen = torch.rand(tokens, size.experts).topk(size.chosen).indices
        weights = torch.rand(tokens, size.chosen).softmax(dim=-1).to(DTYPE)
        yield torch.randn(tokens, size.hidden).to(DTYPE), chosen, weights


def refuse_unless_close(layers: dict[str, Layer], routing: Routing) -> None:
    """Ends the run where a contender is further from bfloat16's result than rounding weights to 4 bits explains."""
    expected = layers[TORCH](*routing).float()
    for name, layer in layers.items():
        off = float((layer(*routing).float() - expected).norm() / expected.norm())
        if not off < 0.2:
            raise SystemExit(f"{name} is {off:.0%} from the product in bfloat16.")


def measure(size: Size, tokens: list[int], seconds: float) -> Iterator[Result]:
    """All contenders on one layer."""
    layers = contenders(size)
    for count in tokens:
        rounds = list(routings(size, count))
        refuse_unless_close(layers, rounds[0])
        times: dict[str, list[float]] = {name: [] for name in layers}
        turn, end = 0, time.perf_counter() + seconds * len(layers)
        while turn < 7 or time.perf_counter() < end:
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(*rounds[turn % ROUTINGS])
                times[name].append(time.perf_counter() - start)
            turn += 1
        for name in layers:
            yield Result(str(size), count, name, round(statistics.median(times[name]) * 1e3, 4), turn)


def table(results: list[Result]) -> str:
    names = list(dict.fromkeys(result.contender for result in results))
    lines = [
        "# The experts of one layer on a CPU, bfloat16 activations",
        "",
        "Median milliseconds of alternating calls; layers as experts x chosen x hidden x intermediate. The last "
        "columns: how many times faster NF4 is than bfloat16, and than one product per expert. Made by "
        "`python -m benchmarks.experts_speed`.",
        "",
    ]
    for layer in dict.fromkeys(result.layer for result in results):
        lines += [f"## {layer}", "", f"| tokens | {' | '.join(names)} | bfloat16 / nf4 | one by one / nf4 |"]
        lines.append("|---:|" + "---:|" * (len(names) + 2))
        own = [result for result in results if result.layer == layer]
        for tokens, group in itertools.groupby(own, key=lambda result: result.tokens):
            times = {result.contender: result.milliseconds for result in group}
            cells = [f"{times[name]:.3f}" for name in names]
            cells += [f"{times[other] / times['nf4']:.2f}x" for other in (TORCH, ONE_BY_ONE)]
            lines.append(f"| {tokens} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(f"{torch.get_num_threads()} threads; level {native.kernels('cpu').level}.")
    lines.append(f"Load average at the end {os.getloadavg()[0]:.1f}. {machine_line()}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=Size.parse, default=[Size(128, 8, 2048, 768)])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender, layer and number of tokens")
    arguments = parser.parse_args()
    results: list[Result] = []
    with torch.inference_mode():
        for size in arguments.layers:
            for result in measure(size, arguments.tokens, arguments.seconds):
                print(
                    f"{result.layer} {result.tokens:5} {result.contender:18} {result.milliseconds:9.3f} ms", flush=True
                )
                results.append(result)
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": describe(), "results": [asdict(result) for result in results]}
    (RESULTS / "experts_speed.json").write_text(json.dumps(record) + "\n")
    (RESULTS / "experts_speed.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
