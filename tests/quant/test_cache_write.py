"""Keys and values written into a paged cache on every device: what goes where, and what is left alone.

Calls past the dispatcher are test_rows.py's.
"""

from __future__ import annotations

import pytest
import torch

from quant import ops, reference
from tests.quant import operands
from tests.quant.operands import same_bits
from tests.quant.test_native import device  # noqa: F401

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORES = [*DTYPES, torch.int8]
SIZES = [(1, 1, 1, 1), (5, 2, 16, 8), (3, 4, 7, 33), (40, 8, 128, 128), (9, 3, 96, 40), (0, 2, 8, 8)]
"""T, G, D, E: pieces of 16 bytes, and none."""
BLOCKS, BLOCK_TOKENS = 11, 4
SLOTS = BLOCKS * BLOCK_TOKENS


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


def some_rows(
    size: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Key and value, stores of random bits, and slots of which some are not in the cache, on both sides of it."""
    T, G, D, E = size
    rows = [torch.randn(T, G, dim, generator=generator).to(dtype) for dim in (D, E)]
    word = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(word)
    stores = [
        torch.randint(limits.min, limits.max, (BLOCKS, BLOCK_TOKENS, G, dim), generator=generator, dtype=word)
        for dim in (D, E)
    ]
    slots = torch.randperm(SLOTS, generator=generator)[:T]
    slots[1::4] = torch.tensor([-1, SLOTS, -(2**62), 2**62]).repeat(T)[: len(slots[1::4])]
    return rows, [store.view(dtype) for store in stores], slots


def written(stores: list[torch.Tensor], rows: list[torch.Tensor], slots: torch.Tensor) -> list[torch.Tensor]:
    """The definition, one row at a time."""
    out = [store.clone() for store in stores]
    for row, slot in enumerate(slots.tolist()):
        for store, source in zip(out, rows, strict=True):
            if 0 <= slot < SLOTS:
                store[slot // BLOCK_TOKENS, slot % BLOCK_TOKENS] = source[row]
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_go_to_their_slots_and_nowhere_else(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    generator: torch.Generator,
) -> None:
    rows, stores, slots = some_rows(size, dtype, generator)
    expected = written(stores, rows, slots)
    heads_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in rows]
    shifted = [torch.cat([tensor[..., :1], tensor], dim=-1)[..., 1:] for tensor in rows]
    for given in (rows, heads_first, shifted):
        found = [store.to(device, copy=True) for store in stores]
        ops.cache_write(*(tensor.to(device) for tensor in given), *found, slots.to(device))
        assert all(same_bits(one.cpu(), other) for one, other in zip(found, expected, strict=True))
    by_reference = [store.clone() for store in stores]
    reference.cache_write(rows[0], rows[1], by_reference[0], by_reference[1], slots)
    assert all(same_bits(one, other) for one, other in zip(by_reference, expected, strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_to_the_caches_dtype(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    store: torch.dtype,
    size: tuple[int, int, int, int],
    generator: torch.Generator,
) -> None:
    """As torch rounds, and in int8 as quant/kv.py says; what lies in other slots stays, scales too."""
    rows, _, slots = some_rows(size, dtype, generator)
    for tensor in rows:
        spoil_some_heads(tensor, generator)
    expected, of_expected = a_cache(size, store, generator)
    found = [tensor.to(device, copy=True) for tensor in expected]
    scales = None if of_expected is None else of_expected.to(device, copy=True)
    heads_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1).to(device) for tensor in rows]
    ops.cache_write(heads_first[0], heads_first[1], found[0], found[1], slots.to(device), scales)
    reference.cache_write(rows[0], rows[1], expected[0], expected[1], slots, of_expected)
    assert all(same_bits(one.cpu(), other) for one, other in zip(found, expected, strict=True))
    if of_expected is not None:
        assert scales is not None
        assert same_bits(scales.cpu(), of_expected)


def spoil_some_heads(rows: torch.Tensor, generator: torch.Generator) -> None:
    """Heads of zeros, of what is nearly nothing, of huge values, with a NaN or an infinity."""
    size = rows.shape[2]
    for index, scale in enumerate((0.0, 2.0**-64, 2.0**-66, 2.0**-130, 3e38)):
        rows[index::7] = (rows[index::7].float() * scale).clamp(-3e38, 3e38).to(rows.dtype)
    for index, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        rows[5 + 7 * index :: 21, :, int(torch.randint(size, (), generator=generator))] = value


def a_cache(
    size: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Stores, and in int8 their scales, full of what is recognised again."""
    _, G, D, E = size
    heads = (BLOCKS, BLOCK_TOKENS, G)
    if dtype != torch.int8:
        return [torch.randn(*heads, dim, generator=generator).to(dtype) for dim in (D, E)], None
    stores = [torch.randint(-128, 128, (*heads, dim), generator=generator, dtype=dtype) for dim in (D, E)]
    return stores, torch.randn(*heads, 2, generator=generator)


def test_threads_change_nothing(generator: torch.Generator) -> None:
    rows, stores, slots = some_rows((40, 8, 512, 512), torch.float32, generator)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found = [store.clone() for store in stores]
            ops.cache_write(rows[0], rows[1], found[0], found[1], slots)
            expected = written(stores, rows, slots)
            assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(threads)
