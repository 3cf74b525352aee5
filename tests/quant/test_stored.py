"""Packed checkpoints whose config says less than they do: what is packed is what the file packs, and is planned so."""

from __future__ import annotations

import filecmp
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant import BitsAndBytesConfig, memory
from quant.conversion import is_linear_layer, modules_to_quantize
from quant.embedding import PackedEmbedding, TiedToEmbedding
from quant.errors import CheckpointError
from quant.experts import PackedExperts
from quant.headers import read_checkpoint_headers
from quant.linear import PackedLinear
from server.memory.components import exact
from server.memory.plan import make_plan
from server.records import ModelSpec
from tests.tiny_models import auto_class, save_tiny, tiny_config, tiny_inputs

FORMATS: dict[str, dict[str, Any]] = {
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def load(path: Path, **how: Any) -> transformers.PreTrainedModel:
    architecture = json.loads((path / "config.json").read_text())["model_type"]
    model: transformers.PreTrainedModel = auto_class(architecture).from_pretrained(path, **how)
    return model


def packed_but(skips: list[str], folder: Path, architecture: str, form: str, says: Any, **changes: Any) -> Path:
    """A checkpoint packed without the modules in `skips`, whose config says `says` instead."""
    source = save_tiny(architecture, folder / "source")
    config = BitsAndBytesConfig(**(FORMATS[form] | {"llm_int8_skip_modules": skips} | changes))
    load(source, quantization_config=config).save_pretrained(folder / "packed")
    rewrite_config(folder / "packed", says)
    return folder / "packed"


def rewrite_config(path: Path, fields: dict[str, Any]) -> None:
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"] |= fields
    (path / "config.json").write_text(json.dumps(content))


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def assert_predicted(path: Path, model: transformers.PreTrainedModel) -> None:
    """To the byte, from headers and by a plan."""
    own = model.config.quantization_config
    with torch.device("meta"):
        meta = type(model)._from_config(transformers.AutoConfig.from_pretrained(path), dtype=torch.float32)
    predicted = memory.predict_meta(meta, own, torch.float32, read_checkpoint_headers(path))
    assert predicted == memory.measure_weights(model)
    if isinstance(model, transformers.LlavaForConditionalGeneration):
        return  # not a causal language model: no server has it
    plan = exact(make_plan(ModelSpec(name="m", path=str(path), dtype="float32", device="cpu")).components)
    del plan["kv_cache"]
    assert plan == dict(predicted)


def assert_written_again(path: Path, model: transformers.PreTrainedModel) -> None:
    model.save_pretrained(path.parent / "again")
    assert filecmp.cmp(path / FILE, path.parent / "again" / FILE, shallow=False)


OLD_NAMES = ["vision_tower", "multi_modal_projector", "lm_head"]
"""As files name what transformers calls model.vision_tower and so on today."""
NEW_NAMES = [r".*vision_tower", r".*multi_modal_projector", "lm_head"]


@pytest.mark.parametrize("may_offload", [False, True])
@EVERY_FORMAT
def test_a_list_of_modules_by_their_older_names(
    form: str, may_offload: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    says = {"llm_int8_skip_modules": OLD_NAMES, "llm_int8_enable_fp32_cpu_offload": may_offload}
    path = packed_but(NEW_NAMES, tmp_path, "llava", form, says)
    assert any(re.match(r"vision_tower\..*\.0\.mlp\.fc1\.weight", name) for name in load_file(path / FILE))
    with caplog.at_level(logging.WARNING, logger="quant.hf"):
        model = load(path)
    original = load(tmp_path / "source")
    names = {name for name, module in model.named_modules() if is_linear_layer(module)}
    seeing = {name for name in names if "vision_tower" in name or "projector" in name}
    assert len(seeing) == 14
    assert names == seeing | {"lm_head"}
    for name in seeing:
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight), name
    assert len(packed_names(model)) == 14
    assert "14 layers that the configuration would quantize are stored in floating point and stay so: " in caplog.text
    assert caplog.text.count("model.") == 3
    assert "lm_head" not in caplog.text
    assert_predicted(path, model)
    assert_written_again(path, model)


@pytest.mark.parametrize(
    ("architecture", "kept", "kind"),
    [
        ("llama", "model.layers.1.mlp.down_proj", nn.Linear),
        ("gpt2", "transformer.h.0.mlp.c_fc", Conv1D),
        ("qwen3", "model.layers.0.self_attn.q_proj", nn.Linear),
    ],
)
@EVERY_FORMAT
def test_a_layer_that_no_list_names(architecture: str, kept: str, kind: type, form: str, tmp_path: Path) -> None:
    path = packed_but([kept, "lm_head"], tmp_path, architecture, form, {"llm_int8_skip_modules": None})
    model = load(path, dtype=torch.float32)
    layer = model.get_submodule(kept)
    assert type(layer) is kind
    assert torch.equal(layer.weight, load(tmp_path / "source").get_submodule(kept).weight)
    assert packed_names(model)
    assert_predicted(path, model)
    assert_written_again(path, model)
    assert type(load(path, dtype=torch.bfloat16).get_submodule(kept)) is kind
    assert load(path, dtype=torch.bfloat16).get_submodule(kept).weight.dtype == torch.bfloat16


@EVERY_FORMAT
def test_where_modules_may_be_offloaded_values_are_packed_again(form: str, tmp_path: Path) -> None:
    says = {"llm_int8_skip_modules": None, "llm_int8_enable_fp32_cpu_offload": True}
    path = packed_but(["down_proj", "lm_head"], tmp_path, "llama", form, says)
    model = load(path)
    assert len(packed_names(model)) == 14
    assert_predicted(path, model)


def test_main_weights_are_no_packed_layers(tmp_path: Path) -> None:
    path = packed_but(["lm_head"], tmp_path, "llama", "int8", {}, llm_int8_has_fp16_weight=True)
    model = load(path)
    assert len(packed_names(model)) == 14
    assert_predicted(path, model)


@EVERY_FORMAT
@pytest.mark.parametrize(
    "fields",
    [
        {"llm_int8_skip_modules": ["up_proj", "lm_head"]},
        {"module_overrides": {"model.layers.0": None}},
    ],
    ids=["skipped", "overridden"],
)
def test_a_packed_layer_stays_packed_whatever_the_config_says(
    form: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = packed_but(["lm_head"], tmp_path, "llama", form, {})
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        expected = load(path)(**inputs).logits
        rewrite_config(path, fields)
        model = load(path)
        assert torch.equal(model(**inputs).logits, expected)
    assert len(packed_names(model)) == 14
    assert_predicted(path, model)
    assert_written_again(path, model)


@EVERY_FORMAT
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_each_module_of_experts_is_what_it_is_in_the_file(architecture: str, form: str, tmp_path: Path) -> None:
    skips = ["lm_head", "model.layers.0.mlp.experts"]
    path = packed_but(skips, tmp_path, architecture, form, {"llm_int8_skip_modules": None})
    model = load(path)
    unpacked, packed = (layer.mlp.experts for layer in model.model.layers)
    assert isinstance(packed, PackedExperts)
    assert not isinstance(unpacked, PackedExperts)
    original = load(tmp_path / "source").model.layers[0].mlp.experts
    assert torch.equal(unpacked.down_proj, original.down_proj)
    assert_predicted(path, model)
    assert_written_again(path, model)
    rewrite_config(path, {"llm_int8_skip_modules": ["lm_head", "experts"]})
    assert isinstance(load(path).model.layers[1].mlp.experts, PackedExperts)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_a_file_holds_as_values(tied: bool, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=tied)
    config = BitsAndBytesConfig(**FORMATS["nf4-dq"])
    load(source, quantization_config=config).save_pretrained(tmp_path / "packed")
    rewrite_config(tmp_path / "packed", {"quantize_embeddings": True})
    model = load(tmp_path / "packed")
    kinds = [type(module) for module in model.modules()]
    assert not any(issubclass(kind, PackedEmbedding | TiedToEmbedding) for kind in kinds)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.model.embed_tokens.weight, load(source).model.embed_tokens.weight)
    assert_predicted(tmp_path / "packed", model)


def test_values_that_show_too_late_are_refused(tmp_path: Path) -> None:
    """transformers does not pass a key_mapping on before modules are chosen."""
    path = packed_but(["down_proj", "lm_head"], tmp_path, "llama", "nf4-dq", {"llm_int8_skip_modules": None})
    renamed = {name.replace("model.layers", "strange"): tensor for name, tensor in load_file(path / FILE).items()}
    save_file(renamed, path / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.down_proj.weight is stored in floating point in a packed"):
        load(path, key_mapping={"^strange": "model.layers"})


@pytest.mark.parametrize(("lost", "named"), [("weight", "weight"), ("weight.absmax", "weight.absmax")])
def test_a_damaged_file_cannot_be_planned(lost: str, named: str, tmp_path: Path) -> None:
    path = packed_but(["lm_head"], tmp_path, "llama", "nf4-dq", {})
    layer = "model.layers.1.mlp.up_proj"
    tensors = {name: tensor for name, tensor in load_file(path / FILE).items() if name != f"{layer}.{lost}"}
    save_file(tensors, path / FILE, {"format": "pt"})
    config = BitsAndBytesConfig(**FORMATS["nf4-dq"])
    with pytest.raises(CheckpointError, match=f"tensor {layer}.{named} is missing"):
        memory.predict_weights(path, config, torch.float32)


def test_what_transformers_keeps_in_float32_is_not_converted() -> None:
    """By lists that hold for float16 alone, and for bfloat16 too; of modules, and of weights."""
    with torch.device("meta"):
        model = auto_class("llama").from_config(tiny_config("llama"), dtype=torch.bfloat16)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    model._keep_in_fp32_modules = {"q_proj"}
    model._keep_in_fp32_modules_strict = {"up_proj", "layers.0.mlp.down_proj.weight"}
    config = BitsAndBytesConfig(**FORMATS["nf4-dq"])
    kinds = modules_to_quantize(model, config)
    kept = {name for name, module in model.named_modules() if is_linear_layer(module)} - set(kinds)
    layers = [f"model.layers.{layer}" for layer in (0, 1)]
    assert kept == {
        "lm_head",
        "model.layers.0.mlp.down_proj",
        *(f"{layer}.{name}" for layer in layers for name in ("self_attn.q_proj", "mlp.up_proj")),
    }
    sizes = memory.predict_meta(model, config, torch.bfloat16)
    assert sizes["unquantized_float32"] == buffers + 4 * (2 * 192 * 128 + 128 * 192)


def test_a_layer_that_others_pack_is_loaded_packed_though_a_stricter_list_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes heeds the list for float16 alone, so files hold what the other one names."""
    path = packed_but(["lm_head"], tmp_path, "llama", "nf4-dq", {})
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"up_proj"})
    assert "model.layers.1.mlp.up_proj" in packed_names(load(path))


@pytest.mark.parametrize("name", ["layers.\u00b2.weight", f"layers.{'9' * 5000}.weight"])
def test_a_number_in_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    path = packed_but(["lm_head"], tmp_path, "llama", "nf4-dq", {})
    save_file(load_file(path / FILE) | {name: torch.zeros(1)}, path / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match="the name of a tensor cannot be read"):
        memory.predict_weights(path, BitsAndBytesConfig(**FORMATS["nf4-dq"]), torch.float32)
