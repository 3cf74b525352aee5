"""The 4-bit matmul's kernels on tensor cores against float64; Hopper's rows against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant import formats, native
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


@pytest.fixture(params=["mma", "hopper"])
def either(device: str, request: pytest.FixtureRequest) -> native.Kernels:
    """Those that multiply sums with their scales: that of every architecture, and that of Hopper."""
    if request.param == "hopper":
        own: native.Kernels = request.getfixturevalue("hopper")
        return own
    return native.kernels(device)


def assert_near(out: torch.Tensor, x: torch.Tensor, weight: Weight4, bias: torch.Tensor) -> None:
    """Every rounding counted, each at its largest: only the table is rounded to x's dtype, and the result.

    Up to 64 products are added up at once, such sums one after the other, then slices and the bias; tensor cores cut
    off what float32 would round.
    """
    dense = weight.dense().double()
    exact = x.double() @ dense.t() + bias.double()
    size = x.double().abs() @ dense.abs().t() + bias.double().abs()
    K, limits = x.shape[1], torch.finfo(x.dtype)
    table = limits.eps / 2 * size
    sums = (64 + K / 32 + K / 512 + 2) * 2**-23 * size
    rounding = torch.clamp((exact.abs() + table + sums) * limits.eps, min=limits.smallest_normal * limits.eps) / 2
    assert out.dtype == x.dtype
    assert ((out.double() - exact).abs() <= table + sums + rounding).all(), (weight.shape, len(x))


@pytest.mark.parametrize("nested", [None, 256], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_only_the_table_and_the_result_are_rounded(
    either: native.Kernels, device: str, dtype: torch.dtype, nested: int | None, generator: torch.Generator
) -> None:
    """N anything, K short and long beside a stage, every block size, and every number of rows at which tiles change."""
    shapes = [(1, 64), (65, 192), (130, 576), (63, 1088), (33, 2112), (129, 320), (64, 128), (2, 4096)]
    rows = [1, 8, 9, 17, 33, 65, 16, 32]
    for shape, M, blocksize, quant_type in zip(shapes, rows, formats.BLOCKSIZES, [*formats.FOUR_BIT] * 4, strict=True):
        weight = Weight4.random(shape, quant_type, blocksize, nested, generator)
        x = torch.randn(M, shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator)
        moved = weight.to(device).arguments(bias.to(device))
        out = either.linear_4bit(x.to(device), *moved)
        assert_near(out.cpu(), x, weight, bias)
        shifted = torch.cat([x.new_zeros(1), x.view(-1)]).to(device)[1:].view(x.shape)  # no wide copy can be made of it
        assert same_bits(either.linear_4bit(shifted, *moved), out)


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
    hopper: native.Kernels, device: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which way a call goes is told by the workspace that it asks for: Hopper's holds x once more."""
    other = native.Kernels(hopper.library, hopper.device_type)
    asked: list[int] = []
    workspace_bytes = native.Kernels.workspace_bytes

    def noted(self: native.Kernels, entry: str, args: Any, *count: int) -> int:
        asked.append(workspace_bytes(self, entry, args, *count))
        return asked[-1]

    monkeypatch.setattr(native.Kernels, "workspace_bytes", noted)

    def goes_the_same_way(x: torch.Tensor, weight: Weight4) -> bool:
        arguments = weight.to(device).arguments()
        asked.clear()
        found, expected = (kernels.linear_4bit(x.to(device), *arguments) for kernels in (hopper, other))
        by_hopper, by_other = asked
        return by_hopper == by_other and same_bits(found, expected)

    x = torch.randn(9, 192, generator=generator)
    plain = Weight4.random((65, 192), "nf4", 64, None, generator)
    assert goes_the_same_way(x, plain)  # float32
    assert goes_the_same_way(x[:, :100].to(torch.bfloat16), Weight4.random((65, 100), "nf4", 64, None, generator))
    assert goes_the_same_way(x.to(torch.bfloat16), Weight4.random((65, 192), "nf4", 64, 3, generator))
    assert not goes_the_same_way(x.to(torch.bfloat16), plain)
