"""The four ways of use that the BitsAndBytesConfig documentation shows, on local tiny models of its architectures.

Each example is a program written for transformers and bitsandbytes; all that is changed before it runs is the import.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit
from quant.errors import QuantConfigError
from tests.tiny_models import save_tiny

THEIR_IMPORT = "from transformers import BitsAndBytesConfig\n"
OUR_IMPORT = "from quant import BitsAndBytesConfig\n"

QLORA = """
import torch
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="auto", dtype=torch.bfloat16)
"""

EIGHT_BIT = """
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(
    load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=["lm_head", "transformer.h.1"]
)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
"""

MIXED = """
import torch
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
"""

OFFLOAD = """
from transformers import AutoModelForCausalLM
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
device_map = {
    "transformer.wte": main_device,
    "transformer.h.0": main_device,
    "transformer.h.1": other_device,
    "transformer.ln_f": main_device,
    "lm_head": other_device,
}
model = AutoModelForCausalLM.from_pretrained(
    path, quantization_config=config, device_map=device_map, offload_folder=offload_folder
)
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def run(example: str, path: Path, **names: Any) -> transformers.PreTrainedModel:
    """The `model` that an example leaves behind, after its one import was exchanged."""
    assert example.count(THEIR_IMPORT) == 1
    scope: dict[str, Any] = {"path": str(path), **names}
    exec(example.replace(THEIR_IMPORT, OUR_IMPORT), scope)
    model: transformers.PreTrainedModel = scope["model"]
    return model


def generated(model: transformers.PreTrainedModel) -> torch.Tensor:
    tokens = torch.randint(3, 259, (1, 6), device=model.device)
    result: torch.Tensor = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert result.shape == (1, 12)
    return result


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_qlora_on_llama(tmp_path: Path) -> None:
    model = run(QLORA, save_tiny("llama", tmp_path, dtype=torch.bfloat16))
    layers = linears(model)
    assert type(layers.pop("lm_head")) is nn.Linear
    assert len(layers) == 14
    for layer in layers.values():
        assert isinstance(layer, Linear4bit)
        assert (layer.quant_type, layer.compute_dtype, layer.absmax.dtype) == ("nf4", torch.bfloat16, torch.uint8)
    generated(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_qlora_trains_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = run(QLORA, save_tiny("llama", tmp_path, dtype=torch.bfloat16))
    packed = {name: t.clone() for name, t in model.state_dict().items() if "proj.weight" in name}
    model = peft.prepare_model_for_kbit_training(model)
    adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    tokens = torch.randint(3, 259, (4, 16))
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    after = model.get_base_model().state_dict()
    kept = {name.replace("proj.", "proj.base_layer."): tensor for name, tensor in packed.items()}
    assert kept
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())


def test_8bit_with_threshold_and_skips_on_bloom(tmp_path: Path) -> None:
    model = run(EIGHT_BIT, save_tiny("bloom", tmp_path))
    for name, layer in linears(model).items():
        if name == "lm_head" or ".h.1." in name:
            assert type(layer) is nn.Linear
        else:
            assert isinstance(layer, Linear8bit)
            assert layer.threshold == 5.0
    generated(model)


def test_mixed_precision_on_mistral(tmp_path: Path) -> None:
    model = run(MIXED, save_tiny("mistral", tmp_path))
    assert model.dtype == torch.float32
    computed = {layer.compute_dtype for layer in linears(model).values() if isinstance(layer, Linear4bit)}
    assert computed == {torch.bfloat16}
    assert model(torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32
    generated(model)


def check_offloaded(model: transformers.PreTrainedModel) -> None:
    for name, layer in linears(model).items():
        if name == "lm_head" or ".h.1." in name:
            assert type(layer) is nn.Linear
        else:
            assert isinstance(layer, Linear8bit)
            assert layer.weight.dtype == torch.int8
    generated(model)


@pytest.mark.filterwarnings("ignore:.*offloaded.*")
def test_offload_on_gptj_between_cpu_and_disk(tmp_path: Path) -> None:
    source = save_tiny("gptj", tmp_path / "source")
    places = {"main_device": "cpu", "other_device": "disk", "offload_folder": str(tmp_path / "offload")}
    model = run(OFFLOAD, source, **places)
    assert {p.device.type for p in model.transformer.h[1].parameters()} == {"meta"}
    check_offloaded(model)
    whole = run(OFFLOAD, source, **(places | {"other_device": "cpu"}))
    assert all(isinstance(layer, Linear8bit) for name, layer in linears(whole).items() if name != "lm_head")
    refused = OFFLOAD.replace(", llm_int8_enable_fp32_cpu_offload=True", "")
    with pytest.raises(QuantConfigError, match="llm_int8_enable_fp32_cpu_offload=True"):
        run(refused, source, **places)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_on_gptj_between_gpu_and_cpu(tmp_path: Path) -> None:
    source = save_tiny("gptj", tmp_path / "source")
    model = run(OFFLOAD, source, main_device=0, other_device="cpu", offload_folder=str(tmp_path / "offload"))
    assert {p.device.type for p in model.transformer.h[0].parameters()} == {"cuda"}
    check_offloaded(model)


def test_the_documented_overrides_are_a_config() -> None:
    text = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    (example,) = [part.partition("```")[0] for part in text.split("```python\n") if "module_overrides=" in part]
    names: dict[str, Any] = {"BitsAndBytesConfig": BitsAndBytesConfig}
    exec(compile(example, "docs/quantization.md", "exec"), names)
    config = names["config"]
    kinds = {
        name: None if (own := config.for_module(name)) is None else (own.load_in_8bit, own.bnb_4bit_blocksize)
        for name in (
            "lm_head",
            "model.layers.0.mlp.up_proj",
            "model.layers.2.mlp.down_proj",
            "model.layers.4.mlp.down_proj",
        )
    }
    assert list(kinds.values()) == [(True, 64), None, (False, 32), (False, 64)]
