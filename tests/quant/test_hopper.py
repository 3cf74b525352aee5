"""The 4-bit matmul's kernel for Hopper against float64, and its rows against each other."""

from __future__ import annotations

import pytest
import torch

from quant import formats, native, reference
from tests.quant import operands
from tests.quant.operands import Weight4, same_bits

SIXTEEN_BITS = [torch.float16, torch.bfloat16]


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    reason = native.unavailable_because("cuda")
    if reason is not None:
        pytest.skip(reason)
    name: str = request.param
    return name


@pytest.fixture
def hopper(device: str) -> native.Kernels:
    """The kernels of `device`, with the one for Hopper where it can be had."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    kernels = native.kernels(device)
    return native.Kernels(kernels.library, kernels.device_type, "hopper")


def assert_near(out: torch.Tensor, x: torch.Tensor, weight: Weight4, bias: torch.Tensor) -> None:
    """Every rounding counted, each at its largest: only the table is rounded to x's dtype, and the result.

    Up to 64 products are added up at once, such sums one after the other, then slices and the bias; tensor cores cut
    off what float32 would round.
    """
    absmax = weight.plain_absmax()
    table = reference.dequantize_4bit(
        weight.packed, torch.ones_like(absmax), weight.quant_type, weight.blocksize, weight.shape, x.dtype
    )
    scales = absmax.double().repeat_interleave(weight.blocksize)[: table.numel()].view(table.shape)
    dense = table.double() * scales
    exact = x.double() @ dense.t() + bias.double()
    size = x.double().abs() @ dense.abs().t() + bias.double().abs()
    K, limits = x.shape[1], torch.finfo(x.dtype)
    sums = (64 + K / 32 + K / 512 + 2) * 2**-23 * size
    rounding = torch.clamp((exact.abs() + sums) * limits.eps, min=limits.smallest_normal * limits.eps) / 2
    assert out.dtype == x.dtype
    assert ((out.double() - exact).abs() <= sums + rounding).all(), (weight.shape, len(x))


@pytest.mark.parametrize("nested", [None, 256], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_hopper_rounds_only_the_table_and_the_result(
    hopper: native.Kernels, device: str, dtype: torch.dtype, nested: int | None, generator: torch.Generator
) -> None:
    """N anything, K short and long beside a stage, every block size, and every number of rows at which tiles change."""
    shapes = [(1, 64), (65, 192), (130, 576), (63, 1088), (33, 2112), (129, 320), (64, 128), (2, 4096)]
    rows = [1, 8, 9, 17, 33, 65, 16, 32]
    for shape, M, blocksize, quant_type in zip(shapes, rows, formats.BLOCKSIZES, [*formats.FOUR_BIT] * 4, strict=True):
        weight = Weight4.random(shape, quant_type, blocksize, nested, generator)
        x = torch.randn(M, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator)
        moved = weight.to(device).arguments(bias.to(device))
        out = hopper.linear_4bit(x.to(device), *moved)
        assert_near(out.cpu(), x, weight, bias)
        shifted = torch.cat([x.new_zeros(1), x.view(-1)]).to(device)[1:].view(x.shape)  # no wide copy can be made of it
        assert same_bits(hopper.linear_4bit(shifted, *moved), out)


@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_hopper_row_is_the_same_in_every_batch(
    hopper: native.Kernels, device: str, dtype: torch.dtype, blocksize: int, generator: torch.Generator
) -> None:
    arguments = Weight4.random((70, 1088), "nf4", blocksize, 256, generator).to(device).arguments()
    x = torch.randn(130, 1088, generator=generator).to(dtype).to(device)
    x[6, ::3] = torch.nan  # a poisoned neighbour is seen by no other row
    together = hopper.linear_4bit(x, *arguments)
    for rows in (1, 8, 9, 17, 33, 65):
        assert same_bits(hopper.linear_4bit(x[:rows], *arguments), together[:rows]), rows
    assert same_bits(hopper.linear_4bit(x[129], *arguments), together[129])
    assert together[6].isnan().all()
    assert together[[5, 7]].isfinite().all()


def test_hopper_rows_are_the_same_however_the_work_is_cut(
    hopper: native.Kernels, device: str, generator: torch.Generator
) -> None:
    """So many tiles that thread blocks go over all of K, against so few that K is shared out among them."""
    N, rows = (2200, 2048) if device == "cuda" else (3, 700)
    arguments = Weight4.random((N, 640), "nf4", 64, 256, generator).to(device).arguments()
    x = torch.randn(rows, 640, generator=generator).to(torch.bfloat16).to(device)
    together = hopper.linear_4bit(x, *arguments)
    for few in (1, 40, 100):
        assert same_bits(hopper.linear_4bit(x[:few], *arguments), together[:few]), few


def test_hopper_rows_are_the_same_in_every_panel(
    hopper: native.Kernels, device: str, generator: torch.Generator
) -> None:
    weight = Weight4.random((2, 64), "fp4", 64, None, generator)
    x = torch.randn(2049, 64, generator=generator).to(torch.float16)
    bias = torch.randn(2, generator=generator)
    arguments = weight.to(device).arguments(bias.to(device))
    together = hopper.linear_4bit(x.to(device), *arguments)
    assert_near(together.cpu(), x, weight, bias)
    assert same_bits(hopper.linear_4bit(x[2048:].to(device), *arguments), together[2048:])


def test_what_hopper_does_not_take_goes_the_other_way(
    hopper: native.Kernels, device: str, generator: torch.Generator
) -> None:
    other = native.Kernels(hopper.library, hopper.device_type)

    def same(x: torch.Tensor, weight: Weight4) -> bool:
        arguments = weight.to(device).arguments()
        return same_bits(hopper.linear_4bit(x.to(device), *arguments), other.linear_4bit(x.to(device), *arguments))

    x = torch.randn(9, 192, generator=generator)
    plain = Weight4.random((65, 192), "nf4", 64, None, generator)
    assert same(x, plain)  # float32
    assert same(x[:, :100].to(torch.bfloat16), Weight4.random((65, 100), "nf4", 64, None, generator))
    assert same(x.to(torch.bfloat16), Weight4.random((65, 192), "nf4", 64, 3, generator))
    assert not same(x.to(torch.bfloat16), plain)
