"""Rows with the int8 matrices of their experts in one call: the bits of products alone, and of the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quant import ops, reference
from tests.quant import operands
from tests.quant.operands import Experts8, same_bits
from tests.quant.test_native import DTYPES, device, no_reference_behind_the_back  # noqa: F401

RULES = ["value", "batch", "all"]
ROWS = [
    ([1], (65, 192), 0),
    ([0, 2, 0, 5], (130, 576), 0),
    ([3, 9, 0, 17, 1], (7, 33), 2),
    ([11, 0, 20], (63, 1083), 0),
    ([33, 0, 70], (129, 328), 1),
    ([0, 0], (33, 64), 3),
    ([70], (70, 128), 0),
]
"""The rows of each expert, the shape of a matrix, rows of no expert: tiles of every size on a GPU, copies whole and
broken, K in one slice or more."""


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


def alone(device: str, given: Experts8, threshold: float, outliers: str, with_bias: bool) -> torch.Tensor:  # noqa: F811
    """linear_8bit of each expert's rows on a device; rows behind the last end give zeros."""
    out = given.x.new_zeros(len(given.x), given.CB.shape[1])
    for expert, rows in reference.expert_rows(given.ends):
        own = [tensor.to(device) for tensor in (given.x[rows], given.CB[expert], given.SCB[expert])]
        bias = given.bias[expert].to(device) if with_bias else None
        out[rows] = ops.linear_8bit(own[0], own[1], own[2], threshold, outliers, bias).cpu()
    return out


@pytest.mark.parametrize("outliers", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_8bit_experts_have_the_bits_of_products_alone(
    device: str,  # noqa: F811
    dtype: torch.dtype,
    outliers: str,
    generator: torch.Generator,
) -> None:
    """And those of the reference, where no sum has an order of its own."""
    for turn, (rows, shape, behind) in enumerate(ROWS):
        given = Experts8.random(rows, shape, behind, dtype, generator)
        given.x[len(given.x) // 2 :, 20:31:5], given.x[0, -1] = 20.0, -30.0
        threshold, with_bias = (0.0, 2.5, 6.0)[turn % 3], turn % 2 == 0
        out = given.multiply(device, threshold, outliers, with_bias)
        assert same_bits(out, alone(device, given, threshold, outliers, with_bias)), (rows, shape)
        expected = given.reference(threshold, outliers, with_bias)
        if outliers == "all":
            room = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
            torch.testing.assert_close(out, expected, rtol=room, atol=room * float(expected.abs().max()))
        else:
            assert same_bits(out, expected), (rows, shape)


@pytest.mark.parametrize("outliers", RULES)
def test_linear_8bit_experts_without_rows_are_not_read(
    device: str,  # noqa: F811
    outliers: str,
    generator: torch.Generator,
) -> None:
    given = Experts8.random([0, 2, 0, 3], (70, 128), 0, torch.bfloat16, generator)
    expected = given.multiply(device, 1.0, outliers)
    for tensor in (given.SCB, given.bias):
        tensor[[0, 2]] = torch.nan
    assert same_bits(given.multiply(device, 1.0, outliers), expected)
    given.SCB[3, -1] = torch.nan
    assert given.multiply(device, 1.0, outliers)[2:, -1].isnan().all()


def test_an_outlier_column_is_one_of_an_experts_rows_alone(
    device: str,  # noqa: F811
    generator: torch.Generator,
) -> None:
    """By the batch rule: a neighbour's outlier makes none of another expert's values one."""
    given = Experts8.random([4, 0, 5], (33, 250), 2, torch.float32, generator)
    quiet = given.multiply(device, 6.0, "batch")
    given.x[1, 7] = 80.0
    given.x[-1, 9] = 80.0  # nobody's
    loud = given.multiply(device, 6.0, "batch")
    assert same_bits(loud[4:], quiet[4:])
    assert not any(same_bits(loud[row], quiet[row]) for row in range(4))


def test_linear_8bit_experts_read_operands_that_no_wide_copy_can_be_made_of(
    device: str,  # noqa: F811
    generator: torch.Generator,
) -> None:
    given = Experts8.random([9, 0, 2], (65, 192), 1, torch.float16, generator)
    for outliers in RULES:
        out = given.multiply(device, 2.5, outliers)
        for name in ("x", "CB"):
            values: torch.Tensor = getattr(given, name)
            moved = torch.cat([values.new_zeros(1), values.view(-1)])[1:].view(values.shape)
            assert same_bits(dataclasses.replace(given, **{name: moved}).multiply(device, 2.5, outliers), out)


def test_linear_8bit_experts_sums_beyond_int32_are_exact(
    device: str,  # noqa: F811
    generator: torch.Generator,
) -> None:
    """More than 2^17 columns, in which the second expert's codes differ from the first's."""
    K = 131_072 + 4_000
    CB = torch.full((2, 1, K), 127, dtype=torch.int8)
    CB[1, 0, -700:] = torch.randint(-128, 128, (700,), generator=generator, dtype=torch.int8)
    x = torch.full((3, K), 2.0)
    given = Experts8(x, torch.tensor([1, 3]), CB, torch.full((2, 1), 3.0), torch.randn(2, 1, generator=generator))
    assert same_bits(given.multiply(device, 0.0, "value"), given.reference(0.0, "value"))


@pytest.mark.parametrize(("shape", "rows"), [((0, 64), [2, 1]), ((7, 64), [0, 0]), ((7, 0), [2, 1]), ((7, 64), [])])
@pytest.mark.parametrize("outliers", RULES)
def test_linear_8bit_experts_of_nothing(
    device: str,  # noqa: F811
    shape: tuple[int, int],
    rows: list[int],
    outliers: str,
    generator: torch.Generator,
) -> None:
    for dtype in DTYPES:
        given = Experts8.random(rows, shape, 3, dtype, generator)
        out = given.multiply(device, 1.0, outliers)
        assert same_bits(out, given.reference(1.0, outliers))
        assert not out[sum(rows) :].any()
