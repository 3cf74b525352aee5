"""Every architecture that users of BitsAndBytesConfig name: packed layers compute what their dequantized twin does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant import BitsAndBytesConfig, Linear8bit, reference
from quant.linear import PackedLinear
from tests.tiny_models import CONFIGS, MORE_CONFIGS, answered, auto_class, save_tiny, tiny_inputs

FORMATS: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
KEPT = {
    # transformers keeps T5's `wo` in float32, in every format
    "t5": {"lm_head", *(f"{side}.block.{block}.layer.{layer}.DenseReluDense.wo"
                        for side, layer in (("encoder", 1), ("decoder", 2)) for block in (0, 1))},
}  # fmt: skip
"""The linear layers that stay as they are; {"lm_head"} for all others."""


class ReferenceLinear8bit(nn.Module):
    """The definition of LLM.int8() in plain torch on the same codes, in the place of a packed layer."""

    def __init__(self, layer: Linear8bit) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.bias  # model code asks a layer for its weight's dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return reference.linear_8bit(x, layer.weight, layer.SCB, layer.threshold, layer.outliers, layer.bias)


def twin_of(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    twin = copy.deepcopy(model)
    layers = {name: module for name, module in twin.named_modules() if isinstance(module, Linear8bit)}
    if not layers:
        return twin.dequantize(torch.float32)
    for name, layer in layers.items():
        twin.set_submodule(name, ReferenceLinear8bit(layer))
    return twin


@pytest.fixture(scope="module", params=[*CONFIGS, *MORE_CONFIGS])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("model") / request.param
    return request.param, save_tiny(request.param, path)


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_packed_equals_its_twin(checkpoint: tuple[str, Path], form: str) -> None:
    architecture, path = checkpoint
    config = BitsAndBytesConfig(**FORMATS[form])
    model = auto_class(architecture).from_pretrained(path, quantization_config=config)
    kept = {name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    assert kept == KEPT.get(architecture, {"lm_head"})
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) >= 8
    twin = twin_of(model)
    assert form == "int8" or not any(isinstance(module, PackedLinear) for module in twin.modules())

    inputs = tiny_inputs(architecture)
    extra = answered(model, inputs["input_ids"])
    result, expected = model(**inputs, **extra).logits, twin(**inputs, **extra).logits
    assert result.isfinite().all()
    assert float((result - expected).norm() / expected.norm()) < 1e-5
    # Random models like to say one token for ever; without repetitions each step has to choose anew.
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
    assert torch.equal(model.generate(**inputs, **greedy), twin.generate(**inputs, **greedy))
