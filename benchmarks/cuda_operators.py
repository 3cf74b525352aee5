"""Builds the CUDA library, checks every operator on this machine's GPU, times them all, and writes one table.

    python -m benchmarks.cuda_operators [--bitsandbytes DIR] [--shapes 4096x4096 ...] [--rows 1 2 ...] [--seconds 0.2]
                                        [--no-build]

Building is `pip install --editable .` for this GPU's architecture; checking is what CHECKS names with the tests that
need a device, and after that every product and attention that is timed against float64. A run that fails either ends
with a sentence and writes nothing.

Timed are CUDA graphs of calls that go round weights larger than the second-level cache together, so that a weight has
left it when its turn comes again; medians of replays, divided by the calls in a graph. Contenders stand in one process
and run one after the other: the 4-bit matmul with each of its kernels that this GPU runs ("hopper" is the one for
compute capability 9.0), torch in bfloat16 (cuBLAS) and, where it is found in this environment or in DIR, bitsandbytes.
A contender that cannot be captured in a graph is shown without a time. The roof is what copying a large tensor moves a
second. Results: benchmarks/results/cuda_operators.json and .md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.hardware import describe
from quant import formats, native
from quant.errors import NativeError

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = Path(__file__).parent / "results"
DTYPE: Final = torch.bfloat16
BLOCKSIZE: Final = formats.DEFAULT_BLOCKSIZE
SHAPES: Final = ("4096x4096", "14336x4096", "4096x14336", "8192x28672")
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
EXPERTS: Final = 8
"""What a weight's rows are shared out to, one row of x each, where linear_4bit_experts is timed."""
CHECKS: Final = tuple(
    f"tests/quant/test_{name}.py" for name in ("native", "hopper", "rows", "paged_attention", "cache_write")
)
CACHES: Final = 4
"""Weights that a graph goes round, in second-level caches."""
OUTLIER_COLUMNS: Final = 6
"""Of x: as many hold all outliers from 6 on of a model with 6.7e9 weights (Dettmers et al. 2022, section 4)."""
TORCH: Final = "torch bfloat16"
HEAD_DIM: Final = 128
ROTARY_HEADS: Final = 8
HEADS: Final = (32, 8)
"""Of queries, and of keys and values: Llama 3's."""
BLOCK_TOKENS: Final = 16
CACHED: Final = ((1, 1024), (1, 8192), (1, 65536), (8, 4096), (64, 512), (64, 4096))
"""Sequences, and tokens of each in the cache, that attention is timed at."""

Call = Callable[[], torch.Tensor]
Timer = Callable[[list[Call]], float | None]
"""Microseconds of one of these calls, or None where they cannot be timed."""


@dataclass(frozen=True)
class Weight:
    """One contender's copy of a weight [N, K]."""

    bytes: int
    multiply: Callable[[torch.Tensor], torch.Tensor]
    dense: Callable[[], torch.Tensor]  # what it stands for, in DTYPE


@dataclass(frozen=True)
class Result:
    """One row count and contender of a shape, or (rows 0) one conversion of it."""

    shape: str
    rows: int
    contender: str
    microseconds: float | None
    bytes: int  # that have to be read and written


# --- contenders -------------------------------------------------------------------------------------------------------


def contenders(kernels: native.Kernels, directory: str | None) -> dict[str, Callable[[torch.Tensor], Weight]]:
    """What makes each contender's weight of a dense one."""
    found: dict[str, Callable[[torch.Tensor], Weight]] = {TORCH: dense_weight}
    for each in with_each_kernel(kernels):
        for quant_type, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
            name = f"{quant_type}-dq" if nested else quant_type
            name += "" if each.cuda_kernel == "mma" else f" {each.cuda_kernel}"
            found[name] = lambda w, k=each, q=quant_type, n=nested: four_bit(k, w, q, n)  # type: ignore[misc]
    for outliers, name in (("value", "int8"), ("batch", "int8 by column"), ("all", "int8 weights only")):
        found[name] = lambda w, o=outliers: eight_bit(kernels, w, o)  # type: ignore[misc]
    if directory is not None:
        sys.path.append(directory)
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        return found
    for name in ("bitsandbytes nf4", "bitsandbytes nf4-dq", "bitsandbytes int8"):
        found[name] = lambda w, n=name: bitsandbytes_weight(w, n)  # type: ignore[misc]
    return found


def with_each_kernel(kernels: native.Kernels) -> Iterator[native.Kernels]:
    """The library once for each kernel of the 4-bit matmul that this device runs, whatever the environment names."""
    device = "cuda" if kernels.device_type == "cuda" else "cpu"
    nothing = torch.empty(0, 64, dtype=DTYPE, device=device)
    for name in native.CUDA_KERNEL_CODES:
        each = native.Kernels(kernels.library, kernels.device_type, name)
        try:
            four_bit(each, torch.zeros(1, 64, device=device), "nf4", False).multiply(nothing)
        except NativeError as error:
            print(error)
        else:
            yield each


def dense_weight(w: torch.Tensor) -> Weight:
    return Weight(w.nbytes, lambda x: torch.nn.functional.linear(x, w), lambda: w)


def four_bit(kernels: native.Kernels, w: torch.Tensor, quant_type: str, nested: bool) -> Weight:
    packed, absmax = kernels.quantize_4bit(w, quant_type, BLOCKSIZE)
    stored, nested_absmax, offset = absmax, None, None
    if nested:
        stored, nested_absmax, offset = kernels.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)
        absmax = kernels.dequantize_absmax(stored, nested_absmax, offset, formats.NESTED_BLOCKSIZE)
    layout = (quant_type, BLOCKSIZE, list(w.shape))
    held = [tensor for tensor in (packed, stored, nested_absmax, offset) if tensor is not None]
    return Weight(
        sum(tensor.nbytes for tensor in held),
        lambda x: kernels.linear_4bit(
            x, packed, stored, *layout, nested_absmax, offset, formats.NESTED_BLOCKSIZE, None
        ),
        lambda: kernels.dequantize_4bit(packed, absmax, *layout, DTYPE),
    )


def eight_bit(kernels: native.Kernels, w: torch.Tensor, outliers: str) -> Weight:
    CB, SCB = kernels.quantize_8bit(w)
    return Weight(
        CB.nbytes + SCB.nbytes,
        lambda x: kernels.linear_8bit(x, CB, SCB, 6.0, outliers, None),
        lambda: kernels.dequantize_8bit(CB, SCB, DTYPE),
    )


def bitsandbytes_weight(w: torch.Tensor, name: str) -> Weight:
    bnb: Any = importlib.import_module("bitsandbytes")
    N, K = w.shape
    if name.endswith("int8"):
        layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(K, N, False, DTYPE, compress_statistics=name.endswith("dq"), quant_type="nf4")
    layer.load_state_dict({"weight": w.cpu()})
    layer = layer.to(w.device).eval()
    return Weight(sum(p.nbytes for p in layer.parameters()), layer, lambda: w)


def conversions(kernels: native.Kernels, w: torch.Tensor) -> Iterator[tuple[str, int, Call]]:
    """Every operator that is no product with one weight: its name, the bytes that it moves, and a call of it on w."""
    packed, absmax = kernels.quantize_4bit(w, "nf4", BLOCKSIZE)
    codes, nested, offset = kernels.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)
    CB, SCB = kernels.quantize_8bit(w)
    four, eight, second = packed.nbytes + absmax.nbytes, CB.nbytes + SCB.nbytes, absmax.nbytes + codes.nbytes
    yield "quantize_4bit", w.nbytes + four, lambda: kernels.quantize_4bit(w, "nf4", BLOCKSIZE)[0]
    yield "encode_4bit", w.nbytes + four, lambda: kernels.encode_4bit(w, absmax, "nf4", BLOCKSIZE)
    yield "search_scales_4bit", w.nbytes + absmax.nbytes, lambda: kernels.search_scales_4bit(w, "nf4", BLOCKSIZE)
    shape = list(w.shape)
    unpacked = w.nbytes + four
    yield "dequantize_4bit", unpacked, lambda: kernels.dequantize_4bit(packed, absmax, "nf4", BLOCKSIZE, shape, DTYPE)
    yield "quantize_absmax", second, lambda: kernels.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)[0]
    nested_size = formats.NESTED_BLOCKSIZE
    yield "dequantize_absmax", second, lambda: kernels.dequantize_absmax(codes, nested, offset, nested_size)
    experts = EXPERTS if w.shape[0] % EXPERTS == 0 and w.numel() // EXPERTS % BLOCKSIZE == 0 else 1
    rows = w.shape[0] // experts
    stack = (packed.view(experts, 1, -1), absmax.view(experts, 1, -1), "nf4", BLOCKSIZE, [rows, w.shape[1]])
    x, ends = torch.ones_like(w[:experts]), torch.arange(1, experts + 1, device=w.device)
    moved = four + x.nbytes + experts * rows * w.element_size()
    yield "linear_4bit_experts", moved, lambda: kernels.linear_4bit_experts(x, ends, *stack, None, None, 1, None)
    yield "quantize_8bit", w.nbytes + eight, lambda: kernels.quantize_8bit(w)[0]
    yield "dequantize_8bit", w.nbytes + eight, lambda: kernels.dequantize_8bit(CB, SCB, DTYPE)
    yield from between_products(kernels, w)


def between_products(kernels: native.Kernels, x: torch.Tensor) -> Iterator[tuple[str, int, Call]]:
    """The small operators, on x as activations."""
    other, weight = torch.randn_like(x), x[0].clone()
    yield "rms_norm", 2 * x.nbytes, lambda: kernels.rms_norm(x, weight, 1e-6)
    yield "swiglu", 3 * x.nbytes, lambda: kernels.swiglu(x, other)
    tokens = x.numel() // (ROTARY_HEADS * HEAD_DIM)
    query = x.flatten()[: tokens * ROTARY_HEADS * HEAD_DIM].view(tokens, ROTARY_HEADS, HEAD_DIM)
    keys, values = (torch.empty_like(query)[:, None] for _ in range(2))
    slots = torch.randperm(tokens, device=x.device)

    def write() -> torch.Tensor:
        kernels.cache_write(query, query, keys, values, slots, None)
        return keys

    yield "cache_write", 4 * query.nbytes, write
    cos, sin = torch.randn(2, tokens, HEAD_DIM, device=x.device).to(x.dtype)
    moved = 2 * query.nbytes + cos.nbytes + sin.nbytes
    # The operator copies what its kernel then turns in place: at the most half of the roof.
    yield "rotary", moved, lambda: kernels.rotary(query, query[:, :0], cos, sin)[0]


@dataclass(frozen=True)
class Cached:
    """Keys and values of some sequences of one length: in blocks in random order, and side by side for torch."""

    keys: torch.Tensor  # [blocks, BLOCK_TOKENS, G, D]
    values: torch.Tensor
    tables: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    dense: tuple[torch.Tensor, torch.Tensor]  # [S, G, tokens, D]

    @classmethod
    def random(cls, sequences: int, tokens: int, device: torch.device) -> Cached:
        blocks = -(-tokens // BLOCK_TOKENS)
        tables = torch.randperm(sequences * blocks, device=device).view(sequences, blocks)
        shape = (sequences * blocks, BLOCK_TOKENS, HEADS[1], HEAD_DIM)
        stores = [torch.randn(shape, dtype=DTYPE, device=device) for _ in range(2)]
        dense = [store[tables].flatten(1, 2)[:, :tokens].transpose(1, 2).contiguous() for store in stores]
        rows = torch.arange(sequences + 1, device=device)
        starts = torch.full((sequences,), tokens - 1, device=device)
        return cls(stores[0], stores[1], tables, rows, starts, (dense[0], dense[1]))

    def attend(self, kernels: native.Kernels, query: torch.Tensor) -> torch.Tensor:
        """One row a sequence, [S, H, D]."""
        places = (self.tables, self.offsets, self.starts)
        return kernels.paged_attention(query, self.keys, self.values, *places, HEAD_DIM**-0.5, 0, 0.0, None, None)

    def attend_dense(self, query: torch.Tensor) -> torch.Tensor:
        """What torch makes of the same; in float64 where the query is."""
        key, value = (tensor.to(query.dtype) for tensor in self.dense)
        attended = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)
        return attended[:, :, 0]


# --- measuring --------------------------------------------------------------------------------------------------------


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


def refuse_unless_close(
    shape: str, rows: int, name: str, out: torch.Tensor, x: torch.Tensor, dense: torch.Tensor
) -> None:
    """Ends the run where a product is wrong, by what 8-bit activations and one rounding may make of it."""
    step = 256  # of x's rows in float64 at a time
    for first in range(0, len(x), step):
        exact = x[first : first + step].double() @ dense.double().t()
        off = float((out[first : first + step].double() - exact).norm() / exact.norm())
        if not off < (0.03 if "int8" in name else 0.005):
            raise SystemExit(f"{name} at {rows} rows of {shape} is wrong: {off:.2%} from the product in float64.")


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
            if not contender.startswith("bitsandbytes"):
                refuse_unless_close(name, M, contender, weights[0].multiply(x), x, weights[0].dense())
            microseconds = timer([functools.partial(weight.multiply, x) for weight in weights])
            yield Result(name, M, contender, microseconds, weights[0].bytes + (M * K + M * N) * x.element_size())
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
        off = float((caches[0].attend(kernels, query).double() - exact).norm() / exact.norm())
        if not off < 0.01:  # weights and results are rounded to DTYPE, by at most 0.4 % each
            raise SystemExit(f"paged_attention at {name} is wrong: {off:.2%} from attention in float64.")
        moved = stored + 2 * query.nbytes
        ours = timer([functools.partial(cache.attend, kernels, query) for cache in caches])
        yield Result(name, sequences, "paged_attention", ours, moved)
        theirs = timer([functools.partial(cache.attend_dense, query) for cache in caches])
        yield Result(name, sequences, TORCH, theirs, moved)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written a second by copying half a gigabyte."""
    source = torch.ones(1 << 27, device="cuda")
    target = torch.empty_like(source)
    microseconds = timer([lambda: target.copy_(source)])
    return 0.0 if microseconds is None else 2 * source.nbytes / microseconds * 1e6


# --- writing ----------------------------------------------------------------------------------------------------------


def table(results: list[Result], attention: list[Result], bandwidth: float) -> str:
    lines = [
        "# Every operator on a GPU",
        "",
        "Microseconds in CUDA graphs, cold weights, bfloat16 activations; medians. `nf4 of roof`: bytes that have to "
        "be moved, by the copied bytes a second. Made by `python -m benchmarks.cuda_operators`.",
        "",
    ]
    for shape in dict.fromkeys(result.shape for result in results):
        products = [result for result in results if result.shape == shape and result.rows]
        names = list(dict.fromkeys(result.contender for result in products))
        lines += [f"## {shape}", "", f"| rows | {' | '.join(names)} | nf4 of roof | torch / nf4 | bitsandbytes / nf4 |"]
        lines.append("|---:|" + "---:|" * (len(names) + 3))
        for rows in dict.fromkeys(result.rows for result in products):
            own = {result.contender: result for result in products if result.rows == rows}
            cells = [_time(own[name]) for name in names]
            cells += [_share(own["nf4"], bandwidth), _times(own, TORCH), _times(own, "bitsandbytes nf4")]
            lines.append(f"| {rows} | {' | '.join(cells)} |")
        lines += ["", "| conversion | microseconds | of roof |", "|---|---:|---:|"]
        for result in results:
            if result.shape == shape and not result.rows:
                lines.append(f"| {result.contender} | {_time(result)} | {_share(result, bandwidth)} |")
        lines.append("")
    lines += attention_table(attention, bandwidth)
    machine = ", ".join(f"{key} {value}" for key, value in describe().items())
    lines.append(f"Copying moved {bandwidth / 1e12:.2f} TB/s. Machine: {machine}.")
    return "\n".join(lines) + "\n"


def attention_table(results: list[Result], bandwidth: float) -> list[str]:
    lines = [
        f"## Attention of one token a sequence, {HEADS[0]} heads over {HEADS[1]} of {HEAD_DIM} values",
        "",
        "torch: scaled_dot_product_attention over keys and values side by side, in no blocks.",
        "",
        "| sequences x tokens | paged_attention | of roof | torch | torch / paged_attention |",
        "|---|---:|---:|---:|---:|",
    ]
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        ratio = (
            ""
            if not ours.microseconds or not theirs.microseconds
            else f"{theirs.microseconds / ours.microseconds:.2f}x"
        )
        lines.append(f"| {ours.shape} | {_time(ours)} | {_share(ours, bandwidth)} | {_time(theirs)} | {ratio} |")
    return [*lines, ""]


def _time(result: Result) -> str:
    return "" if result.microseconds is None else f"{result.microseconds:.1f}"


def _share(result: Result, bandwidth: float) -> str:
    if result.microseconds is None or not bandwidth:
        return ""
    return f"{result.bytes / result.microseconds * 1e6 / bandwidth:.0%}"


def _times(own: dict[str, Result], name: str) -> str:
    ours, theirs = own["nf4"].microseconds, own[name].microseconds if name in own else None
    return "" if ours is None or theirs is None else f"{theirs / ours:.2f}x"


# --- the run ----------------------------------------------------------------------------------------------------------


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
    timer = graph_timer(options.seconds)
    cold_bytes = CACHES * torch.cuda.get_device_properties(0).L2_cache_size
    results: list[Result] = []
    with torch.inference_mode():
        bandwidth = copy_bandwidth(timer)
        kernels, device = native.kernels("cuda"), torch.device("cuda")
        for shape in options.shapes:
            found = measure(kernels, device, shape, tuple(options.rows), cold_bytes, options.bitsandbytes, timer)
            for result in found:
                print(f"{result.shape} {result.rows:5} {result.contender:22} {_time(result):>10} us", flush=True)
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
