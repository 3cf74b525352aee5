"""What every operator promises on a GPU beside its result: it runs on the current stream, waits for nothing, allocates
nothing but through torch, and is captured in a CUDA graph or compiled like torch's own.

Capturing proves more than that it works: while a graph is captured, CUDA refuses every allocation and every wait of the
library. What the emulation cannot show is here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from quant import native, op_kernels, ops
from quant.rows import embedding_4bit, embedding_8bit
from tests.quant import operands
from tests.quant.operands import Weight4, same_bits
from tests.quant.test_ops import IN_INT8, operator, sample_arguments

pytestmark = pytest.mark.cuda

LOOKUPS = {
    "embedding_4bit of whole blocks": (embedding_4bit, 128),
    "embedding_4bit of parts of blocks": (embedding_4bit, 100),
    "embedding_8bit": (embedding_8bit, 128),
}
"""Operators that are not among those of ops.py, and the columns of a table for each."""
CASES = [*(name for name in ops.NAMES if name not in op_kernels.REFERENCE_ONLY["cuda"]), *IN_INT8, *LOOKUPS]
DTYPE = torch.bfloat16
LONG = 1_000_000_000
"""Clocks, half a second of a GPU: no call takes so long to be made."""
WRITTEN = (2, 3, 5)
"""Arguments that cache_write writes."""


@pytest.fixture(autouse=True)
def library() -> None:
    reason = native.unavailable_because("cuda")
    if reason is not None:
        pytest.skip(reason)


def arguments_on_device(name: str) -> list[Any]:
    generator = operands.fresh_generator()
    if name in LOOKUPS:
        return lookup_arguments(name, generator)
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in sample_arguments(name, generator, DTYPE)]


def lookup_arguments(name: str, generator: torch.Generator) -> list[Any]:
    """Of a table that is doubly quantized in groups of three blocks, or in int8."""
    ids, shape = torch.tensor([[3, 0], [6, 6]], device="cuda"), (7, LOOKUPS[name][1])
    if name == "embedding_8bit":
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return [ids, codes.cuda(), torch.rand(shape[0], generator=generator).cuda(), DTYPE]
    weight = Weight4.random(shape, "nf4", 64, 3, generator).to("cuda")
    nesting = [weight.nested_absmax, weight.offset, weight.nested_blocksize, DTYPE]
    return [ids, weight.packed, weight.absmax, "nf4", 64, *shape, *nesting]


def call(name: str, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Makes the call and gives its results, which for cache_write are arguments."""
    result = (LOOKUPS[name][0] if name in LOOKUPS else operator(name))(*arguments)
    if result is None:
        return [arguments[index] for index in WRITTEN if arguments[index] is not None]
    return [result] if isinstance(result, torch.Tensor) else list(result)


def copies(arguments: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    for ours, right in zip(found, expected, strict=True):
        assert same_bits(ours.cpu(), right.cpu())


@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_the_current_stream_and_waits_for_nothing(name: str) -> None:
    """What it reads is written on a stream that is still busy when the call comes back."""
    arguments = arguments_on_device(name)
    expected = call(name, copies(arguments))
    late = copies(arguments)
    late[0] = torch.zeros_like(arguments[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        late[0].copy_(arguments[0])
        found = call(name, late)
        is_busy = not stream.query()
    assert is_busy, "the call waited for its stream"
    assert_same(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_it_can_be_captured_in_a_graph(name: str) -> None:
    """And the graph computes with what is in its arguments when it is replayed."""
    arguments = arguments_on_device(name)
    expected = call(name, copies(arguments))
    held = copies(arguments)
    call(name, copies(arguments))  # the first call of a kernel loads it
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    held[0].zero_()
    with torch.cuda.graph(graph):
        found = call(name, held)
    held[0].copy_(arguments[0])
    graph.replay()
    assert_same(found, expected)


@pytest.mark.parametrize("kernel", native.CUDA_KERNEL_CODES)
@pytest.mark.parametrize("rows", [1, 300])
def test_a_product_whose_sums_are_shared_out_can_be_captured(kernel: str, rows: int) -> None:
    """With a workspace, and with Hopper's kernels, which start while the one in front of them still runs."""
    if kernel == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    kernels = native.Kernels(native.kernels("cuda").library, "cuda", kernel)
    weight = Weight4.random((256, 4096), "nf4", 64, 256, operands.fresh_generator()).to("cuda").arguments()
    x = torch.randn(rows, 4096, device="cuda").to(DTYPE)
    expected = kernels.linear_4bit(x, *weight)
    held = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.linear_4bit(held, *weight)
    held.copy_(x)
    graph.replay()
    assert_same([found], [expected])


def test_streams_that_work_at_once_do_not_meet() -> None:
    """Statistics of many weights that are quantized on several streams, none of which waits for another."""
    weights = [torch.randn(512, 4096, device="cuda").to(DTYPE) for _ in range(16)]
    expected = [(*ops.quantize_4bit(w, "nf4", 64), *ops.quantize_8bit(w)) for w in weights]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for index, w in enumerate(weights):
        with torch.cuda.stream(streams[index % len(streams)]):
            found.append((*ops.quantize_4bit(w, "nf4", 64), *ops.quantize_8bit(w)))
    for ours, right in zip(found, expected, strict=True):
        assert_same(ours, right)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("cache_write")])
def test_it_compiles_without_a_break(name: str) -> None:
    torch.compiler.reset()
    arguments = arguments_on_device(name)
    expected = call(name, arguments)
    compiled = torch.compile(lambda *given: call(name, given), fullgraph=True)
    assert_same(compiled(*arguments), expected)


@pytest.mark.parametrize("kernel", native.CUDA_KERNEL_CODES)
def test_many_rows_need_no_copy_of_the_weight(kernel: str) -> None:
    """The most memory that is held during a product, beside its result: a quarter of the weight in bfloat16 at most."""
    if kernel == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    kernels = native.Kernels(native.kernels("cuda").library, "cuda", kernel)
    for (N, K), all_rows in (((16384, 8192), (256, 1024, 8192)), ((4096, 4096), (512, 1024))):
        weight = Weight4.random((N, K), "nf4", 64, 256, operands.fresh_generator()).to("cuda").arguments()
        for rows in all_rows:
            x = torch.randn(rows, K, device="cuda").to(DTYPE)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = kernels.linear_4bit(x, *weight)
            beside = torch.cuda.max_memory_allocated() - before - out.nbytes
            assert beside <= N * K * 2 // 4, (N, K, rows)
