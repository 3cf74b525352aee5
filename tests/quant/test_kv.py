"""Keys and values in 8 bits: how far a value is from what it was, and the heads that have no scale."""

from __future__ import annotations

import pytest
import torch

from quant import formats, kv
from tests.quant import operands

CODES = torch.arange(-127, 128)


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


@pytest.mark.parametrize("dtype", [torch.float64, *formats.VALUE_DTYPES], ids=str)
@pytest.mark.parametrize("size", [1, 2, 33, 128, 4096])
def test_a_value_is_off_by_half_a_scale(dtype: torch.dtype, size: int, generator: torch.Generator) -> None:
    """And by the rounding of five float32 operations, none of which is larger than absmax, or 127 of a code."""
    rows = (
        torch.randn(50, 3, size, generator=generator) * 10 ** (torch.rand(50, 3, 1, generator=generator) * 8 - 4)
    ).to(dtype)
    codes, scales = kv.quantize_heads(rows)
    absmax = rows.double().abs().amax(dim=-1, keepdim=True)
    found = kv.dequantize_heads(codes, scales, torch.float32).double()
    assert ((found - rows.double()).abs() <= absmax * (1 / 254 + 2.0**-21)).all()
    assert codes.abs().amax(dim=-1).eq(127).all()


def test_what_codes_hold_comes_back(generator: torch.Generator) -> None:
    """Values that lie on the grid, whatever its step: a power of two, so that nothing is rounded."""
    steps = 2.0 ** torch.randint(-50, 50, (9, 1), generator=generator)
    codes, scales = kv.quantize_heads(CODES * steps)
    assert torch.equal(codes, CODES.to(torch.int8).expand(9, -1))
    assert torch.equal(scales, steps[:, 0])
    assert torch.equal(kv.dequantize_heads(codes, scales, torch.float32), CODES * steps)


def test_heads_without_a_scale() -> None:
    small = formats.SMALLEST_STORED
    rows = torch.tensor([[0.0, 0.0], [small, 0.0], [small / 2, -small / 2], [1e-40, 0.0], [torch.nan, 1.0]])
    rows = torch.cat([rows, torch.tensor([[torch.inf, 1.0], [-torch.inf, torch.nan]])])
    codes, scales = kv.quantize_heads(rows)
    assert codes.tolist() == [[0, 0], [127, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert scales[:4].tolist() == [0.0, pytest.approx(small / 127), 0.0, 0.0]
    assert scales[4:].isnan().all()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 256), (torch.bfloat16, 128), (torch.int8, 68)])
def test_bytes_of_a_head(dtype: torch.dtype, expected: int) -> None:
    assert kv.head_bytes(64, dtype) == expected
