"""Attention over a paged cache: kernel and reference against float64, and what a row's bits may depend on."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from quant import formats, native, op_kernels, ops, reference
from quant.errors import NativeError
from tests.quant import operands
from tests.quant.operands import Paged, same_bits
from tests.quant.test_native import device  # noqa: F401

DTYPES = list(formats.VALUE_DTYPES)
SHAPES = [
    ((4, 4), (16, 16)),
    ((8, 2), (64, 64)),
    ((8, 1), (80, 96)),
    ((6, 6), (128, 40)),
    ((10, 2), (7, 33)),
    ((4, 1), (256, 256)),
    ((200, 1), (16, 16)),
]
"""(H, G), (D, E): no, four, eight and two hundred heads to a kv head, sizes that fill no lane, keys unlike values."""
OPTIONS = [(0, 0.0, False), (5, 0.0, True), (70, 5.0, False), (0, 30.0, True), (1, 0.0, False), (513, 0.0, False)]
"""window, softcap, whether there are sinks."""
OTHER_STORES = [(dtype, store) for dtype in DTYPES for store in formats.STORE_DTYPES if store != dtype]
"""Dtypes of queries over a cache of another."""


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


def some_sequences(count: int) -> list[tuple[int, int]]:
    """Starts and rows around the borders of tiles (64), spans (512) and blocks."""
    starts = [0, 1, 15, 16, 31, 63, 64, 65, 100, 511, 512, 600]
    return [(random.choice(starts), random.choice([1, 1, 2, 7, 40])) for _ in range(count)]


def some_options(heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator, which: int) -> tuple[Any, ...]:
    """Scale, window, soft cap, sinks.

    A model's own scale, one over the root of the head's size: scores are then of order one for every size. Their
    exponentials multiply an error by the score, so that with a fixed scale a large head needs another tolerance.
    """
    window, softcap, has_sinks = OPTIONS[which]
    sinks = torch.randn(heads, generator=generator).to(dtype) if has_sinks else None
    return (dim**-0.5, window, softcap, sinks)


@pytest.mark.parametrize("block_tokens", [1, 3, 16, 32])
@pytest.mark.parametrize(("heads", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_reference_agree_with_float64(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_tokens: int,
    generator: torch.Generator,
) -> None:
    for which in range(len(OPTIONS)):
        assert_near_float64(device, dtype, heads, dims, block_tokens, some_sequences(2), which, generator)


@pytest.mark.parametrize(("heads", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "store"), OTHER_STORES, ids=str)
def test_a_cache_of_another_dtype_agrees_with_float64(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    store: torch.dtype,
    heads: tuple[int, int],
    dims: tuple[int, int],
    generator: torch.Generator,
) -> None:
    """Against what the cache holds: int8 costs nothing but its own rounding, which test_kv.py bounds."""
    for which in range(len(OPTIONS)):
        tokens = random.choice([1, 3, 16, 32])
        assert_near_float64(device, dtype, heads, dims, tokens, some_sequences(2), which, generator, store)


def assert_near_float64(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_tokens: int,
    sequences: list[tuple[int, int]],
    which: int,
    generator: torch.Generator,
    store: torch.dtype | None = None,
) -> None:
    """As near as float32 sums, or as the dtype's rounding of weights and results, allow."""
    paged = Paged.random(sequences, heads, dims, block_tokens, dtype, generator, store)
    options = some_options(heads[0], dims[0], dtype, generator, which)
    exact = paged.exact(*options)
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": max(eps, 1e-5), "atol": max(2 * eps, 2e-5)}
    plain = reference.paged_attention(*paged.arguments(), *options, paged.scales)
    torch.testing.assert_close(plain.double(), exact, **tolerance)
    out = ops.paged_attention(*paged.on(device), *moved(options, device), paged.scales_on(device))
    torch.testing.assert_close(out.double().cpu(), exact, **tolerance)


def moved(options: tuple[Any, ...], device: str) -> tuple[Any, ...]:  # noqa: F811
    """The sinks too."""
    return tuple(option.to(device) if isinstance(option, torch.Tensor) else option for option in options)


@pytest.mark.parametrize("dims", [(16, 24), (7, 5)], ids=str)
@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_however_the_work_is_cut(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    store: torch.dtype | None,
    dims: tuple[int, int],
    generator: torch.Generator,
) -> None:
    """In company and alone, in other blocks, in the widest table, in a batch of many heads: a device cuts each of them
    another way. The widest table lets few rows in at once; with many heads, few thread blocks share a row's keys."""
    H, G = 34, 2
    paged = Paged.random([(254, 5), (600, 1)], (H, G), dims, 16, dtype, generator, store)
    scales = paged.scales_on(device)
    own = moved(some_options(H, dims[0], dtype, generator, 3), device)
    options = (*own, scales)
    query, keys, values, tables, offsets, starts = paged.on(device)
    together = ops.paged_attention(query, keys, values, tables, offsets, starts, *options)
    assert not together.isnan().any()
    for row in (0, 4, 5):
        sequence, position = (0, 254 + row) if row < 5 else (1, 600)
        one, place = torch.tensor([0, 1]).to(device), torch.tensor([position]).to(device)
        alone = ops.paged_attention(
            query[row : row + 1], keys, values, tables[sequence : sequence + 1], one, place, *options
        )
        assert same_bits(alone, together[row : row + 1]), row
    smaller = [tensor.view(-1, 4, *tensor.shape[2:]) for tensor in (keys, values)]
    of_smaller = None if scales is None else scales.view(-1, 4, G, 2)
    table = (tables[:, :, None] * 4 + torch.arange(4).to(device)).flatten(1)
    assert same_bits(ops.paged_attention(query, *smaller, table, offsets, starts, *own, of_smaller), together)
    rows = torch.arange(6).to(device)
    wide = torch.nn.functional.pad(tables[:1], (0, 2**16)).expand(5, -1)
    apart = ops.paged_attention(query[:5], keys, values, wide, rows, rows[:5] + starts[0], *options)
    assert same_bits(apart, together[:5])
    times = 66
    many = [tensor.repeat(*[1] * axis, times, 1) for tensor, axis in ((query[5:], 1), (keys, 2), (values, 2))]
    sinks = None if own[3] is None else own[3].repeat(times)
    of_many = None if scales is None else scales.repeat(1, 1, times, 1)
    in_many = ops.paged_attention(*many, tables[1:], offsets[1:] - 5, starts[1:], *own[:3], sinks, of_many)
    assert all(same_bits(part, together[5:]) for part in in_many.split(H, dim=1))


@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dims", [(16, 24), (7, 5)], ids=str)
@pytest.mark.parametrize(
    ("name", "value", "spoiled"),
    [
        ("tables", 99, (0, 3)),
        ("tables", -1, (0, 3)),
        ("offsets", 5, (3, 4)),
        ("offsets", -1, (0, 4)),
        ("starts", 30, (3, 4)),
        ("starts", -1, (3, 4)),
        ("starts", 2**62, (3, 4)),
    ],
)
def test_a_row_outside_of_the_cache_is_nan_where_tables_are_on_a_device(
    device: str,  # noqa: F811
    name: str,
    value: int,
    spoiled: tuple[int, int],
    dims: tuple[int, int],
    store: torch.dtype | None,
    generator: torch.Generator,
) -> None:
    """And only that: rows 0 to 2 are of the first sequence, row 3 is of the second."""
    if native.kernels(device).device_type == "cpu":
        pytest.skip("the CPU library refuses such tables")
    paged = Paged.random([(2, 3), (0, 1)], (2, 1), dims, 2, torch.bfloat16, generator, store)
    right = ops.paged_attention(*paged.on(device), 1.0, scales=paged.scales_on(device))
    getattr(paged, name).view(-1)[1] = value
    out = ops.paged_attention(*paged.on(device), 1.0, scales=paged.scales_on(device))
    expected = torch.zeros(4, dtype=torch.bool)
    expected[slice(*spoiled)] = True
    if (name, value) == ("offsets", 5):
        expected = torch.tensor([False, False, False, False])
        expected[3] = True
    assert torch.equal(out.isnan().all(dim=2).all(dim=1).cpu(), expected)
    if name != "offsets":
        assert same_bits(out.cpu()[~expected], right.cpu()[~expected])


def test_float32_is_as_near_to_float64_as_torch_is(
    device: str,  # noqa: F811
    generator: torch.Generator,
) -> None:
    """Against the reference's own error, over rows of many keys."""
    paged = Paged.random([(900, 60)], (8, 2), (64, 64), 16, torch.float32, generator)
    for options in ((0.125, 0, 0.0, None), (0.125, 0, 20.0, None)):
        exact = paged.exact(*options)
        ours = (ops.paged_attention(*paged.on(device), *options).double().cpu() - exact).square().mean().sqrt()
        plain = (reference.paged_attention(*paged.arguments(), *options).double() - exact).square().mean().sqrt()
        assert ours <= 2 * plain


@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_chunk_and_company(
    dtype: torch.dtype, store: torch.dtype | None, generator: torch.Generator
) -> None:
    for which in range(len(OPTIONS)):
        heads = random.choice([(4, 4), (8, 2), (8, 1)])
        paged = Paged.random([(0, 650), (30, 33), (599, 1)], heads, (40, 24), 16, dtype, generator, store)
        options = (*some_options(heads[0], 40, dtype, generator, which), paged.scales)
        query, keys, values, tables, offsets, starts = paged.arguments()
        together = ops.paged_attention(*paged.arguments(), *options)
        first = 0
        while first < 650:
            rows = min(random.choice([1, 1, 2, 7, 64, 200]), 650 - first)
            chunk = ops.paged_attention(
                query[first : first + rows], keys, values, tables[:1], torch.tensor([0, rows]), torch.tensor([first]),
                *options,
            )  # fmt: skip
            assert same_bits(chunk, together[first : first + rows]), (first, rows)
            first += rows
        company = ops.paged_attention(query[650:], keys, values, tables[1:], offsets[1:] - 650, starts[1:], *options)
        assert same_bits(company, together[650:])


@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_blocks_change_no_bit(
    dtype: torch.dtype, store: torch.dtype | None, generator: torch.Generator
) -> None:
    """A few rows over many keys is where spans are split between threads."""
    paged = Paged.random([(1500, 1), (700, 1)], (8, 1), (64, 64), 16, dtype, generator, store)
    options = (0.125, 0, 0.0, None, paged.scales)
    query, keys, values, tables, offsets, starts = paged.arguments()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            results.append(ops.paged_attention(*paged.arguments(), *options))
    finally:
        torch.set_num_threads(before)
    # The same tokens in blocks of four.
    smaller = [tensor.view(-1, 4, *tensor.shape[2:]) for tensor in (keys, values)]
    scales = None if paged.scales is None else paged.scales.view(-1, 4, 1, 2)
    table = (tables[:, :, None] * 4 + torch.arange(4)).flatten(1)
    results.append(ops.paged_attention(query, *smaller, table, offsets, starts, *options[:-1], scales))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_scales_lose_nothing_in_int8(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Values near float16's smallest and in none of its steps: weights times scales would vanish there."""
    paged = Paged.random([(300, 1), (40, 1)], (8, 2), (64, 64), 16, dtype, generator, torch.int8)
    assert paged.scales is not None
    scales = paged.scales.clone()
    scales[..., 1] *= 2.0**-20
    small = dataclasses.replace(paged, scales=scales)
    exact = small.exact(0.125, 0, 0.0, None) * 2.0**20
    out = ops.paged_attention(*small.on(device), 0.125, scales=small.scales_on(device)).cpu().double() * 2.0**20
    # float16 itself has steps of 2^-24, so of 2^-4 here; half of one is lost where the result is rounded.
    step = 2.0**-5 if dtype == torch.float16 else 0.0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, exact, rtol=eps, atol=2 * eps + step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_seen_by_those_who_see_it(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    paged = Paged.random([(5, 30), (3, 4)], (4, 2), (16, 16), 4, dtype, generator)
    query, keys, values, tables, offsets, starts = paged.on(device)
    clean = ops.paged_attention(query, keys, values, tables, offsets, starts, 0.25, 8)
    keys = keys.clone()
    keys[tables[0, 10 // 4], 10 % 4, 0] = torch.nan  # position 10 of the first sequence, kv head 0
    spoiled = ops.paged_attention(query, keys, values, tables, offsets, starts, 0.25, 8)
    touched = torch.zeros(34, 4, dtype=torch.bool)
    touched[10 - 5 : 10 - 5 + 8, :2] = True
    assert spoiled[touched].isnan().all()
    assert same_bits(spoiled[~touched], clean[~touched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_int8_head_without_a_scale_is_seen_by_those_who_see_it(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """A key's or a value's: what was not finite when it was written. Codes of other rows of the tile are finite."""
    paged = Paged.random([(5, 30), (3, 4)], (4, 2), (16, 16), 4, dtype, generator, torch.int8)
    assert paged.scales is not None
    clean = ops.paged_attention(*paged.on(device), 0.25, 8, scales=paged.scales_on(device)).cpu()
    touched = torch.zeros(34, 4, dtype=torch.bool)
    touched[10 - 5 : 10 - 5 + 8, :2] = True
    for which in (0, 1):
        scales = paged.scales.clone()
        scales[paged.tables[0, 10 // 4], 10 % 4, 0, which] = torch.nan
        spoiled = ops.paged_attention(*paged.on(device), 0.25, 8, scales=scales.to(device)).cpu()
        assert spoiled[touched].isnan().all()
        assert same_bits(spoiled[~touched], clean[~touched])


def test_large_scores_do_not_overflow(device: str) -> None:  # noqa: F811
    query, keys = torch.full((1, 1, 16), 1e4).to(device), torch.full((1, 3, 1, 16), 1e4).to(device)
    keys[0, 1] *= -1
    values = torch.tensor([1.0, 5.0, 2.0]).view(1, 3, 1, 1).to(device)
    tables = torch.zeros(1, 1, dtype=torch.int64)
    arguments = [tensor.to(device) for tensor in (tables, torch.tensor([0, 1]), torch.tensor([2]))]
    assert ops.paged_attention(query, keys, values, *arguments, 1.0).item() == 1.5
    assert ops.paged_attention(query, keys, values, *arguments, 1.0, 0, 1.0).item() == pytest.approx(
        (3 * torch.e + 5 / torch.e) / (2 * torch.e + 1 / torch.e), rel=1e-6
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("tables", 99), ("tables", -1), ("offsets", 0), ("offsets", 5), ("starts", 30), ("starts", -1)],
)
def test_tables_that_leave_the_cache_are_refused(name: str, value: int, generator: torch.Generator) -> None:
    paged = Paged.random([(2, 3), (0, 1)], (2, 1), (8, 8), 2, torch.float32, generator)
    tensor = getattr(paged, name)
    tensor.view(-1)[1] = value
    with pytest.raises(NativeError, match="stands outside its block table, or names a block that the cache does not"):
        ops.paged_attention(*paged.arguments(), 1.0)


def test_the_list_of_what_cuda_lacks_is_one() -> None:
    """native.py and op_kernels.py say the same of which entries the CUDA library lacks."""
    entries = {name.removeprefix("hb_").replace("linear4", "linear_4bit") for name in native.CPU_ONLY}
    assert entries == op_kernels.REFERENCE_ONLY["cuda"]
