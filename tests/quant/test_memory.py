"""Predicted from headers and config equals measured from tensors, to the byte, for every tiny model and format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quant
from quant import memory
from quant.config import PRESETS, from_spec
from quant.errors import CheckpointError
from tests.tiny_models import CONFIGS, save_tiny

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("model") / request.param)


def load(path: Path, config: quant.BitsAndBytesConfig | None, dtype: torch.dtype) -> torch.nn.Module:
    options = {"quantization_config": config} if config is not None else {}
    return memory.auto_class(memory.read_config(path)).from_pretrained(path, dtype=dtype, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_predicted_equals_measured(checkpoint: Path, preset: str, dtype: torch.dtype) -> None:
    config = from_spec(preset)
    predicted = memory.predict_weights(checkpoint, config, dtype)
    model = load(checkpoint, config, dtype)
    assert predicted == memory.measure_weights(model)
    assert sum(predicted.values()) == model.get_memory_footprint()  # type: ignore[operator]
    assert (memory.PACKED_WEIGHTS in predicted) == (preset != "none")
    assert (memory.NESTED_STATISTICS in predicted) == preset.endswith("-dq")


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_storage_dtypes_take_the_same_bytes(tmp_path: Path, storage: str) -> None:
    path = save_tiny("llama", tmp_path)
    config = quant.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    predicted = memory.predict_weights(path, config, torch.float32)
    assert predicted == memory.measure_weights(load(path, config, torch.float32))
    assert predicted == memory.predict_weights(path, quant.BitsAndBytesConfig(load_in_4bit=True), torch.float32)


@pytest.mark.parametrize("preset", ["nf4", "fp4-dq"])
@pytest.mark.parametrize("blocksize", [32, 512, 4096])
def test_block_sizes(tmp_path: Path, blocksize: int, preset: str) -> None:
    path = save_tiny("llama", tmp_path)
    config = from_spec(preset)
    assert config is not None
    config.bnb_4bit_blocksize = blocksize
    predicted = memory.predict_weights(path, config, torch.float32)
    assert predicted == memory.measure_weights(load(path, config, torch.float32))
    assert predicted[memory.ABSMAX] != memory.predict_weights(path, from_spec(preset), torch.float32)[memory.ABSMAX]


def test_modules_with_formats_of_their_own(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "source")
    overrides = {
        "lm_head": {"load_in_8bit": True},
        "model.layers.0": None,
        r".*layers\.1\..*down_proj": {"bnb_4bit_blocksize": 256, "bnb_4bit_use_double_quant": True},
        r".*layers\.1\..*q_proj": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    }
    config = quant.BitsAndBytesConfig(load_in_4bit=True, module_overrides=overrides)
    predicted = memory.predict_weights(path, config, torch.bfloat16)
    model = load(path, config, torch.bfloat16)
    assert predicted == memory.measure_weights(model)
    assert {memory.NESTED_STATISTICS, "unquantized_float16", "unquantized_bfloat16"} < set(predicted)
    model.save_pretrained(tmp_path / "quantized")  # type: ignore[operator]
    assert predicted == memory.predict_weights(tmp_path / "quantized", config, torch.bfloat16)


def test_fp16_main_weights_are_not_packed(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    config = quant.BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    predicted = memory.predict_weights(path, config, torch.float32)
    assert predicted == memory.measure_weights(load(path, config, torch.float32))
    assert memory.PACKED_WEIGHTS not in predicted


def test_skipped_modules_stay_as_they_are(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    all_layers = quant.BitsAndBytesConfig(load_in_8bit=True)
    skipping = quant.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj", "lm_head"])
    predicted = memory.predict_weights(path, skipping, torch.bfloat16)
    assert predicted == memory.measure_weights(load(path, skipping, torch.bfloat16))
    assert predicted[memory.PACKED_WEIGHTS] < memory.predict_weights(path, all_layers, torch.bfloat16)["packed_weights"]


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_count_once(tmp_path: Path, tied: bool) -> None:
    path = save_tiny("llama", tmp_path, tie_word_embeddings=tied)
    predicted = memory.predict_weights(path, None, torch.float32)
    model = load(path, None, torch.float32)
    assert predicted == memory.measure_weights(model)
    assert sum(predicted.values()) == sum(t.nbytes for t in {id(t): t for t in all_tensors(model)}.values())


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("changed", [0.0, 1.0])
def test_tables_that_files_hold_twice_count_twice(tmp_path: Path, changed: float, quantization: str | None) -> None:
    """The config ties them, the files do not: transformers loads both, unless they are the same."""
    path = save_tiny("llama", tmp_path, tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + changed
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = None if quantization is None else from_spec(quantization)
    predicted = memory.predict_weights(path, config, torch.float32)
    assert predicted == memory.measure_weights(load(path, config, torch.float32))
    tied = memory.predict_weights(
        save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True), config, torch.float32
    )
    table = tensors["lm_head.weight"].nbytes
    assert sum(predicted.values()) == sum(tied.values()) + (table if changed else 0)


def all_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("preset", ["nf4", "fp4-dq", "int8"])
def test_prequantized_checkpoints_are_planned_from_their_headers(tmp_path: Path, preset: str) -> None:
    source = save_tiny("llama", tmp_path / "source")
    load(source, from_spec(preset), torch.bfloat16).save_pretrained(tmp_path / "quantized")  # type: ignore[operator]
    own = memory.read_config(tmp_path / "quantized").quantization_config
    config = quant.BitsAndBytesConfig.from_dict(own if isinstance(own, dict) else own.to_dict())
    predicted = memory.predict_weights(tmp_path / "quantized", config, torch.bfloat16)
    model = load(tmp_path / "quantized", None, torch.bfloat16)
    assert predicted == memory.measure_weights(model)
    assert predicted == memory.predict_weights(source, from_spec(preset), torch.bfloat16)


def test_known_shape_by_hand() -> None:
    """Llama-2-7B in NF4, its linear layers by hand: 6,476,005,376 weights at 4 bits, one float32 per 64 of them."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = transformers.LlamaConfig(**shape, vocab_size=32000)
    model = memory.meta_model(config, torch.bfloat16)
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    sizes = memory.predict_meta(model, from_spec("nf4"), torch.bfloat16)
    assert linear == 6_476_005_376
    assert sizes["packed_weights"] == linear // 2
    assert sizes["absmax"] == linear // 64 * 4
    assert sizes["unquantized_bfloat16"] == 2 * (2 * 32000 * 4096 + 65 * 4096)
    nested = memory.predict_meta(model, from_spec("nf4-dq"), torch.bfloat16)
    assert nested["absmax"] == linear // 64
    assert round(sum(sizes.values()) / 1e9, 2) == 4.17
    assert round(sum(nested.values()) / 1e9, 2) == 3.87


@pytest.mark.parametrize("error", [CheckpointError("ours"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_what_is_no_fault_of_a_config_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, memory.refused("a config is at fault"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("a sentence\nof two lines"), "x is not one: a sentence of two lines"),
        (KeyError("rope"), "x is not one: KeyError: 'rope'"),
        (RecursionError("too deep"), "x is not one: RecursionError: too deep"),
        (AssertionError(), "x is not one: AssertionError"),
        (ValueError("a" * 301), f"x is not one: {'a' * 297}..."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_transformers_raises_becomes_one_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught, memory.refused("x is not one"):
        raise error
    assert str(caught.value) == sentence
