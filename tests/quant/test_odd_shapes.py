"""Shapes and values at the edges, against a decoder of the format written out in plain Python.

Each of bitsandbytes 0.50.2's errors on a CPU is here by what it got wrong: rows that are no multiple of the block, odd
sizes that it refuses, a weight that a forward pass rewrites, inexact codes of block maxima, inputs written to.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, PackedWeight, formats, ops
from quant.state import STATE_PREFIX, Packed4bit

SHAPES = [(3, 48), (5, 80), (2, 96), (3, 1056), (33, 100), (7, 9), (1, 1), (1, 63), (31, 65)]
"""[N, K]: K no multiple of 64, N none of 32, N K odd, less than one block."""
FORMS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def decode(tensors: dict[str, torch.Tensor], quant_type: str) -> list[float]:
    """The values of a packed weight in float32, from its checkpoint tensors and the format's definition alone."""
    state = json.loads(bytes(tensors[STATE_PREFIX + quant_type].tolist()))
    absmax = [float(value) for value in tensors["weight.absmax"]]
    if "nested_offset" in state:
        table, scales = tensors["weight.nested_quant_map"], tensors["weight.nested_absmax"]
        groups = [int(block // state["nested_blocksize"]) for block in range(len(absmax))]
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        absmax = [float(table[int(c)] * scales[g] + offset) for c, g in zip(absmax, groups, strict=True)]
    codes: list[int] = []
    for byte in tensors["weight"].flatten().view(torch.uint8).tolist():
        codes += [byte >> 4, byte & 15]
    table = tensors["weight.quant_map"].tolist()
    count = math.prod(state["shape"])
    maxima = torch.tensor([absmax[index // state["blocksize"]] for index in range(count)], dtype=torch.float32)
    values = torch.tensor([table[code] for code in codes[:count]], dtype=torch.float32) * maxima
    return [float(value) for value in values]


def config_of(quant_type: str, nested: bool, **changes: object) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested, **changes
    )


def linear_of(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [*SHAPES, (13,), (3, 5, 7)], ids=str)
def test_values_are_those_of_the_definition(
    shape: tuple[int, ...], blocksize: int, quant_type: str, nested: bool
) -> None:
    weight = torch.randn(*shape)
    packed = Packed4bit.quantize(weight, quant_type, blocksize=blocksize, double_quant=nested)
    tensors = packed.to_checkpoint()
    values = PackedWeight.from_checkpoint(tensors).dequantize()
    assert values.shape == shape
    assert values.flatten().tolist() == decode(tensors, quant_type)
    # A block's error is at most half of the widest gap between two codes of its maximum, and what rounding it costs.
    assert float((values - weight).abs().max()) <= 0.2 * float(weight.abs().max())


@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_products_of_any_shape_and_a_weight_that_stays(
    shape: tuple[int, int], quant_type: str, nested: bool, rows: int
) -> None:
    layer = Linear4bit.from_float(linear_of(torch.randn(*shape)), config_of(quant_type, nested))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = torch.tensor(decode(before, quant_type), dtype=torch.float64).view(shape)
    x = torch.randn(rows, shape[1])
    kept = x.clone()
    for _ in range(2):
        result = layer(x)
        size = x.double().abs() @ weight.abs().t()  # whose rounding errors a float32 sum of any order may have
        assert ((result.double() - x.double() @ weight.t()).abs() <= 6e-7 * size).all()
    assert torch.equal(x, kept)
    after = layer.state_dict()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    # The file that is written after a forward pass gives the same layer as the one from before.
    twin = copy.deepcopy(layer)
    twin.load_state_dict(after)
    assert torch.equal(twin(x), result)


@pytest.mark.parametrize("shape", [(1, 1), (33, 250), (7, 13), (5, 1001)], ids=str)
@pytest.mark.parametrize("outliers", ["value", "batch"])
@torch.no_grad()
def test_int8_products_of_any_shape_leave_their_input_alone(shape: tuple[int, int], outliers: str) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers=outliers)
    layer = Linear8bit.from_float(linear_of(torch.randn(*shape)), config)
    x = torch.randn(4, shape[1])
    x[:, 0] = 20.0
    kept = x.clone()
    result = layer(x)
    expected = x.double() @ layer.dequantize().double().t()
    # 0.0075 on average of 1001 columns, of a largest value of 3.3; four times that are twenty sums all astray.
    # An outlier left out, or one row's scale twice too large, is ten times the bound.
    assert float((result - expected).norm() / expected.norm()) < 0.04
    assert torch.equal(x, kept)


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 1000])
def test_codes_of_block_maxima_are_the_nearest(blocks: int) -> None:
    """bitsandbytes looks them up in a table of 65536 bins on a CPU, which misses one in 600."""
    absmax = torch.rand(blocks) * 3
    codes, nested_absmax, offset = ops.quantize_absmax(absmax)
    scale = nested_absmax.repeat_interleave(formats.NESTED_BLOCKSIZE)[:blocks].double()
    distances = (formats.DYNAMIC_TABLE.double()[None] * scale[:, None] - (absmax - offset).double()[:, None]).abs()
    chosen = distances.gather(1, codes.long()[:, None]).flatten()
    assert bool((chosen <= distances.amin(dim=1) * (1 + 1e-5) + 1e-9).all())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@torch.no_grad()
def test_a_block_of_zeros(quant_type: str, nested: bool) -> None:
    """It is written with the code of zero; the other spelling, code 0, is read (CUDA kernels write it for NF4)."""
    weight = torch.randn(4, 64)
    weight[2] = 0.0
    packed = Packed4bit.quantize(weight, quant_type, double_quant=nested)
    zero = formats.FOUR_BIT[quant_type].zero_code
    assert set(packed.codes[64:96].tolist()) == {zero << 4 | zero}
    assert not packed.dequantize()[2].any()
    tensors = {name: tensor.clone() for name, tensor in packed.to_checkpoint().items()}
    tensors["weight"][64:96] = 0
    other = PackedWeight.from_checkpoint(tensors)
    values = other.dequantize()
    assert torch.equal(values[[0, 1, 3]], packed.dequantize()[[0, 1, 3]])
    # Its maximum is zero, or what double quantization makes of zero: not quite zero.
    residual = 0.01 * float(weight.abs().max()) if nested else 0.0
    assert float(values[2].abs().max()) <= residual
    layer = Linear4bit.from_float(linear_of(weight), config_of(quant_type, nested))
    layer.adopt(other)
    torch.testing.assert_close(layer(torch.eye(64)).t(), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_subnormal_values_keep_their_relative_error(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    weight = (torch.rand(2, 64) * 2 - 1).mul(smallest / 2).to(dtype)
    values = Packed4bit.quantize(weight, "nf4").dequantize(torch.float32)
    assert float(values.abs().max()) > 0
    exact = weight.double()  # whose squares float32 would lose
    assert float((values.double() - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_block(special: float) -> None:
    weight = torch.randn(4, 128)
    expected = Packed4bit.quantize(weight, "nf4").dequantize()
    weight[2, 5] = special
    layer = Linear4bit.from_float(linear_of(weight), config_of("nf4", False))
    values = layer.dequantize()
    assert not values[2, :64].isfinite().all()
    untouched = torch.ones(4, 128, dtype=torch.bool)
    untouched[2, :64] = False
    assert torch.equal(values[untouched], expected[untouched])
    result = layer(torch.randn(3, 128))
    assert result[:, [0, 1, 3]].isfinite().all()
    assert not result[:, 2].isfinite().any()


@pytest.mark.parametrize("outliers", ["value", "batch"])
@torch.no_grad()
def test_activations_that_are_not_finite_stay_in_their_row(outliers: str) -> None:
    layers = [
        Linear4bit.from_float(nn.Linear(128, 32), config_of("nf4", True)),
        Linear8bit.from_float(nn.Linear(128, 32), BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers=outliers)),
    ]
    for layer in layers:
        x = torch.randn(3, 128)
        x[1, 7] = math.inf
        result = layer(x)
        assert result[[0, 2]].isfinite().all()
        assert not result[1].isfinite().any()


@torch.no_grad()
def test_negative_maxima_are_multiplied_as_they_stand() -> None:
    layer = Linear4bit.from_float(nn.Linear(128, 32, bias=False), config_of("nf4", False))
    x = torch.randn(3, 128)
    expected = layer(x)
    layer.absmax.neg_()
    assert torch.equal(layer(x), -expected)
