"""Times and checks what cuda_contenders.py has, one shape after the other; nothing is written here."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.cuda_contenders import DTYPE, HEAD_DIM, HEADS, TORCH, Cached, Call, Weight, contenders, conversions
from quant import native

OUTLIER_COLUMNS: Final = 6
"""Of x: as many hold all outliers from 6 on of a model with 6.7e9 weights (Dettmers et al. 2022, section 4)."""

ATTENTIONS: Final = {"paged_attention": False, "paged_attention int8": True}
"""Of our kernels, and whether the cache is in int8. Weights and results are rounded to DTYPE, by at most 0.4 % each;
int8 codes of normal values stray from them by 0.7 % of what they are, and both of keys and values."""

Timer = Callable[[list[Call]], float | None]
"""Microseconds of one of these calls, or None where they cannot be timed."""


@dataclass(frozen=True)
class Result:
    """One row count and contender of a shape, or (rows 0) one conversion of it."""

    shape: str
    rows: int
    contender: str
    microseconds: float | None
    bytes: int  # that have to be read and written
    error: float | None = None
    """Of a product, from the one in float64 of the values that the weight stands for; by the sum of squares."""
    dequantized_error: float | None = None
    """The same of torch's product in DTYPE with the weight dequantized to DTYPE."""
    held: int | None = None
    """The most bytes allocated during the call, beside operands and result."""


def graph_timer(seconds: float) -> Timer:
    """Times calls as one CUDA graph."""

    def time(calls: list[Call]) -> float | None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError as error:
            print(f"not captured: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
            return None
        times: list[float] = []
        while len(times) < 7 or sum(times) < seconds * 1e6:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times) / len(calls)

    return time


def errors(out: torch.Tensor, x: torch.Tensor, weight: Weight) -> tuple[float, float]:
    """Of a product, and of torch's with the dequantized weight: Result says from what."""
    step = 256  # of x's rows in float64 at a time
    values, rounded = weight.dense(torch.float32).double().t(), weight.dense(x.dtype)
    squares = torch.zeros(3, dtype=torch.float64, device=x.device)
    for first in range(0, len(x), step):
        rows = x[first : first + step]
        exact = rows.double() @ values
        dequantized = torch.nn.functional.linear(rows, rounded)
        found = (out[first : first + step] - exact, dequantized - exact, exact)
        squares += torch.stack([tensor.square().sum() for tensor in found])
    ours, theirs, whole = squares.sqrt().tolist()
    return ours / whole, theirs / whole


def refuse_unless_close(shape: str, rows: int, name: str, error: float) -> None:
    """Ends the run where a product is wrong, by what 8-bit activations and roundings to DTYPE may make of it."""
    if not error < (0.03 if "int8" in name else 0.005):
        raise SystemExit(f"{name} at {rows} rows of {shape} is wrong: {error:.2%} from the product in float64.")


def held_bytes(call: Call, device: torch.device) -> int | None:
    """What Result calls held, on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    return torch.cuda.max_memory_allocated(device) - before - out.nbytes


def activations(M: int, K: int, device: torch.device) -> torch.Tensor:
    """Normal values, but for a few columns of large ones, as LLM.int8() finds them in models."""
    x = torch.randn(M, K, device=device)
    x[:, :: -(-K // OUTLIER_COLUMNS)] *= 20
    return x.to(DTYPE)


def measure(
    kernels: native.Kernels,
    device: torch.device,
    shape: tuple[int, int],
    rows: tuple[int, ...],
    cold_bytes: int,
    directory: str | None,
    timer: Timer,
) -> Iterator[Result]:
    """Every product and every conversion of one shape [N, K]."""
    N, K = shape
    name = f"{N}x{K}"
    dense = torch.randn(N, K, device=device).to(DTYPE) * K**-0.5
    for contender, make in contenders(kernels, directory).items():
        weights = [make(dense)]
        weights += [make(dense.clone()) for _ in range(cold_bytes // weights[0].bytes)]
        for M in rows:
            x = activations(M, K, device)
            calls = [functools.partial(weight.multiply, x) for weight in weights]
            error = dequantized_error = None
            if not contender.startswith("bitsandbytes"):
                error, dequantized_error = errors(calls[0](), x, weights[0])
                refuse_unless_close(name, M, contender, error)
            held = held_bytes(calls[0], device)
            moved = weights[0].bytes + (M * K + M * N) * x.element_size()
            yield Result(name, M, contender, timer(calls), moved, error, dequantized_error, held)
    copies = [dense, *(dense.clone() for _ in range(cold_bytes // dense.nbytes))]
    for tasks in zip(*(conversions(kernels, copy) for copy in copies), strict=True):
        operator, moved, _ = tasks[0]
        yield Result(name, 0, operator, timer([call for _, _, call in tasks]), moved)


def measure_attention(
    kernels: native.Kernels,
    device: torch.device,
    cached: tuple[tuple[int, int], ...],
    cold_bytes: int,
    timer: Timer,
) -> Iterator[Result]:
    """Attention of one new token of each sequence over its cache, and torch's over the same tokens side by side."""
    for sequences, tokens in cached:
        name = f"{sequences} x {tokens}"
        query = torch.randn(sequences, HEADS[0], HEAD_DIM, device=device).to(DTYPE)
        stored = 2 * sequences * tokens * HEADS[1] * HEAD_DIM * query.element_size()
        caches = [Cached.random(sequences, tokens, device) for _ in range(1 + cold_bytes // stored)]
        exact = caches[0].attend_dense(query.double())
        for contender, in_int8 in ATTENTIONS.items():
            off = float((caches[0].attend(kernels, query, in_int8).double() - exact).norm() / exact.norm())
            if not off < (0.03 if in_int8 else 0.01):
                raise SystemExit(f"{contender} at {name} is wrong: {off:.2%} from attention in float64.")
            cache_bytes = (stored + stored // HEAD_DIM * 4) // 2 if in_int8 else stored
            ours = timer([functools.partial(cache.attend, kernels, query, in_int8) for cache in caches])
            yield Result(name, sequences, contender, ours, cache_bytes + 2 * query.nbytes)
        theirs = timer([functools.partial(cache.attend_dense, query) for cache in caches])
        yield Result(name, sequences, TORCH, theirs, stored + 2 * query.nbytes)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written a second by copying half a gigabyte."""
    source = torch.ones(1 << 27, device="cuda")
    target = torch.empty_like(source)
    microseconds = timer([lambda: target.copy_(source)])
    return 0.0 if microseconds is None else 2 * source.nbytes / microseconds * 1e6
