"""Modules beside the main device: float32, fed with the model's dtype, equal to a model that has them in float32.

Without an accelerator the CPU is the main device and the disk lies beside it; maps with accelerators are planned only.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from quant import BitsAndBytesConfig, memory
from quant.linear import PackedLinear
from quant.offload import is_offloaded, keep_in_float32
from server.memory.components import exact
from server.memory.plan import make_plan
from server.records import ModelSpec
from tests.tiny_models import auto_class, save_tiny, tiny_config, tiny_inputs

FORMATS: dict[str, dict[str, object]] = {
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
LLAMA = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
GPTJ = ["transformer.wte", "transformer.h.0", "transformer.h.1", "transformer.ln_f", "lm_head"]
BLOOM = [
    "transformer.word_embeddings",
    "transformer.word_embeddings_layernorm",
    "transformer.h.0",
    "transformer.h.1",
    "transformer.ln_f",
    "lm_head",
]
MAPS: dict[str, dict[str, str]] = {
    architecture: dict.fromkeys(names, "cpu") | dict.fromkeys(away, "disk")
    for architecture, names, away in (
        ("llama", LLAMA, ["model.embed_tokens", "model.layers.1", "model.norm", "lm_head"]),
        ("gptj", GPTJ, ["transformer.h.1", "lm_head"]),
        ("bloom", BLOOM, ["transformer.h.1"]),
        ("mixtral", LLAMA, ["model.layers.1", "model.norm"]),
        ("gpt_oss", LLAMA, ["model.layers.1", "lm_head"]),
    )
}
"""accelerate wants entries that do not lie in each other."""
pytestmark = pytest.mark.filterwarnings("ignore:.*offloaded.*")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def load(architecture: str, path: Path, **how: object) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = auto_class(architecture).from_pretrained(path, **how)
    return model


def offloaded(architecture: str, path: Path, folder: Path, **how: object) -> transformers.PreTrainedModel:
    return load(architecture, path, device_map=MAPS[architecture], offload_folder=str(folder), **how)


def loaded_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by name as its module sees it in forward, brought from disk where it lies there."""
    weights = {}
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for leaf, parameter in module.named_parameters(recurse=False):
            value = parameter
            if parameter.is_meta:
                for part in getattr(hook, "hooks", [hook]):
                    if part.weights_map is not None:
                        value = part.weights_map[leaf]
            weights[f"{name}.{leaf}"] = value
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", MAPS)
def test_offloaded_modules_are_float32(architecture: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source")
    config = BitsAndBytesConfig(**FORMATS[form], llm_int8_enable_fp32_cpu_offload=True)
    model = offloaded(architecture, source, tmp_path / "offload", quantization_config=config, dtype=dtype)
    lies_away = is_offloaded(MAPS[architecture])
    originals = auto_class(architecture).from_pretrained(source).state_dict()
    plain = load(architecture, source, dtype=dtype)
    seen = 0
    for name, parameter in loaded_weights(model).items():
        if lies_away(name):
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, originals[name]), name  # not by way of the model's dtype
            seen += 1
        elif parameter.is_floating_point():
            assert parameter.dtype == plain.get_parameter(name).dtype, name
    assert seen
    assert not any(lies_away(name) for name, module in model.named_modules() if isinstance(module, PackedLinear))
    assert any(isinstance(module, PackedLinear) for module in model.modules())

    inputs = tiny_inputs(architecture)
    with torch.no_grad():
        result = model(**inputs).logits
    assert result.dtype == dtype
    # The same by hand: a model without offloading whose modules of these names are linear layers in float32.
    twin = load(architecture, source, quantization_config=twin_config(config, model, lies_away), dtype=dtype)
    for name, parameter in twin.named_parameters():
        if lies_away(name):
            parameter.data = originals[name].clone()
    keep_in_float32_by_hand(twin, lies_away, dtype)
    with torch.no_grad():
        assert torch.equal(result, twin(**inputs).logits)
    tokens = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def twin_config(config: BitsAndBytesConfig, model: nn.Module, lies_away: object) -> BitsAndBytesConfig:
    """The config that leaves the same modules unquantized without any offloading."""
    kept = [name for name, module in model.named_modules() if lies_away(name)]  # type: ignore[operator]
    own = copy.deepcopy(config)
    own.llm_int8_skip_modules = ["lm_head", *kept]
    return own


def keep_in_float32_by_hand(model: nn.Module, lies_away: object, dtype: torch.dtype) -> None:
    """Wraps forward of each module that has float32 weights of its own, the long way round."""

    def cast(value: object, to: torch.dtype) -> object:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(to)
        return tuple(cast(entry, to) for entry in value) if isinstance(value, tuple) else value

    for module_name, module in model.named_modules():
        names = [f"{module_name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        if not names or not all(map(lies_away, names)):  # type: ignore[arg-type]
            continue

        def forward(*args: object, _own: object = module.forward, **kwargs: object) -> object:
            wide = [cast(value, torch.float32) for value in args]
            return cast(_own(*wide, **{k: cast(v, torch.float32) for k, v in kwargs.items()}), dtype)  # type: ignore[operator]

        module.forward = forward


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_file_and_saving_again(form: str, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(**FORMATS[form], llm_int8_enable_fp32_cpu_offload=True)
    source = save_tiny("llama", tmp_path / "source")
    packed = load("llama", source, quantization_config=config, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "packed")
    model = offloaded("llama", tmp_path / "packed", tmp_path / "offload", dtype=torch.bfloat16)
    weights = loaded_weights(model)
    for name, layer in packed.named_modules():
        if name.startswith("model.layers.1") and isinstance(layer, PackedLinear):
            assert torch.equal(weights[f"{name}.weight"], layer.dequantize(torch.float32))
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        close = model(**inputs).logits.float()
        torch.testing.assert_close(
            close, packed(**inputs).logits.float(), rtol=0.05, atol=0.05 * float(close.abs().max())
        )
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.1.mlp.up_proj.weight").dtype == torch.float32
    again = load("llama", tmp_path / "again", dtype=torch.bfloat16)
    assert {name for name, module in again.named_modules() if isinstance(module, PackedLinear)} == {
        name for name, module in packed.named_modules() if isinstance(module, PackedLinear)
    }
    with torch.no_grad():
        torch.testing.assert_close(
            again(**inputs).logits.float(), close, rtol=0.05, atol=0.05 * float(close.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", [*FORMATS, None])
@pytest.mark.parametrize("architecture", MAPS)
def test_memory_is_predicted_to_the_byte(
    architecture: str, form: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_tiny(architecture, tmp_path / "source")
    config = None if form is None else BitsAndBytesConfig(**FORMATS[form], llm_int8_enable_fp32_cpu_offload=True)
    how = {} if config is None else {"quantization_config": config}
    model = offloaded(architecture, source, tmp_path / "offload", dtype=dtype, **how)
    predicted = memory.predict_weights(source, config, dtype, MAPS[architecture])
    assert predicted == memory.measure_weights(model)
    assert sum(predicted.values()) < sum(memory.predict_weights(source, config, dtype).values())
    fields = None if config is None else config.to_dict()
    spec = ModelSpec(
        name="m",
        path=str(source),
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        device_map=MAPS[architecture],
        quantization=fields,
    )
    plan = make_plan(spec)
    of_weights = exact(plan.components)
    del of_weights["kv_cache"]
    assert of_weights == dict(predicted)
    (disk,) = (device for device in plan.devices if device.device == "disk")
    brought = [value for name, value in loaded_weights(model).items() if model.get_parameter(name).is_meta]
    assert disk.total_bytes == sum(value.nbytes for value in brought) > 0
    assert disk.available_bytes > 0


def test_maps_with_an_accelerator_are_planned(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True)
    beside_disk = {"": "cpu", "model.layers.1": "disk"}
    expected = memory.predict_weights(source, config, torch.bfloat16, beside_disk)
    for device_map in ({"": 0, "model.layers.1": "cpu"}, {"": "cuda:0", "model.layers.1": torch.device("cpu")}):
        assert memory.predict_weights(source, config, torch.bfloat16, device_map) == expected
    whole = memory.predict_weights(source, config, torch.bfloat16)
    assert memory.predict_weights(source, config, torch.bfloat16, {"": 0}) == whole
    assert memory.predict_weights(source, config, torch.bfloat16, "auto") == whole


@pytest.mark.parametrize(
    ("device_map", "away", "stays"),
    [
        ({"a": 0, "a.b": "cpu"}, ["a.b", "a.b.weight"], ["a", "a.bc", "a.weight"]),
        ({"": "cpu", "h.1": "disk"}, ["h.1", "h.1.x"], ["h.11", "h", "x.h.1"]),
        ({"": "disk"}, ["", "anything"], []),
        ({"": "disk", "a": "cpu"}, ["b"], ["a", "a.b"]),
        ({"a": 0, "b": torch.device("cpu")}, ["b"], ["a", "c"]),
        ("auto", [], ["a"]),
        (None, [], ["a"]),
    ],
)
def test_the_longest_entry_decides(device_map: object, away: list[str], stays: list[str]) -> None:
    lies_away = is_offloaded(device_map)
    assert [name for name in away + stays if lies_away(name)] == away


def test_a_tied_weight_on_the_main_device_keeps_its_dtype() -> None:
    def tied_on_meta() -> nn.Module:
        with torch.device("meta"):
            config = tiny_config("llama", tie_word_embeddings=True)
            return auto_class("llama").from_config(config, dtype=torch.bfloat16)  # type: ignore[no-any-return]

    def kept(name: str) -> bool:
        return False

    model = tied_on_meta()
    keep_in_float32(model, {"": "cpu", "lm_head": "disk", "model.norm": "disk"}, kept)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not model.lm_head._forward_hooks
    assert model.model.norm.weight.dtype == torch.float32
    model = tied_on_meta()
    keep_in_float32(model, {"": "cpu", "lm_head": "disk", "model.embed_tokens": "disk"}, kept)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    assert model.lm_head._forward_hooks
    assert model.model.embed_tokens._forward_hooks


def test_hooks_survive_copies_and_cast_what_is_nested() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, device="meta", dtype=torch.bfloat16))

        def forward(self, x: list[torch.Tensor], *, more: dict[str, torch.Tensor]) -> dict[str, object]:
            assert {t.dtype for t in (*x, *more.values()) if t.is_floating_point()} == {torch.float32}
            return {"pair": (x[0] * self.weight, more["ids"]), "text": "as it is"}

    model = nn.Sequential(Nested())
    keep_in_float32(model, {"": "cpu", "0": "disk"}, lambda name: False)
    model.to_empty(device="cpu")
    nn.init.constant_(model[0].weight, 2.0)
    more = {"ids": torch.tensor([1]), "y": torch.ones(3, dtype=torch.bfloat16)}
    for twin in (model[0], copy.deepcopy(model[0])):
        result = twin([torch.ones(3, dtype=torch.bfloat16)], more=more)
        assert result["pair"][0].dtype == torch.bfloat16
        assert result["pair"][1].dtype == torch.int64
        assert result["text"] == "as it is"
        assert more["y"].dtype == torch.bfloat16
    layer = nn.Linear(3, 3, device="meta", dtype=torch.float16)
    keep_in_float32(layer, {"": "disk"}, lambda name: False)
    again = pickle.loads(pickle.dumps(layer.to_empty(device="cpu")))  # noqa: S301 - its own bytes
    assert again(torch.ones(1, 3, dtype=torch.float16)).dtype == torch.float16


def test_a_module_that_transformers_keeps_in_float32_stays_so_in_a_packed_file(tmp_path: Path) -> None:
    source = save_tiny("t5", tmp_path / "source", dtype=torch.float16)
    config = BitsAndBytesConfig(load_in_4bit=True)
    load("t5", source, quantization_config=config, dtype=torch.float16).save_pretrained(tmp_path / "packed")
    model = load("t5", tmp_path / "packed", dtype=torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "float16"
