"""quant/experts.py and grouped.py: stacks of experts packed matrix by matrix, through transformers and back."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, ops, reference
from quant.config import from_spec
from quant.convert import quantize_checkpoint
from quant.errors import CheckpointError
from quant.experts import PackedExperts, find_experts
from quant.headers import SINGLE_FILE, read_checkpoint_headers
from quant.memory import measure_weights, predict_weights
from quant.report import report_model
from tests.tiny_models import save_tiny, tiny_model

ARCHITECTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-bf16-storage": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "nf4-128": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_blocksize": 128},
    "int8": {"load_in_8bit": True},
}
THROUGHOUT = [name for name in FORMATS if name != "nf4"]  # nf4-dq has all that it has
STACKS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return get


def load(path: Path, **fields: Any) -> transformers.PreTrainedModel:
    if fields:
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(**fields)).eval()
    return AutoModelForCausalLM.from_pretrained(path).eval()


def experts_of(model: torch.nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def tokens() -> torch.Tensor:
    return torch.randint(3, 259, (2, 7))


@pytest.mark.parametrize("form", [name for name in THROUGHOUT if name != "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_equals_the_dequantized_twin(architecture: str, form: str, source: Callable[[str], Path]) -> None:
    model = load(source(architecture), **FORMATS[form])
    assert len(experts_of(model)) == 2
    twin = copy.deepcopy(model).dequantize(torch.float32)
    assert not experts_of(twin)
    ids = tokens()
    result, expected = model(ids).logits, twin(ids).logits
    assert float((result - expected).norm() / expected.norm()) < 1e-5
    assert not torch.equal(expected, load(source(architecture))(ids).logits)


@pytest.mark.parametrize("outliers", ["value", "batch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_int8_is_llm_int8_per_expert(architecture: str, outliers: str, source: Callable[[str], Path]) -> None:
    model = load(source(architecture), load_in_8bit=True, llm_int8_threshold=2.0, llm_int8_outliers=outliers)
    layer = experts_of(model)[0]
    hidden = torch.randn(9, 128) * 1.5
    index, weights = torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    expected = torch.zeros(9, 128)
    for expert in range(4):
        token, choice = torch.where(index == expert)
        if not len(token):
            continue

        def product(leaf: str, x: torch.Tensor, expert: int = expert) -> torch.Tensor:
            CB, SCB = getattr(layer, leaf)[expert], getattr(layer, f"{leaf}_SCB")[expert]
            bias = getattr(layer, f"{leaf}_bias")
            parts = [reference.linear_8bit(x, c, s, 2.0, outliers) for c, s in zip(CB, SCB, strict=True)]
            return torch.cat(parts, -1) + (0 if bias is None else bias[expert])

        out = product("down_proj", layer.shell._apply_gate(product("gate_up_proj", hidden[token])))
        expected.index_add_(0, token, out * weights[token, choice, None])
    result = layer(hidden, index, weights)
    assert float((result - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("form", THROUGHOUT)
@pytest.mark.parametrize("architecture", STACKS)
def test_each_expert_is_packed_and_named_like_a_linear_layer(
    architecture: str, form: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """So a file is what bitsandbytes gave when experts were linear layers, and reading it gives the same bytes."""
    load(source(architecture), **FORMATS[form]).save_pretrained(tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE_FILE)
    original = load_file(source(architecture) / SINGLE_FILE)
    config = BitsAndBytesConfig(**FORMATS[form])
    kind = Linear8bit if config.load_in_8bit else Linear4bit
    names = [name for name in original if ".experts." in name]
    assert len(names) == 2 * 4 * 3
    for name in names:
        linear = torch.nn.Linear(original[name].shape[1], original[name].shape[0], bias=False)
        linear.weight.data = original[name]
        for key, tensor in kind.from_float(linear, config).state_dict(prefix=name.removesuffix("weight")).items():
            assert torch.equal(found[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key


@pytest.mark.parametrize("form", THROUGHOUT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_saving_and_loading_is_byte_identical(
    architecture: str, form: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(source(architecture), **FORMATS[form])
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / SINGLE_FILE).read_bytes() == (tmp_path / "two" / SINGLE_FILE).read_bytes()
    assert len(experts_of(again)) == 2
    ids = tokens()
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_converted_by_streaming_too(
    architecture: str, form: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    load(source(architecture), **FORMATS[form]).save_pretrained(tmp_path / "theirs")
    result = quantize_checkpoint(source(architecture), tmp_path / "ours", FORMATS[form])
    assert (tmp_path / "ours" / SINGLE_FILE).read_bytes() == (tmp_path / "theirs" / SINGLE_FILE).read_bytes()
    stacks = [layer for layer in result.layers if ".experts." in layer.name]
    assert {layer.name.rpartition(".")[2] for layer in stacks} == {"gate_up_proj", "down_proj"}
    config = BitsAndBytesConfig(**FORMATS[form])
    planned = [layer for layer in report_model(load(source(architecture)), config) if ".experts." in layer.name]
    assert sorted(planned, key=lambda r: r.name) == sorted(stacks, key=lambda r: r.name)
    packed = {layer.name: layer.bytes for layer in report_model(load(tmp_path / "ours"))}
    assert all(packed[layer.name] == layer.bytes for layer in stacks)


@pytest.mark.parametrize("form", THROUGHOUT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_byte_is_counted_and_predicted(
    architecture: str, form: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(source(architecture), **FORMATS[form])
    measured = measure_weights(model)
    assert sum(measured.values()) == model.get_memory_footprint()
    config = BitsAndBytesConfig(**FORMATS[form])
    assert predict_weights(source(architecture), config, torch.float32) == measured
    model.save_pretrained(tmp_path)
    assert predict_weights(tmp_path, config, torch.float32) == measured
    assert sum(measured.values()) < 0.5 * load(source(architecture)).get_memory_footprint()


@pytest.mark.parametrize("form", ["nf4", "nf4-dq", "int8"])
@torch.no_grad()
def test_only_active_experts_are_touched_and_none_is_built(
    form: str, source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = experts_of(load(source("mixtral"), **FORMATS[form]))[0]
    hidden, weights = torch.randn(3, 128), torch.rand(3, 2)
    index = torch.tensor([[1, 3], [3, 1], [1, 3]])
    expected = layer(hidden, index, weights)
    for leaf in layer.projections:  # whoever touches experts 0 and 2 now gets NaN
        for statistic in ("absmax", "nested_absmax", "nested_offset", "SCB"):
            values = getattr(layer, f"{leaf}_{statistic}")
            if values is not None and values.is_floating_point():
                values[[0, 2]] = float("nan")
    calls: list[str] = []
    dequantizing = ("dequantize_4bit", "dequantize_8bit")
    for name in ("linear_4bit", "linear_4bit_experts", "linear_8bit", "linear_8bit_experts", *dequantizing):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _name=name, _real=real, **k: calls.append(_name) or _real(*a, **k))
    assert torch.equal(layer(hidden, index, weights), expected)
    # All of a stack in one call, and not one weight as values.
    assert calls == [f"linear_{'8' if form == 'int8' else '4'}bit_experts"] * 2


@torch.no_grad()
def test_int8_activations_reach_every_expert(source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = (
        experts_of(load(source("mixtral"), **FORMATS["nf4-dq"], bnb_4bit_activations=activations))[0]
        for activations in ("float", "int8")
    )
    hidden, weights = torch.randn(3, 128), torch.rand(3, 2)
    index = torch.tensor([[1, 3], [3, 1], [1, 3]])
    expected = plain(hidden, index, weights)
    difference = (fast(hidden, index, weights) - expected).norm() / expected.norm()
    assert 0 < float(difference) < 0.05
    monkeypatch.setattr(ops, "linear_4bit_int8", ops.linear_4bit)
    assert torch.equal(fast(hidden, index, weights), expected)


def test_an_expert_without_rows_is_nothing_special(source: Callable[[str], Path]) -> None:
    layer = experts_of(load(source("gpt_oss"), **FORMATS["nf4"]))[0]
    none = layer(torch.randn(0, 128), torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2))
    assert none.shape == (0, 128)


@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
def test_gradients_reach_the_input(form: str, source: Callable[[str], Path]) -> None:
    fields = FORMATS[form] | ({"llm_int8_threshold": 0.0} if form == "int8" else {})
    layer = experts_of(load(source("qwen3_moe"), **fields))[0]
    twin = copy.deepcopy(layer).to_float(torch.float32)
    twin.config = copy.deepcopy(twin.config)
    twin.config._experts_implementation = "eager"
    index = torch.randint(0, 4, (5, 2))
    hidden = torch.randn(5, 128)
    gradients = []
    for module in (layer, twin):
        x, weights = hidden.clone().requires_grad_(), torch.full((5, 2), 0.5, requires_grad=True)
        module(x, index, weights).square().sum().backward()
        gradients.append((x.grad, weights.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < (0.05 if form == "int8" else 1e-4)


def test_moves_and_casts_keep_the_bits(source: Callable[[str], Path]) -> None:
    layer = experts_of(load(source("gpt_oss"), **FORMATS["nf4-dq"]))[0]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    after = layer.half().to(torch.bfloat16).state_dict()
    for name, tensor in before.items():
        if name.endswith("_bias"):
            assert after[name].dtype == torch.bfloat16
        else:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_codes_stored_as_floats_survive_preparing_for_training(source: Callable[[str], Path]) -> None:
    lora = pytest.importorskip("quant.lora", reason="needs peft")
    model = load(source("mixtral"), **FORMATS["fp4-bf16-storage"])
    ids = tokens()
    expected = model(ids).logits
    assert torch.equal(lora.prepare_model_for_kbit_training(model)(ids).logits, expected)
    layer = experts_of(model)[0]
    layer.down_proj.data = layer.down_proj.data.float()
    with pytest.raises(CheckpointError, match=r"stored as torch.bfloat16 were cast to torch.float32, which destroyed"):
        model(ids)


@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
@torch.no_grad()
def test_load_state_dict(form: str, source: Callable[[str], Path]) -> None:
    one, other = (experts_of(load(source("gpt_oss"), **FORMATS[form]))[layer] for layer in (0, 1))
    arguments = (torch.randn(4, 128), torch.randint(0, 4, (4, 2)), torch.rand(4, 2))
    assert not torch.equal(one(*arguments), other(*arguments))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(*arguments), other(*arguments))
    broken = {key: value for key, value in one.state_dict().items() if not key.startswith("down_projs.2.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*down_projs.2.weight"):
        other.load_state_dict(broken)


def test_load_state_dict_of_biases(source: Callable[[str], Path]) -> None:
    """A bias is loaded, or found missing or misshapen, as any other parameter is, and the rest all the same."""
    one, other = (experts_of(load(source("gpt_oss"), **FORMATS["nf4"]))[layer] for layer in (0, 1))
    state, name = one.state_dict(), "down_proj_bias"
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        other.load_state_dict({key: value for key, value in state.items() if key != name})
    before = other.down_proj_bias.clone()
    with pytest.raises(RuntimeError, match=rf"tensor {name} has shape \[4, 3\]; \[4, 128\] is needed"):
        other.load_state_dict(state | {name: torch.ones(4, 3)})
    assert torch.equal(other.down_proj_bias, before)
    assert torch.equal(other.down_proj, one.down_proj)
    held = other.down_proj_bias
    other.load_state_dict(state)
    assert other.down_proj_bias is held
    assert torch.equal(held, one.down_proj_bias)


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_load_state_dict_on_meta(assign: bool, source: Callable[[str], Path]) -> None:
    layer = experts_of(load(source("gpt_oss"), **FORMATS["nf4-dq"]))[0]
    state = layer.state_dict()
    arguments = (torch.randn(4, 128), torch.randint(0, 4, (4, 2)), torch.rand(4, 2))
    expected = layer(*arguments)
    layer.to("meta")
    layer.down_proj_bias.requires_grad_(False)
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer(*arguments), expected)
    assert (layer.down_proj_bias.data_ptr() == state["down_proj_bias"].data_ptr()) == assign
    assert (layer.gate_up_proj_bias.requires_grad, layer.down_proj_bias.requires_grad) == (True, False)


def test_no_graph_break(source: Callable[[str], Path]) -> None:
    layer = experts_of(load(source("mixtral"), **FORMATS["nf4"]))[0]
    arguments = (torch.randn(4, 128), torch.randint(0, 4, (4, 2)), torch.rand(4, 2))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), layer(*arguments))


def change(path: Path, out: Path, tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    save_file(tensors(load_file(path / SINGLE_FILE)), out / SINGLE_FILE, {"format": "pt"})
    return out


@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
@torch.no_grad()
def test_an_older_checkpoint_with_a_packed_router(form: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Routers were linear layers once, and packed; today they are not, and are read as values."""
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    config = BitsAndBytesConfig(**FORMATS[form])
    load(source("mixtral"), **FORMATS[form]).save_pretrained(tmp_path / "new")

    def pack_routers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        routers = [name for name in tensors if name.endswith(".gate.weight")]
        assert len(routers) == 2
        for name in routers:
            linear = torch.nn.Linear(128, 4, bias=False)
            linear.weight.data = tensors.pop(name)
            kind = Linear8bit if config.load_in_8bit else Linear4bit
            tensors |= kind.from_float(linear, config).state_dict(prefix=name.removesuffix("weight"))
        return tensors

    old = load(change(tmp_path / "new", tmp_path / "old", pack_routers))
    new = load(tmp_path / "new")
    assert len(experts_of(old)) == 2
    ids = tokens()
    difference = (old(ids).logits - new(ids).logits).norm() / new(ids).logits.norm()
    assert 0 < float(difference) < 1  # the router's own rounding, which may choose other experts


def test_a_file_that_left_its_experts_alone_stays_so(source: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers with bitsandbytes writes it: linear layers packed, experts not, the config says nothing of it."""
    load(source("qwen3_moe"), **FORMATS["nf4"], llm_int8_skip_modules=["lm_head", "experts"]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["llm_int8_skip_modules"] = None
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = load(tmp_path)
    assert not experts_of(model)
    original = load(source("qwen3_moe"))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert torch.equal(parameter, original.get_parameter(name))
    config = from_spec(content["quantization_config"])
    assert predict_weights(tmp_path, config, torch.float32) == measure_weights(model)


@torch.no_grad()
def test_skipped_and_overridden_layers(
    source: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skip = ["lm_head", "model.layers.0.mlp.experts"]
    override = {"model.layers.1.mlp.experts": {"load_in_8bit": True}}
    with caplog.at_level(logging.WARNING, logger="quant.hf"):
        model = load(source("qwen3_moe"), **FORMATS["nf4"], llm_int8_skip_modules=skip, module_overrides=override)
    assert "2 stacked expert weights of Qwen3MoeForCausalLM stay unquantized" in caplog.text
    (layer,) = experts_of(model)
    assert layer.down_proj.dtype == torch.int8
    model.save_pretrained(tmp_path / "one")
    names = read_checkpoint_headers(tmp_path / "one")
    assert names["model.layers.0.mlp.experts.3.up_proj.weight"].dtype == "F32"
    assert names["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == "I8"
    again = load(tmp_path / "one")
    ids = tokens()
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / SINGLE_FILE).read_bytes() == (tmp_path / "two" / SINGLE_FILE).read_bytes()


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]], str]] = {
    "an expert's statistics are missing": (
        lambda t, n: {k: v for k, v in t.items() if k != f"{n}.absmax"},
        r"gate_up_proj: the file has 3 tensors model.layers.0.mlp.experts.\*.up_proj.weight.absmax; 4 are needed",
    ),
    "an expert is missing": (
        lambda t, n: {k: v for k, v in t.items() if not k.startswith(n)},
        r"the file has 3 tensors model.layers.0.mlp.experts.\*.up_proj.weight; 4 are needed",
    ),
    "an expert is not packed": (
        lambda t, n: {k: v for k, v in t.items() if not k.startswith(n)} | {n: torch.zeros(64, 128)},
        r"the file has 3 tensors model.layers.0.mlp.experts.\*.up_proj.weight.absmax; 4 are needed",
    ),
    "bytes are missing": (
        lambda t, n: t | {n: t[n][:-1].clone()},
        r"model.layers.0.mlp.experts.2.up_proj.weight has 4095 bytes; its shape \[64, 128\] needs 4096",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    load(source("qwen3_moe"), **FORMATS["nf4"]).save_pretrained(tmp_path / "good")
    damaging, sentence = DAMAGES[damage]
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    with pytest.raises(CheckpointError, match=sentence):
        load(change(tmp_path / "good", tmp_path / "bad", lambda tensors: damaging(tensors, name)))


def test_experts_of_two_formats_are_refused(source: Callable[[str], Path]) -> None:
    layer = experts_of(load(source("mixtral"), **FORMATS["nf4"]))[0]
    other = experts_of(load(source("mixtral"), load_in_4bit=True))[0]
    mixed = [*list(layer.matrices("down_proj"))[:-1], list(other.matrices("down_proj"))[-1]]
    with pytest.raises(
        CheckpointError, match=r"3.w2.weight is packed as fp4 in blocks of 64.* where 0.w2.weight is nf4"
    ):
        layer.adopt("down_proj", mixed)


def test_dense_models_have_no_experts() -> None:
    assert find_experts(tiny_model("llama")) == {}
    assert set(find_experts(tiny_model("mixtral"))) == {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}
