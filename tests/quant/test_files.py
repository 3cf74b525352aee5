"""Checkpoints as they are found: prefixes, long skip lists, old int8 files, one layer's pieces in several shards."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from quant import BitsAndBytesConfig, memory, quantize_checkpoint
from quant.errors import CheckpointError
from quant.linear import Linear4bit, PackedLinear
from quant.state import Packed4bit
from server.memory.components import exact
from server.memory.plan import make_plan
from server.model.load import load_model
from server.records import ModelSpec
from tests.tiny_models import auto_class, save_tiny, tiny_inputs

CONFIGS: dict[str, dict[str, object]] = {
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


def quantized(architecture: str, folder: Path, form: str, **changes: object) -> Path:
    """A packed checkpoint of a tiny model; returns its folder."""
    source = save_tiny(architecture, folder / "source")
    config = BitsAndBytesConfig(**(CONFIGS[form] | changes))
    model = auto_class(architecture).from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder / "packed")
    return folder / "packed"


def load(path: Path, architecture: str = "llama", **how: object) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = auto_class(architecture).from_pretrained(path, **how)
    return model


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = model(**inputs).logits
    return result


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("form", CONFIGS)
def test_a_layer_in_pieces_over_shards(form: str, tmp_path: Path) -> None:
    path = quantized("llama", tmp_path, form)
    inputs = tiny_inputs("llama")
    expected = logits(load(path), inputs)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-0000{index + 1}-of-00003.safetensors" for index in range(3)]
    where = {key: names[index % 3] for index, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: t for key, t in tensors.items() if where[key] == name}, path / name, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    layer = "model.layers.0.mlp.up_proj."
    assert len({file for key, file in where.items() if key.startswith(layer)}) > 1
    assert torch.equal(logits(load(path), inputs), expected)


@pytest.mark.parametrize("has_format", [True, False])
def test_int8_with_and_without_weight_format(has_format: bool, tmp_path: Path) -> None:
    path = quantized("llama", tmp_path, "int8")
    tensors = load_file(path / "model.safetensors")
    formats = [key for key in tensors if key.endswith("weight_format")]
    assert len(formats) == 14
    inputs = tiny_inputs("llama")
    expected = logits(load(path), inputs)
    if not has_format:
        rewrite(path, {key: tensor for key, tensor in tensors.items() if key not in formats})
    model = load(path)
    assert torch.equal(logits(model, inputs), expected)
    model.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(path / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)


@pytest.mark.parametrize("form", CONFIGS)
def test_the_prefix_of_a_vision_language_model(form: str, tmp_path: Path) -> None:
    path = quantized("llava", tmp_path, form)
    keys = list(load_file(path / "model.safetensors"))
    statistics = "weight.absmax" if form != "int8" else "SCB"
    assert f"language_model.model.layers.0.mlp.up_proj.{statistics}" in keys
    model = load(path, "llava")
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, PackedLinear)
    inputs = tiny_inputs("llava")
    assert logits(model, inputs).isfinite().all()
    model.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(path / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)
    # Files written by newer versions name the same tensors as the modules are called.
    renamed = {
        (
            "model." + key if not key.startswith("language_model.lm_head") else key.removeprefix("language_model.")
        ).replace("model.language_model.model.", "model.language_model."): tensor
        for key, tensor in load_file(path / "model.safetensors").items()
    }
    rewrite(path, renamed)
    assert torch.equal(logits(load(path, "llava"), inputs), logits(model, inputs))


def adapters_around(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as they are named where every projection has an adapter around it, and the adapters."""
    renamed = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        head, mark, rest = key.partition("_proj.")
        renamed[f"{head}{mark}base_layer.{rest}" if mark else key] = tensor
        if mark and rest == "weight":
            renamed[f"{head}{mark}lora_A.default.weight"] = torch.ones(4, 128)
            renamed[f"{head}{mark}lora_B.default.weight"] = torch.ones(128, 4)
    assert any("_proj.base_layer.weight" in key for key in renamed)
    return renamed


@pytest.mark.parametrize("form", [*CONFIGS, "one layer unquantized"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_layers_with_adapters_around_them(architecture: str, form: str, tmp_path: Path) -> None:
    if form in CONFIGS:
        path = quantized(architecture, tmp_path, form)
    else:
        path = quantized(architecture, tmp_path, "fp4", llm_int8_skip_modules=["lm_head", "q_proj"])
    inputs = tiny_inputs(architecture)
    expected = logits(load(path), inputs)
    plain = load_file(path / "model.safetensors")
    rewrite(path, adapters_around(path))
    config = BitsAndBytesConfig.from_dict(memory.read_config(path).quantization_config)
    model, info = auto_class(architecture).from_pretrained(path, output_loading_info=True)
    assert torch.equal(logits(model, inputs), expected)
    assert info["unexpected_keys"]
    assert all(".lora_" in key for key in info["unexpected_keys"])
    assert not info["missing_keys"]
    assert memory.predict_weights(path, config, torch.float32) == memory.measure_weights(model)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(plain)
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    mapping = {r"\.base_layer\.": "."}  # as it had to be written before
    assert torch.equal(logits(load(path, key_mapping=mapping), inputs), expected)


@pytest.mark.parametrize("form", [*CONFIGS, None])
def test_an_unquantized_file_with_adapters_around_layers(form: str | None, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "source")
    fields = None if form is None else CONFIGS[form]
    how = {} if fields is None else {"quantization_config": BitsAndBytesConfig(**fields)}
    inputs = tiny_inputs("llama")
    expected = load(path, **how)
    rewrite(path, adapters_around(path))
    spec = ModelSpec(name="m", path=str(path), dtype="float32", device="cpu", quantization=fields)
    served = load_model(spec, lambda done, total: None).model
    assert torch.equal(logits(served, inputs), logits(expected, inputs))
    plan = exact(make_plan(spec).components)
    del plan["kv_cache"]
    assert plan == dict(memory.measure_weights(served))
    if fields is not None:
        quantize_checkpoint(path, tmp_path / "written", fields)
        expected.save_pretrained(tmp_path / "saved")
        assert filecmp.cmp(*(tmp_path / name / "model.safetensors" for name in ("written", "saved")), shallow=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks transformers for it
def test_state_dicts_under_adapters(tmp_path: Path) -> None:
    first, second = (
        peft.get_peft_model(load(quantized("llama", tmp_path, "nf4-dq")), peft.LoraConfig(target_modules=["q_proj"]))
        for _ in range(2)
    )
    for layer in second.modules():
        if isinstance(layer, Linear4bit):
            layer.quantize(torch.zeros(layer.out_features, layer.in_features))
    state = first.state_dict()
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight.nested_absmax" in state
    second.load_state_dict(state)
    inputs = tiny_inputs("llama")
    assert torch.equal(logits(second, inputs), logits(first, inputs))


def test_a_mixed_checkpoint_names_what_it_left_alone(tmp_path: Path) -> None:
    """As Unsloth uploads them: some layers stay in 16 bits, each by its full name in the skip list."""
    skips = [
        "lm_head", "embed_tokens",
        *(f"model.layers.{layer}.{name}" for layer, name in (
            (0, "self_attn"), (1, "mlp.down_proj"), (0, "mlp.up_proj"), (1, "self_attn.q_proj"))),
        "multi_modal_projector", "merger", "modality_projection",
    ]  # fmt: skip
    path = quantized("llama", tmp_path, "nf4-dq", llm_int8_skip_modules=skips)
    model = load(path)
    kept = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert kept == {"lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj",
                    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
                    "model.layers.1.self_attn.q_proj"}  # fmt: skip
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(path / name, tmp_path / "again" / name, shallow=False)


def test_each_tensor_knows_its_format_better_than_the_config(tmp_path: Path) -> None:
    """The config says fp4 in blocks of 64 and plain; one tensor is NF4 in blocks of 256 with double quantization."""
    path = quantized("llama", tmp_path, "fp4")
    name = "model.layers.1.mlp.up_proj"
    weight = torch.randn(192, 128)
    other = Packed4bit.quantize(weight, "nf4", blocksize=256, double_quant=True)
    tensors = {key: t for key, t in load_file(path / "model.safetensors").items() if not key.startswith(name)}
    rewrite(path, tensors | {f"{name}.{key}": tensor for key, tensor in other.to_checkpoint().items()})
    model = load(path)
    layer = model.get_submodule(name)
    assert isinstance(layer, Linear4bit)
    assert (layer.quant_type, layer.blocksize) == ("nf4", 256)
    assert torch.equal(layer.dequantize(), other.dequantize())
    assert logits(model, tiny_inputs("llama")).isfinite().all()
    model.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(path / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)


def test_another_kind_than_the_config_says_is_refused(tmp_path: Path) -> None:
    path = quantized("llama", tmp_path, "int8")
    name = "model.layers.1.mlp.up_proj"
    packed = Packed4bit.quantize(torch.randn(192, 128), "nf4").to_checkpoint()
    tensors = {key: t for key, t in load_file(path / "model.safetensors").items() if not key.startswith(name)}
    rewrite(path, tensors | {f"{name}.{key}": tensor for key, tensor in packed.items()})
    with pytest.raises(CheckpointError, match=name):
        load(path)
