"""quant/report.py: what it says of a layer is what a plain computation on the whole layer says."""

from __future__ import annotations

import pytest
import torch

from quant import BitsAndBytesConfig, formats
from quant.config import from_spec
from quant.report import OUTLIER_RMS, LayerMeter, measure_layer, report_model, summarize
from quant.state import Packed4bit, Packed8bit, PackedWeight
from tests.tiny_models import tiny_model


def packed_as(name: str, weight: torch.Tensor) -> PackedWeight:
    if name == "int8":
        return Packed8bit.quantize(weight)
    return Packed4bit.quantize(weight, name[:3], double_quant=name.endswith("-dq"))


@pytest.mark.parametrize("shape", [(64, 128), (1100, 1024), (3, 999_983), (7, 5), (1, 1)])
@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-dq", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_plain_computation(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
    packed = packed_as(name, weight)
    report = measure_layer("layer", packed, weight)
    exact = weight.double()
    error = (packed.dequantize(torch.float32).double() - exact).norm() / exact.norm()
    outliers = (exact.abs() > OUTLIER_RMS * exact.square().mean().sqrt()).double().mean()
    assert report.relative_error == pytest.approx(float(error), rel=1e-5, abs=1e-12)
    assert report.outlier_share == pytest.approx(float(outliers), abs=2 / weight.numel())
    assert (report.name, report.format, report.shape) == ("layer", name, shape)


@pytest.mark.parametrize(
    ("name", "bits"), [("nf4", 4.5), ("fp4-dq", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + 32 / 1024)]
)
def test_bits_per_weight_are_the_formats(name: str, bits: float) -> None:
    report = measure_layer("layer", packed_as(name, torch.randn(1024, 1024)))
    assert report.bits_per_weight == pytest.approx(bits, abs=1e-4)
    assert report.relative_error is None
    assert report.to_dict()["bits_per_weight"] == report.bits_per_weight


def test_known_error_of_nf4_on_normal_weights() -> None:
    """Mean squared error 0.00846 of the variance: a published figure, see docs/quantization.md's formats."""
    weight = torch.randn(512, 1024)
    report = measure_layer("layer", packed_as("nf4", weight), weight)
    assert report.relative_error is not None
    assert report.relative_error**2 == pytest.approx(0.00846, rel=0.02)
    assert report.outlier_share == pytest.approx(6.3e-5, abs=6e-5)


def test_zeros_have_no_error() -> None:
    weight = torch.zeros(64, 64)
    report = measure_layer("layer", packed_as("nf4-dq", weight), weight)
    assert report.relative_error is not None
    assert report.outlier_share == 0.0
    assert measure_layer("layer", packed_as("nf4", weight), weight).relative_error == 0.0


def test_a_stack_is_summed_over_its_matrices() -> None:
    stack = torch.randn(4, 32, 64) * torch.tensor([1.0, 10.0, 0.1, 3.0])[:, None, None]
    meter = LayerMeter("experts", stack.shape)
    packs = [packed_as("nf4", matrix) for matrix in stack]
    for packed, matrix in zip(packs, stack, strict=True):
        meter.add(packed, matrix)
    report = meter.report()
    whole = torch.stack([packed.dequantize(torch.float32) for packed in packs])
    assert report.shape == (4, 32, 64)
    assert report.weights == stack.numel()
    assert report.relative_error == pytest.approx(float((whole - stack).norm() / stack.norm()), rel=1e-5)
    assert report.bits_per_weight == pytest.approx(4.5)


def test_a_model_is_reported_before_and_after_packing() -> None:
    model = tiny_model("gpt2")
    config = from_spec("nf4-dq")
    assert config is not None
    planned = list(report_model(model, config))
    assert len(planned) == 8
    assert all(layer.relative_error is not None and 0.05 < layer.relative_error < 0.12 for layer in planned)
    assert list(report_model(model)) == []
    total = summarize(planned)
    assert total["weights"] == sum(layer.weights for layer in planned)
    assert total["bits_per_weight"] == pytest.approx(4.127, abs=0.01)
    assert summarize([])["bits_per_weight"] is None


def test_float16_main_weights_have_nothing_to_report() -> None:
    from quant import Linear8bit

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    layer = Linear8bit.from_float(torch.nn.Linear(64, 32), config)
    assert list(report_model(torch.nn.Sequential(layer))) == []
    assert formats.DEFAULT_BLOCKSIZE == 64
