"""Attention past torch's dispatcher: the same bits as through it, whatever layer comes next, and the same refusals."""

from __future__ import annotations

import pytest
import torch

from quant import ops
from quant.direct import is_direct
from quant.direct_attention import DirectAttention
from quant.errors import NativeError, ShapeError
from tests.quant import operands
from tests.quant.operands import Paged


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.no_grad():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


def options(generator: torch.Generator, heads: int) -> list[tuple[float, int, float, torch.Tensor | None]]:
    sinks = torch.randn(2, heads, generator=generator)
    return [
        (0.3, 0, 0.0, None),
        (0.3, 5, 0.0, sinks[0]),
        (0.3, 5, 0.0, sinks[1]),
        (0.3, 5, 0.0, sinks[1].half()),
        (0.2, 0, 7.0, sinks.repeat_interleave(2, 1)[0, ::2]),  # not contiguous
        (0.3, 0, 0.0, None),
    ]


@pytest.mark.parametrize("store", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sequences", [[(0, 1)], [(700, 1)], [(3, 9), (0, 1), (40, 20)]])
def test_the_bits_are_the_dispatched_ones(
    sequences: list[tuple[int, int]], dtype: torch.dtype, store: torch.dtype | None, generator: torch.Generator
) -> None:
    """Layers of several shapes and options in turn over one batch's tables."""
    layers = [
        Paged.random(sequences, (4, 2), dims, 16, dtype, generator, store) for dims in ((24, 40), (24, 40), (7, 3))
    ]
    first = layers[0]
    direct = DirectAttention(first.tables, first.offsets, first.starts)
    for chosen in options(generator, 4):
        for layer in layers:
            assert is_direct(layer.query)
            tables = (first.tables, first.offsets, first.starts)
            # Blocks are where the first layer has them.
            keys, values = layer.keys.nan_to_num(), layer.values.nan_to_num()
            scales = None if layer.scales is None else layer.scales.nan_to_num()
            for query in (layer.query, layer.query.contiguous(), layer.query.repeat_interleave(2, 2)[..., ::2]):
                out = direct(query, keys, values, *chosen, scales)
                assert operands.same_bits(out, ops.paged_attention(query, keys, values, *tables, *chosen, scales))
            spread = direct(layer.query, apart(keys), apart(values), *chosen, None if scales is None else apart(scales))
            assert operands.same_bits(spread, direct(layer.query, keys, values, *chosen, scales))


def apart(store: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return store.repeat_interleave(2, 3)[..., ::2]


def test_a_change_of_threads_is_noticed(generator: torch.Generator) -> None:
    paged = Paged.random([(0, 300), (900, 1)], (8, 2), (64, 64), 16, torch.float32, generator)
    direct = DirectAttention(paged.tables, paged.offsets, paged.starts)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            found.append(direct(paged.query, paged.keys, paged.values, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert operands.same_bits(found[0], found[1])
    assert operands.same_bits(found[0], found[2])


def test_bad_input_is_refused_in_a_sentence(generator: torch.Generator) -> None:
    paged = Paged.random([(3, 2)], (4, 2), (8, 6), 4, torch.float32, generator)
    direct = DirectAttention(paged.tables, paged.offsets, paged.starts)
    direct(paged.query, paged.keys, paged.values, 0.5)
    with pytest.raises(ShapeError, match="query has 3 heads"):
        direct(paged.query[:, :3], paged.keys, paged.values, 0.5)
    with pytest.raises(ShapeError, match="values have dtype torch.float32 but keys have torch.float16"):
        direct(paged.query, paged.keys.half(), paged.values, 0.5)
    with pytest.raises(ShapeError, match="scales are missing"):
        direct(paged.query, paged.keys.to(torch.int8), paged.values.to(torch.int8), 0.5)
    with pytest.raises(ShapeError, match="sinks have shape"):
        direct(paged.query, paged.keys, paged.values, 0.5, sinks=torch.zeros(3))
    with pytest.raises(NativeError, match="hb_paged_attention"):
        direct(paged.query[:1], paged.keys, paged.values, 0.5)  # offsets say two rows
    with pytest.raises(NativeError, match="hb_paged_attention"):
        DirectAttention(paged.tables + 100, paged.offsets, paged.starts)(paged.query, paged.keys, paged.values, 0.5)
