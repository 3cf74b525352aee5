"""Milliseconds of attention over the paged cache on a CPU: quant's kernel beside plain torch, and beside the roofs.

    python -m benchmarks.attention_speed [--seconds S] [--threads N]

Both compute what `server.model.attention` asks of them in one layer of a batch whose keys and values are in the cache:
blocks of 16 tokens in random order, one sequence's rows packed after another's. Runs of the two alternate in this
process for S seconds a case, three at least, and medians are reported: of processor time where there is one thread,
which does not count waiting for a busy machine, else of time. Decoding is bound by memory, so bytes of keys and values
per second are given; prefill by the multiplier, so operations are (four a head, key seen and value). The roofs are what
torch reads of a large tensor in a sum, and its largest matrix product of the dtype: the best of several measurements.

Results: benchmarks/results/attention_speed.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import torch

from benchmarks import RESULTS
from benchmarks.hardware import describe
from server.model.attention import Call, PagedBatch, Segment
from server.model.paged_cache import LayerShape, PagedCache
from server.records import KV_BLOCK_TOKENS

MODELS: Final = ((32, 4, 64), (32, 8, 128))
"""Heads, kv heads, head size: TinyLlama's and Llama 3's."""
DTYPES: Final = (torch.float32, torch.bfloat16)
DECODES: Final = tuple((batch, context) for batch in (1, 8, 32) for context in (128, 1024, 8192))
PREFILLS: Final = ((256, 0), (1024, 0), (4096, 0), (256, 4096))
"""New tokens, and tokens before them."""
LEAST_RUNS: Final = 3


@dataclass(frozen=True)
class Result:
    """One case: medians in milliseconds, and what the kernel did per second."""

    kind: str
    heads: tuple[int, int, int]
    dtype: str
    sequences: int
    rows: int
    cached: int
    runs: int
    kernel_ms: float
    torch_ms: float
    per_second: float
    """GB of keys and values for a decode, GFLOP for a prefill."""


def make_batch(
    sequences: int, rows: int, cached: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[PagedBatch, Call]:
    """A batch of equal sequences over a cache full of random numbers."""
    query_heads, kv_heads, dim = heads
    blocks = -(-(cached + rows) // KV_BLOCK_TOKENS)
    layer = LayerShape(kv_heads, dim, dim, dtype, torch.device("cpu"))
    cache = PagedCache([layer], sequences * blocks)
    for store in cache.tensors:
        store.normal_()
    tables = torch.randperm(sequences * blocks).view(sequences, blocks)
    segments = [Segment(index * rows, rows, cached, table) for index, table in enumerate(tables)]
    query = torch.randn(sequences * rows, query_heads, dim).to(dtype).transpose(0, 1)
    new = torch.randn(kv_heads, sequences * rows, dim).to(dtype)
    batch = PagedBatch(cache, torch.zeros(0, dtype=torch.int64), segments)
    return batch, Call(query, new, new, dim**-0.5, None, None, None)


def timed(run: Callable[[], torch.Tensor]) -> float:
    """Milliseconds of one run."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return (clock() - start) * 1e3


@torch.inference_mode()
def measure(
    kind: str, sequences: int, rows: int, cached: int, heads: tuple[int, int, int], dtype: torch.dtype, seconds: float
) -> Result:
    """Alternating runs of both, after one of each that is not counted."""
    batch, call = make_batch(sequences, rows, cached, heads, dtype)
    (stores,) = batch.cache.layers
    sides = (lambda: batch.attend_at_once(call, stores), lambda: batch.attend_in_torch(call, stores))
    for side in sides:
        side()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + seconds
    while len(times[0]) < LEAST_RUNS or time.monotonic() < end:
        for side, found in zip(sides, times, strict=True):
            found.append(timed(side))
    kernel_ms, torch_ms = map(statistics.median, times)
    query_heads, kv_heads, dim = heads
    if kind == "decode":
        work = 2 * sequences * (cached + rows) * kv_heads * dim * dtype.itemsize
    else:
        work = 4 * query_heads * dim * sequences * sum(range(cached + 1, cached + rows + 1))
    name = str(dtype).removeprefix("torch.")
    return Result(
        kind, heads, name, sequences, rows, cached, len(times[0]), kernel_ms, torch_ms, work / kernel_ms / 1e6
    )


def roofs() -> dict[str, float]:
    """GB/s of reading, GFLOP/s of a matrix product in each dtype: the best of a few runs."""
    large = torch.ones(1 << 27)
    found = {"read GB/s": large.numel() * 4 / min(timed(large.sum) for _ in range(5)) / 1e6}
    for dtype in DTYPES:
        matrix = torch.randn(2048, 2048).to(dtype)
        best = min(timed(lambda matrix=matrix: matrix @ matrix) for _ in range(5))  # type: ignore[misc]
        found[f"{str(dtype).removeprefix('torch.')} GFLOP/s"] = 2 * 2048**3 / best / 1e6
    return found


def table(results: list[Result], roof: dict[str, float]) -> str:
    """The medians as Markdown, the machine, the roofs and the machine's load named below them."""
    lines = [
        "# Attention over the paged cache on a CPU, one layer",
        "",
        f"Medians of alternating runs in one process, {'processor' if torch.get_num_threads() == 1 else 'wall'} time. "
        "Made by `python -m benchmarks.attention_speed`.",
        "",
    ]
    for kind, unit in (("decode", "GB/s"), ("prefill", "GFLOP/s")):
        lines += [
            f"## {kind.capitalize()}",
            "",
            f"| H, G, D | dtype | sequences | new tokens | cached | torch ms | kernel ms | times | {unit} | of roof |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for one in (each for each in results if each.kind == kind):
            limit = roof["read GB/s"] if kind == "decode" else roof[f"{one.dtype} GFLOP/s"]
            lines.append(
                f"| {', '.join(map(str, one.heads))} | {one.dtype} | {one.sequences} | {one.rows} | {one.cached} "
                f"| {one.torch_ms:.3f} | {one.kernel_ms:.3f} | {one.torch_ms / one.kernel_ms:.1f} "
                f"| {one.per_second:.1f} | {one.per_second / limit:.0%} |"
            )
        lines.append("")
    machine = describe() | {"threads": str(torch.get_num_threads())}
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [
        "Roofs: " + ", ".join(f"{name} {value:.1f}" for name, value in roof.items()) + ". "
        "Short contexts are read from the processor's caches, which are faster than memory.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        f"Load averages at the end, over 1, 5 and 15 minutes: {load}; above {machine['threads']} others were using the "
        "machine.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes the two result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case; default 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    roof = roofs()
    results = []
    for heads in MODELS:
        for dtype in DTYPES:
            cases = [("decode", batch, 1, context - 1) for batch, context in DECODES]
            cases += [("prefill", 1, rows, cached) for rows, cached in PREFILLS]
            for case in cases:
                results.append(measure(*case, heads, dtype, arguments.seconds))
                one = results[-1]
                print(
                    f"{one.kind:8}{one.heads} {one.dtype:9}{one.sequences:3} x {one.rows:4} after {one.cached:4}: "
                    f"torch {one.torch_ms:9.3f} ms, kernel {one.kernel_ms:9.3f} ms, {one.per_second:6.1f}",
                    flush=True,
                )
        roof = {name: max(value, roof[name]) for name, value in roofs().items()}
    text = table(results, roof)
    print("\n" + text)
    content = {"machine": describe(), "load": os.getloadavg(), "roofs": roof, "results": list(map(asdict, results))}
    (RESULTS / "attention_speed.json").write_text(json.dumps(content) + "\n")
    (RESULTS / "attention_speed.md").write_text(text)


if __name__ == "__main__":
    main()
