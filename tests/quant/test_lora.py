"""Adapters on packed layers: gradients, preparation, merging and unmerging, and a QLoRA run on the demo model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit
from quant.errors import CheckpointError, QuantConfigError, QuantError
from quant.linear import PackedLinear
from quant.lora import PackedLora, lora_config, prepare_model_for_kbit_training
from tests.tiny_models import save_tiny

# peft 0.21 asks transformers for a property that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NF4_DQ = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMATS: dict[str, dict[str, object]] = {
    "nf4-dq": NF4_DQ,
    "fp4-128": {"load_in_4bit": True, "bnb_4bit_blocksize": 128},
    "nf4-dq-bfloat16": NF4_DQ | {"bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
    "int8-fp16": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source"))


def load(path: Path, form: str, **how: object) -> transformers.PreTrainedModel:
    config = BitsAndBytesConfig(**FORMATS[form])
    return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **how)


def adapted(model: nn.Module, **arguments: Any) -> peft.PeftModel:
    """Adapters on every linear layer, with random numbers in both of their halves."""
    result = peft.get_peft_model(model, lora_config(r=4, target_modules="all-linear", **arguments))
    for name, parameter in result.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return result


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def adapters(model: nn.Module) -> list[PackedLora]:
    return [module for module in model.modules() if isinstance(module, PackedLora)]


def tokens() -> torch.Tensor:
    return torch.randint(3, 259, (2, 12))


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_reach_adapters_and_inputs(source: Path, form: str) -> None:
    model = adapted(load(source, form))
    assert len(adapters(model)) == 14
    before = bits(model)
    batch = tokens()
    embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=batch).loss.backward()
    assert embedded.grad is not None
    assert float(embedded.grad.norm()) > 0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all(p.dtype == torch.float32 and p.grad is not None and float(p.grad.norm()) > 0 for p in trained.values())
    assert all("lora_" in name for name in trained)
    assert bits(model) == before


@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
def test_gradients_are_those_of_the_dequantized_model(source: Path, form: str) -> None:
    model = load(source, form)
    if form == "int8":  # without rounded activations the forward pass is the same function
        for module in model.modules():
            if isinstance(module, Linear8bit):
                module.threshold = 1e-9
    twin = copy.deepcopy(model).dequantize(torch.float32)
    batch = tokens()
    gradients = []
    for each in (model, twin):
        torch.manual_seed(7)
        result = adapted(each)
        result(input_ids=batch, labels=batch).loss.backward()
        gradients.append([p.grad for name, p in result.named_parameters() if "lora_" in name])
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_merging_packs_the_sum_anew_and_unmerging_gives_the_bytes_back(source: Path, form: str) -> None:
    model = adapted(load(source, form))
    before = bits(model)
    first = adapters(model)[0]
    base = first.get_base_layer()
    assert isinstance(base, PackedLinear)
    value = base.dequantize(torch.float32) if form != "int8-fp16" else base.weight.float()
    expected = type(base).from_float(
        linear(value + first.get_delta_weight("default")), BitsAndBytesConfig(**FORMATS[form])
    )
    batch = tokens()
    unmerged = model(batch).logits
    model.merge_adapter()
    assert bits(base) == bits(expected)
    merged = model(batch).logits
    assert float((merged - unmerged).norm() / unmerged.norm()) < (0.5 if "4" in form else 0.1)
    model.unmerge_adapter()
    assert bits(model) == before
    assert torch.equal(model(batch).logits, unmerged)


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def test_merge_and_unload_gives_a_plain_packed_model(source: Path, tmp_path: Path) -> None:
    model = adapted(load(source, "nf4-dq")).merge_and_unload(safe_merge=True)
    assert not adapters(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = tokens()
    with torch.no_grad():
        assert torch.equal(again(batch).logits, model(batch).logits)


def test_two_adapters_are_one_rounding_apart(source: Path) -> None:
    model = adapted(load(source, "nf4-dq"))
    model.add_adapter("second", lora_config(r=2, target_modules=r".*_proj", init_lora_weights=False))
    layer = adapters(model)[0]
    base = layer.get_base_layer()
    assert isinstance(base, PackedLinear)
    with torch.no_grad():
        total = base.dequantize() + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    before = bits(model)
    model.merge_adapter(adapter_names=["default", "second"])
    assert bits(base) == bits(Linear4bit.from_float(linear(total), BitsAndBytesConfig(**NF4_DQ)))
    model.unmerge_adapter()
    assert bits(model) == before


def test_a_broken_adapter_is_not_merged(source: Path) -> None:
    model = adapted(load(source, "nf4-dq"))
    before = bits(model)
    with torch.no_grad():
        adapters(model)[0].lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(QuantError, match="adapters default is not finite; nothing was merged"):
        model.merge_adapter(safe_merge=True)
    assert bits(model) == before


def test_adapters_from_a_file_can_be_merged(source: Path, tmp_path: Path) -> None:
    model = adapted(load(source, "nf4-dq"))
    model.save_pretrained(tmp_path)
    config = lora_config(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(load(source, "nf4-dq"), tmp_path, config=config)
    batch = tokens()
    with torch.no_grad():
        assert torch.equal(again(batch).logits, model(batch).logits)
        assert torch.equal(again.merge_and_unload()(batch).logits, model.merge_and_unload()(batch).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"use_dora": True}, "Dora was asked for; accepted on packed layers is plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ],
)
def test_what_needs_the_values_of_the_weight_is_refused(arguments: dict[str, Any], words: str) -> None:
    model = nn.Sequential(Linear4bit.from_float(nn.Linear(64, 64), BitsAndBytesConfig(load_in_4bit=True)))
    with pytest.raises(QuantConfigError, match=words):
        peft.get_peft_model(model, lora_config(target_modules=["0"], **arguments))
    with pytest.raises(QuantConfigError, match="one or the other"):
        lora_config(peft.LoraConfig(), r=4)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_a_bias_without_a_place_is_not_merged() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    for has_bias in (True, False):
        model = nn.Sequential(Linear4bit.from_float(nn.Linear(64, 64, bias=has_bias), config))
        adapted_model = peft.get_peft_model(model, lora_config(target_modules=["0"], lora_bias=True))
        (layer,) = adapters(adapted_model)
        nn.init.normal_(layer.lora_B["default"].bias)
        if has_bias:
            before = layer.get_base_layer().bias.detach().clone()
            adapted_model.merge_adapter()
            torch.testing.assert_close(layer.get_base_layer().bias, before + layer.lora_B["default"].bias)
            adapted_model.unmerge_adapter()
            assert torch.equal(layer.get_base_layer().bias, before)
        else:
            with pytest.raises(QuantError, match="has a bias .* and the layer has none"):
                adapted_model.merge_adapter()


@pytest.mark.parametrize("form", FORMATS)
def test_preparing_keeps_packed_bytes(source: Path, form: str) -> None:
    model = load(source, form, dtype=torch.bfloat16)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear) and m.is_packed}
    before = {name: bits(layer) for name, layer in packed.items()}
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert {name: bits(layer) for name, layer in packed.items()} == before
    assert not any(p.requires_grad for p in prepared.parameters())
    assert prepared.model.norm.weight.dtype == torch.float32
    assert prepared.is_activation_checkpointing
    batch = tokens()
    trained = adapted(prepared).train()
    trained(input_ids=batch, labels=batch).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_packed_bytes_that_were_cast_are_noticed(source: Path) -> None:
    """peft's own function spares only parameters of a class called Params4bit."""
    model = load(source, "nf4-dq-bfloat16")
    peft.prepare_model_for_kbit_training(model)
    with pytest.raises(CheckpointError, match="stored as torch.bfloat16 was cast to torch.float32"):
        model(tokens())
    with pytest.raises(CheckpointError, match="load it anew"):
        model.state_dict()


DEMO = Path(__file__).parents[2] / "server" / "demo"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (DEMO / "model" / "model.safetensors").is_file(), reason="needs the demo model")
@pytest.mark.parametrize("form", ["nf4-dq", "int8"])
def test_qlora_on_the_demo_model(form: str) -> None:
    """Two hundred steps on this package's own sources, which the demo model was not trained on."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model")
    text = "\n\n".join(file.read_text() for file in sorted(DEMO.parents[1].joinpath("quant").glob("*.py")))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = ids[: ids.numel() // 64 * 64].view(-1, 64)
    held_out, training = windows[::8], windows[torch.arange(len(windows)) % 8 != 0]
    model = prepare_model_for_kbit_training(load(DEMO / "model", form), use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, lora_config(r=8, target_modules="all-linear"))
    before = bits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    @torch.no_grad()
    def loss() -> float:
        return float(model(input_ids=held_out, labels=held_out).loss)

    start = loss()
    for _ in range(200):
        batch = training[torch.randint(len(training), (4,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < 0.8 * start, (start, loss())
    assert bits(model) == before
