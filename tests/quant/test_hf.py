"""Loading, converting and saving whole models through transformers with our quantizer."""

from __future__ import annotations

import copy
import filecmp
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers import auto

import quant
from quant import BitsAndBytesConfig, Linear4bit, Linear8bit
from quant.config import from_spec
from quant.conversion import modules_to_quantize
from quant.errors import CheckpointError, QuantConfigError
from quant.hf import METHODS, OFFLOAD_REFUSED, HalfbyteQuantizer
from quant.linear import PackedLinear
from quant.memory import auto_class, read_config
from quant.offload import offloaded_modules
from tests.tiny_models import CONFIGS, answered, save_tiny, tiny_model

NF4_DQ = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMATS: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True},
    "nf4-dq": NF4_DQ,
    "fp4-dq-bf16-storage": {
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
    "int8-fp16": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def load(path: Path, config: BitsAndBytesConfig | None = None, **how: object) -> transformers.PreTrainedModel:
    if config is not None:  # None itself would tell transformers to forget what the file says
        how["quantization_config"] = config
    return auto_class(read_config(path)).from_pretrained(path, **how)


def prompt() -> torch.Tensor:
    return torch.randint(3, 259, (2, 9))


def logits(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tokens, **answered(model, tokens)).logits
    return result


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def tensor_bytes(model: nn.Module) -> int:
    """Every parameter and buffer once, counted from its own size."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_load_save_load_save(architecture: str, form: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source")
    config = BitsAndBytesConfig(**FORMATS[form])
    first = load(source, config)
    layers = packed_layers(first)
    assert set(layers) == set(modules_to_quantize(tiny_model(architecture), config))
    assert len(layers) >= 8
    assert "lm_head" not in layers
    tokens = prompt()
    expected = logits(first, tokens)
    first.save_pretrained(tmp_path / "a")
    second = load(tmp_path / "a")
    assert torch.equal(logits(second, tokens), expected)
    second.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "b" / name, shallow=False)
    assert first.get_memory_footprint() == second.get_memory_footprint() == tensor_bytes(first)


@pytest.mark.parametrize("form", FORMATS)
def test_forward_equals_a_dequantized_twin(form: str, tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path), BitsAndBytesConfig(**FORMATS[form]))
    twin = copy.deepcopy(model).dequantize(torch.float32)
    assert not packed_layers(twin)
    assert packed_layers(model)
    tokens = prompt()
    difference = logits(model, tokens) - logits(twin, tokens)
    relative = float(difference.norm() / logits(twin, tokens).norm())
    assert relative < (0.1 if "int8" in form else 1e-5)
    if "int8" not in form:
        greedy = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(tokens, **greedy), twin.generate(tokens, **greedy))


def test_files_have_bitsandbytes_names_and_config(tmp_path: Path) -> None:
    load(save_tiny("llama", tmp_path / "s"), BitsAndBytesConfig(**NF4_DQ)).save_pretrained(tmp_path / "o")
    with safe_open(tmp_path / "o" / "model.safetensors", "pt") as file:
        names = {key for key in file.keys() if "layers.0.self_attn.q_proj" in key}  # noqa: SIM118
    prefix = "model.layers.0.self_attn.q_proj.weight"
    suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
    assert names == {prefix + suffix for suffix in suffixes}
    written = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert written == BitsAndBytesConfig(**NF4_DQ).to_dict()
    assert "llm_int8_outliers" not in written


def test_own_extension_survives_a_file_only_where_used(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "s")
    load(source, BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers="batch")).save_pretrained(tmp_path / "o")
    model = load(tmp_path / "o")
    assert {layer.outliers for layer in packed_layers(model).values() if isinstance(layer, Linear8bit)} == {"batch"}


def test_int8_activations_are_asked_for_and_change_no_byte(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "s")
    plain = load(source, BitsAndBytesConfig(**NF4_DQ))
    fast = load(source, BitsAndBytesConfig(**NF4_DQ, bnb_4bit_activations="int8"))
    for model, name in ((plain, "plain"), (fast, "fast")):
        model.save_pretrained(tmp_path / name)
    again = load(tmp_path / "fast")
    for model, activations in ((plain, "float"), (fast, "int8"), (again, "int8"), (load(tmp_path / "plain"), "float")):
        assert {layer.activations for layer in packed_layers(model).values()} == {activations}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "fast")]
    assert files[0] == files[1]
    assert "bnb_4bit_activations" not in (tmp_path / "plain" / "config.json").read_text()
    tokens = torch.arange(1, 25)[None]
    found = [logits(model, tokens) for model in (plain, fast, again)]
    assert torch.equal(found[1], found[2])
    assert 0 < float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_what_is_not_quantized(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "s", dtype=torch.bfloat16)
    config = from_spec("nf4-dq", compute_dtype=dtype)
    for path, wanted in ((source, config), (tmp_path / "o", None)):
        model = load(path, wanted, dtype=dtype)
        assert model.model.norm.weight.dtype == dtype
        assert model.lm_head.weight.dtype == dtype
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, Linear4bit)
        assert layer.nested_absmax is not None
        assert (layer.absmax.dtype, layer.nested_absmax.dtype, layer.weight.dtype) == (
            torch.uint8,
            torch.float32,
            torch.uint8,
        )
        assert layer.compute_dtype == dtype
        assert logits(model, prompt()).dtype == dtype
        model.save_pretrained(tmp_path / "o")


@pytest.mark.parametrize(
    ("skips", "kept"),
    [
        (None, {"lm_head"}),
        (["lm_head"], {"lm_head"}),
        (["q_proj", "lm_head"], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"}),
        (["model.layers.0", "lm_head"], {"lm_head", *(f"model.layers.0.{name}" for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))}),
        ([r"model\.layers\..*\.mlp\.(up|down)_proj"], {
            f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("up", "down")}),
        (["up_pro"], set()),
    ],
)  # fmt: skip
def test_skip_rules(skips: list[str] | None, kept: set[str], tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skips)
    model = load(save_tiny("llama", tmp_path), config)
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == kept
    transformers_rule = transformers.quantizers.quantizers_utils.should_convert_module
    assert skips is None or all(transformers_rule(name, skips) != (name in kept) for name in [*packed_layers(model)])


OVERRIDES: dict[str, dict[str, object] | None] = {
    "lm_head": {"load_in_8bit": True, "llm_int8_outliers": "batch"},
    "model.layers.0": None,
    "o_proj": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_blocksize": 256},
}


def test_modules_with_formats_of_their_own(tmp_path: Path) -> None:
    overrides = {
        "lm_head": OVERRIDES["lm_head"],
        "model.layers.0": None,
        "layers.1.self_attn.o_proj": OVERRIDES["o_proj"],
    }
    config = BitsAndBytesConfig(load_in_4bit=True, module_overrides=overrides)
    source = save_tiny("llama", tmp_path / "s")
    assert modules_to_quantize(tiny_model("llama"), config) == {
        "lm_head": "8bit",
        **{f"model.layers.1.{name}": "4bit" for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
    }  # fmt: skip
    model = load(source, config)
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert filecmp.cmp(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors", shallow=False)
    assert filecmp.cmp(tmp_path / "a" / "config.json", tmp_path / "b" / "config.json", shallow=False)
    for loaded in (model, again):
        layer, head = loaded.model.layers[1], loaded.lm_head
        assert isinstance(head, Linear8bit)
        assert head.outliers == "batch"
        assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
        described = (layer.self_attn.o_proj.quant_type, layer.self_attn.o_proj.blocksize, layer.mlp.up_proj.quant_type)
        assert described == ("nf4", 256, "fp4")
        assert layer.self_attn.o_proj.nested_absmax is not None
        assert layer.mlp.up_proj.nested_absmax is None
    tokens = prompt()
    assert torch.equal(logits(model, tokens), logits(again, tokens))


@pytest.mark.parametrize(
    ("overrides", "changes", "words"),
    [
        ({"layers.7": None}, {}, "'layers.7', which changes nothing in LlamaForCausalLM"),
        ({"lm_head": {"load_in_8bit": True}}, {"tie_word_embeddings": True}, "'lm_head', which changes nothing"),
        (OVERRIDES, {}, "names model.layers.0.self_attn.o_proj in 'model.layers.0' and in 'o_proj', which disagree"),
    ],
)
def test_overrides_that_cannot_be_honoured(
    overrides: dict[str, object], changes: dict[str, object], words: str
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, module_overrides=overrides)
    with pytest.raises(QuantConfigError, match=words):
        modules_to_quantize(tiny_model("llama", **changes), config)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_block_size_for_packing(blocksize: int, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "s")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_blocksize=blocksize)
    model = load(source, config)
    model.save_pretrained(tmp_path / "o")
    file = tmp_path / "o" / "config.json"
    tokens = prompt()
    for keep in (True, False):  # the tensors of the file say it again
        again = load(tmp_path / "o")
        assert {layer.blocksize for layer in packed_layers(again).values()} == {blocksize}
        assert torch.equal(logits(model, tokens), logits(again, tokens))
        content = json.loads(file.read_text())
        assert content["quantization_config"].pop("bnb_4bit_blocksize", None) == (blocksize if keep else None)
        file.write_text(json.dumps(content))


def test_tied_embeddings_stay_whole(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "s", tie_word_embeddings=True)
    for skips in (None, ["q_proj"]):  # an own list replaces the default one, which names what is tied
        model = load(source, BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skips))
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.get_memory_footprint() == tensor_bytes(model)


def test_gpt2_counts_as_linear_and_is_saved_as_linear(tmp_path: Path) -> None:
    model = load(save_tiny("gpt2", tmp_path / "s"), BitsAndBytesConfig(load_in_8bit=True))
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.out_features, layer.in_features) == (384, 128)
    model.save_pretrained(tmp_path / "o")
    assert load_file(tmp_path / "o" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].shape == (384, 128)
    twin = tiny_model("gpt2")
    weight = twin.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        assert float((layer.dequantize() - weight.t()).norm() / weight.norm()) < 0.01


def test_shards_may_split_a_layer(tmp_path: Path) -> None:
    load(save_tiny("llama", tmp_path / "s"), BitsAndBytesConfig(**NF4_DQ)).save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    expected = logits(load(tmp_path / "one"), tokens := prompt())
    split = tmp_path / "split"
    split.mkdir()
    (split / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    where = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[index % 3][name] = tensor
        where[name] = f"model-0000{index % 3 + 1}-of-00003.safetensors"
    for index, shard in enumerate(shards):
        save_file(shard, split / f"model-0000{index + 1}-of-00003.safetensors", {"format": "pt"})
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert torch.equal(logits(load(split), tokens), expected)


def test_saving_in_shards(tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path / "s"), BitsAndBytesConfig(**NF4_DQ))
    model.save_pretrained(tmp_path / "o", max_shard_size="100KB")
    assert len(list((tmp_path / "o").glob("*.safetensors"))) > 2
    tokens = prompt()
    assert torch.equal(logits(load(tmp_path / "o"), tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("device_map", "away"),
    [
        (None, []),
        ("auto", []),
        ({"": "cpu"}, []),
        ({"": torch.device("cpu")}, []),
        ({"a": 0, "b": "cpu"}, ["b"]),
        ({"a": "cuda:0", "b": "disk", "c": torch.device("cpu")}, ["b", "c"]),
        ({"a": torch.device("cuda", 0), "b": "cuda:1"}, []),
        ({"a": "cpu", "b": "disk"}, ["b"]),
        ({"": "disk"}, [""]),
    ],
)
def test_what_counts_as_offloaded(device_map: object, away: list[str]) -> None:
    assert offloaded_modules(device_map) == away
    strict = HalfbyteQuantizer(BitsAndBytesConfig(load_in_8bit=True))
    lenient = HalfbyteQuantizer(BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True))
    lenient.validate_environment(device_map=device_map)
    if away:
        with pytest.raises(QuantConfigError) as refusal:
            strict.validate_environment(device_map=device_map)
        assert str(refusal.value) == OFFLOAD_REFUSED
    else:
        strict.validate_environment(device_map=device_map)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_a_cpu_is_a_device_like_any_other(device_map: object, tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path), BitsAndBytesConfig(load_in_4bit=True), device_map=device_map)
    assert len(packed_layers(model)) == 14


def test_register_and_unregister() -> None:
    own = (HalfbyteQuantizer, BitsAndBytesConfig)
    try:
        quant.unregister()
        for method in METHODS:
            assert auto.AUTO_QUANTIZER_MAPPING[method].__module__.startswith("transformers.")
            assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] is transformers.BitsAndBytesConfig
        quant.unregister()
        quant.register()
        quant.register()
        quant.unregister()
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHODS[0]] is transformers.BitsAndBytesConfig
    finally:
        quant.register()
    for method in METHODS:
        assert (auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]) == own


def test_transformers_own_config_gets_our_layers(tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0)
    layers = packed_layers(load(save_tiny("llama", tmp_path), config)).values()
    assert {layer.threshold for layer in layers if isinstance(layer, Linear8bit)} == {4.0}


def test_a_config_without_a_flag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantConfigError, match="neither load_in_4bit nor load_in_8bit"):
        load(save_tiny("llama", tmp_path), BitsAndBytesConfig())


def damaged(path: Path, change: dict[str, torch.Tensor | None]) -> Path:
    file = path / "model.safetensors"
    tensors = {name: t for name, t in (load_file(file) | change).items() if t is not None}
    save_file(tensors, file, {"format": "pt"})
    return path


LAYER = "model.layers.1.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{LAYER}.weight.absmax": torch.zeros(7, dtype=torch.uint8)}, "weight.absmax has 7 values; 384 are needed"),
        ({f"{LAYER}.weight.absmax": None}, "weight.absmax is missing"),
        ({STATE: None}, "either SCB or one weight.quant_state"),
        ({f"{LAYER}.weight": None}, "weight is missing"),
        ({STATE: torch.zeros(9000, dtype=torch.uint8)}, "at most 4096"),
        ({f"{LAYER}.weight": torch.zeros(192, 128)}, "weight has 98304 bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_damaged_file_is_one_sentence(change: dict[str, torch.Tensor | None], words: str, tmp_path: Path) -> None:
    load(save_tiny("llama", tmp_path / "s"), BitsAndBytesConfig(**NF4_DQ)).save_pretrained(tmp_path / "o")
    with pytest.raises(CheckpointError, match=words) as refusal:
        load(damaged(tmp_path / "o", change))
    assert LAYER in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_whole_layer_missing_is_not_invented(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "s")
    load(source, BitsAndBytesConfig(**NF4_DQ)).save_pretrained(tmp_path / "o")
    gone = {name: None for name in load_file(tmp_path / "o" / "model.safetensors") if name.startswith(LAYER)}
    with pytest.raises(CheckpointError, match=f"tensor {LAYER}.weight is missing"):
        load(damaged(tmp_path / "o", dict(gone)))
    with pytest.raises(CheckpointError, match=f"tensor {LAYER}.weight is missing"):
        load(damaged(source, {f"{LAYER}.weight": None}), BitsAndBytesConfig(load_in_8bit=True))


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    source = damaged(save_tiny("llama", tmp_path), {f"{LAYER}.weight": torch.zeros(192, 64)})
    with pytest.raises(CheckpointError, match=r"has shape \[192, 64\]; \[192, 128\] is needed"):
        load(source, BitsAndBytesConfig(load_in_4bit=True))


def test_a_packed_tensor_where_the_model_keeps_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(save_tiny("llama", tmp_path / "s"), BitsAndBytesConfig(**NF4_DQ)).save_pretrained(tmp_path / "o")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["up_proj"])
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight is packed in the file, but its module stays unquantized"
    ):
        load(tmp_path / "o")


def test_stacked_experts_that_stay_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    kept = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "experts"])
    with caplog.at_level(logging.WARNING, logger="quant.hf"):
        model = load(tmp_path, kept)
    assert "2 stacked expert weights of Qwen3MoeForCausalLM stay unquantized" in caplog.text
    assert packed_layers(model)


MEMORY_PROBE = """
import gc, sys, threading
import torch, transformers
import quant
transformers.utils.logging.disable_progress_bar()

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(**how):
    gc.collect()
    before = peak = anonymous()
    done = threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = transformers.AutoModelForCausalLM.from_pretrained(**how)
    done.set()
    watcher.join()
    print(peak - before, model.get_memory_footprint())
    return model

config = quant.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
quant.Linear4bit.from_float(torch.nn.Linear(64, 64), config)(torch.zeros(1, 64))  # libraries and pools are loaded now
source, packed = sys.argv[1:]
load(pretrained_model_name_or_path=source, quantization_config=config).save_pretrained(packed)
load(pretrained_model_name_or_path=packed)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("blocks", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_loading_holds_the_packed_model_and_a_few_tensors(blocks: int, tmp_path: Path) -> None:
    """100 or 300 MB of bf16: peak anonymous memory, sampled every millisecond, stays by the packed size."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    source = tmp_path / "source"
    model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=blocks, **shape)
    model.save_pretrained(source)
    unquantized = tensor_bytes(model)
    largest = max(tensor.nbytes for tensor in model.parameters())
    del model
    assert unquantized == pytest.approx(blocks * 33.6e6, rel=0.05)
    probe = [sys.executable, "-c", MEMORY_PROBE, str(source), str(tmp_path / "packed")]
    run = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        peak, footprint = map(int, line.split())
        assert footprint < 0.30 * unquantized
        assert peak < footprint + 4 * largest, f"{peak / 1e6:.0f} MB for a packed size of {footprint / 1e6:.0f} MB"
    assert len(run.stdout.splitlines()) == 2
