"""quant/quality.py: samples tell what every value tells, as near as samples can, and only while originals are there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from quant import BitsAndBytesConfig
from quant.config import PRESETS, from_spec
from quant.quality import CHUNKS, SAMPLE, QualityMeter, chunks, current_meter, group_of, measured
from quant.report import measure_layer, report_model
from quant.state import Packed4bit, Packed8bit, PackedWeight
from tests.tiny_models import save_tiny


def packed(form: str, weight: torch.Tensor) -> PackedWeight:
    if form == "int8":
        return Packed8bit.quantize(weight)
    return Packed4bit.quantize(weight, form.removesuffix("-dq"), double_quant=form.endswith("-dq"))


@pytest.mark.parametrize("form", [name for name in PRESETS if name != "none"])
@pytest.mark.parametrize("shape", [(24, 192), (1, 64), (7, 100)])
def test_of_a_small_matrix_every_value_is_looked_at(form: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    weight[0, 0] = 30.0
    meter = QualityMeter()
    meter.add("model.layers.0.mlp.up_proj.weight", packed(form, weight), weight)
    (group,) = meter.groups()
    exact = measure_layer("", packed(form, weight), weight)
    assert (group.group, group.format, group.layers) == ("mlp.up_proj", exact.format, 1)
    assert group.relative_error == pytest.approx(exact.relative_error, rel=1e-5)
    assert group.outlier_share == pytest.approx(exact.outlier_share)
    assert group.outlier_share > 0


@pytest.mark.parametrize("form", ["nf4", "nf4-dq", "int8"])
def test_of_a_large_matrix_the_sample_is_near_the_truth(form: str) -> None:
    """The mean of n squares of normal values lies within sqrt(2/n) of the variance, relatively, two times in three.

    Neither error nor weights are far from normal, and int8 errors are bounded; six such spans leave one failure in 1e8.
    """
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(512, 1024, generator=generator)
    meter = QualityMeter()
    meter.add("lm_head.weight", packed(form, weight), weight)
    (group,) = meter.groups()
    exact = measure_layer("", packed(form, weight), weight)
    assert exact.relative_error is not None
    # A root's relative deviation is half its square's; numerator and denominator add up.
    assert group.relative_error == pytest.approx(exact.relative_error, rel=6 * math.sqrt(2 / SAMPLE))
    # The number of outliers in a sample is a Poisson number; a few are expected.
    expected = exact.outlier_share * SAMPLE
    assert abs(group.outlier_share * SAMPLE - expected) <= 6 * math.sqrt(expected) + 1


@given(count=st.integers(1, 10**9), align=st.integers(1, 10**6))
def test_chunks_are_aligned_apart_and_bounded(count: int, align: int) -> None:
    found = list(chunks(count, align))
    assert 1 <= len(found) <= CHUNKS
    assert sum(size for _, size in found) <= max(SAMPLE, CHUNKS * align)
    assert found[0][0] == 0
    assert found[-1][0] + found[-1][1] == count, "the end is looked at too"
    end = 0
    for begin, size in found:
        assert begin % align == 0
        assert begin >= end
        assert size > 0
        end = begin + size


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp.c_fc"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts.gate_up_proj"),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", "gate_proj"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_groups_have_no_numbers(name: str, group: str) -> None:
    assert group_of(name) == group


def test_matrices_count_by_their_size_and_formats_stay_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    small, large = torch.randn(8, 64, generator=generator), torch.randn(40, 64, generator=generator)
    meter = QualityMeter()
    for layer, weight in enumerate((small, large)):
        meter.add(f"model.layers.{layer}.mlp.up_proj.weight", packed("nf4", weight), weight)
    meter.add("model.layers.2.mlp.up_proj.weight", packed("int8", small), small)
    four, eight = meter.groups()
    assert (four.format, four.layers, eight.format, eight.layers) == ("nf4", 2, "int8", 1)
    errors = [measure_layer("", packed("nf4", weight), weight).relative_error for weight in (small, large)]
    squares = [float(weight.square().sum()) for weight in (small, large)]
    joint = math.sqrt(sum(e**2 * s for e, s in zip(errors, squares, strict=True) if e) / sum(squares))
    assert four.relative_error == pytest.approx(joint, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("preset", ["nf4-dq", "int8"])
def test_loading_measures_what_it_quantizes(architecture: str, preset: str, tmp_path: Path) -> None:
    plain, packed_path = tmp_path / "plain", tmp_path / "packed"
    save_tiny(architecture, plain)
    config = from_spec(preset, compute_dtype=torch.float32)
    assert config is not None
    with measured() as meter:
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    groups = {group.group: group for group in meter.groups()}
    original = AutoModelForCausalLM.from_pretrained(plain)
    exact = list(report_model(original, config))
    assert sum(group.layers for group in groups.values()) == len(exact)
    assert {group_of(layer.name) for layer in exact} == set(groups)
    for name, group in groups.items():
        errors = [layer.relative_error for layer in exact if group_of(layer.name) == name]
        low, high = min(e for e in errors if e is not None), max(e for e in errors if e is not None)
        # Matrices this small are looked at whole, but of a stack some experts only.
        slack = 0.1 if "experts" in name else 1e-4
        assert low * (1 - slack) <= group.relative_error <= high * (1 + slack)

    model.save_pretrained(packed_path)
    with measured() as meter:
        AutoModelForCausalLM.from_pretrained(packed_path)
    assert meter.groups() == [], "what was quantized before has no original"


def test_nobody_measures_who_does_not_ask(tmp_path: Path) -> None:
    with measured():
        assert current_meter() is not None
    assert current_meter() is None
    save_tiny("llama", tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    with measured() as meter:
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert meter.groups() == [], "float16 main weights are not packed"
