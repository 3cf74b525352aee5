"""quant/convert.py, stream.py, shards.py: converting tensor by tensor writes what save_pretrained would."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quant
from quant import BitsAndBytesConfig
from quant.config import from_spec
from quant.convert import MANIFEST_FILE, REPORT_FILE, quantize_checkpoint, report_checkpoint
from quant.errors import CheckpointError, OutputError, QuantConfigError
from quant.headers import INDEX_FILE, SINGLE_FILE, read_checkpoint_headers
from quant.report import report_model
from quant.shards import ShardWriter
from tests.tiny_models import auto_class, save_tiny


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(architecture: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
        key = f"{architecture}-{dtype}-{changes}"
        if key not in made:
            made[key] = save_tiny(architecture, tmp_path_factory.mktemp(architecture), dtype=dtype, **changes)
        return made[key]

    return get


def through_transformers(path: Path, out: Path, config: BitsAndBytesConfig, auto: Any = AutoModelForCausalLM) -> Path:
    auto.from_pretrained(path, quantization_config=config).save_pretrained(out)
    return out


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text()), name
    assert (ours / SINGLE_FILE).read_bytes() == (theirs / SINGLE_FILE).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("preset", ["nf4", "nf4-dq", "fp4-dq", "int8"])
def test_equals_from_pretrained_and_save_pretrained(
    architecture: str, preset: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    path = source(architecture)
    result = quantize_checkpoint(path, tmp_path / "out", preset)
    config = from_spec(preset, compute_dtype=torch.bfloat16)
    assert config is not None
    assert_same_checkpoint(tmp_path / "out", through_transformers(path, tmp_path / "theirs", config))
    assert {layer.format for layer in result.layers} == {preset}


@pytest.mark.parametrize("architecture", ["t5", "llava", "mixtral"])
def test_what_is_not_a_dense_causal_model(architecture: str, source: Callable[..., Path], tmp_path: Path) -> None:
    path = source(architecture)
    quantize_checkpoint(path, tmp_path / "out", "nf4-dq")
    config = from_spec("nf4-dq", compute_dtype=torch.bfloat16)
    assert config is not None
    theirs = through_transformers(path, tmp_path / "theirs", config, auto_class(architecture))
    assert_same_checkpoint(tmp_path / "out", theirs)


@pytest.mark.parametrize(
    "fields",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16", "llm_int8_skip_modules": ["lm_head", "down_proj"]},
        {"load_in_4bit": True, "llm_int8_skip_modules": ["model.layers.0"]},
        {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    ],
    ids=["storage", "lm_head-too", "fp16-main"],
)
def test_fields_mean_what_they_mean_to_transformers(
    fields: dict[str, Any], source: Callable[..., Path], tmp_path: Path
) -> None:
    path = source("llama", torch.float32)
    quantize_checkpoint(path, tmp_path / "out", fields)
    assert_same_checkpoint(
        tmp_path / "out", through_transformers(path, tmp_path / "theirs", BitsAndBytesConfig(**fields))
    )


def test_another_dtype_is_cast_before_it_is_packed(source: Callable[..., Path], tmp_path: Path) -> None:
    path = source("llama", torch.float32)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantize_checkpoint(path, tmp_path / "out", config, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    assert_same_checkpoint(tmp_path / "out", tmp_path / "theirs")


def test_tied_weights_are_written_once(source: Callable[..., Path], tmp_path: Path) -> None:
    path = source("llama", tie_word_embeddings=True)
    config = from_spec("nf4", compute_dtype=torch.bfloat16)
    assert config is not None
    theirs = through_transformers(path, tmp_path / "theirs", config)
    quantize_checkpoint(path, tmp_path / "out", "nf4")
    assert_same_checkpoint(tmp_path / "out", theirs)
    # Files of torch's own days hold the output embedding as well.
    twice = copy_with(
        path, tmp_path / "twice", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    quantize_checkpoint(twice, tmp_path / "out2", "nf4")
    assert_same_checkpoint(tmp_path / "out2", theirs)
    only = copy_with(path, tmp_path / "only", lambda t: {renamed(k): v for k, v in t.items()})
    quantize_checkpoint(only, tmp_path / "out3", "nf4")
    assert_same_checkpoint(tmp_path / "out3", theirs)


def renamed(key: str) -> str:
    return "lm_head.weight" if key == "model.embed_tokens.weight" else key


def copy_with(path: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    out.mkdir()
    for file in path.iterdir():
        if file.name != SINGLE_FILE:
            (out / file.name).write_bytes(file.read_bytes())
    save_file(change(load_file(path / SINGLE_FILE)), out / SINGLE_FILE, {"format": "pt"})
    return out


def test_names_without_the_base_prefix_are_the_models_too(source: Callable[..., Path], tmp_path: Path) -> None:
    path = source("gpt2")
    bare = copy_with(path, tmp_path / "bare", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    assert any(name.startswith("h.0.") for name in read_checkpoint_headers(bare))
    quantize_checkpoint(bare, tmp_path / "out", "nf4")
    config = from_spec("nf4", compute_dtype=torch.bfloat16)
    assert config is not None
    assert_same_checkpoint(tmp_path / "out", through_transformers(bare, tmp_path / "theirs", config))


def test_shards_and_index_load_like_one_file(source: Callable[..., Path], tmp_path: Path) -> None:
    path = source("llama")
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    whole = quantize_checkpoint(path, tmp_path / "whole", "nf4-dq")
    parts = quantize_checkpoint(tmp_path / "sharded", tmp_path / "parts", "nf4-dq", max_shard_bytes=60_000)
    files = [file for file in parts.files if file.name.endswith(".safetensors")]
    assert len(files) > 3
    assert parts.layers == whole.layers
    index = json.loads((tmp_path / "parts" / INDEX_FILE).read_text())
    expected = load_file(tmp_path / "whole" / SINGLE_FILE)
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    largest = max(tensor.nbytes for tensor in expected.values())
    assert all(file.bytes <= max(60_000, largest) + 8192 for file in files)
    found = {k: v for file in files for k, v in load_file(tmp_path / "parts" / file.name).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    tokens = torch.randint(3, 259, (1, 8))
    assert torch.equal(one(tokens).logits, other(tokens).logits)


def test_what_lies_beside_the_weights(source: Callable[..., Path], tmp_path: Path) -> None:
    path = copy_with(source("llama"), tmp_path / "in", lambda t: t)
    (path / "LICENSE").write_text("terms")
    (path / "modeling.py").write_text("raise SystemExit")
    (path / "pytorch_model.bin").write_bytes(b"no")
    result = quantize_checkpoint(path, tmp_path / "out", "nf4-dq")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in result.files}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "LICENSE", "config.json", REPORT_FILE, MANIFEST_FILE}
    assert not names & {"modeling.py", "pytorch_model.bin"}
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert {file["name"] for file in manifest["files"]} == names - {MANIFEST_FILE}
    for file in manifest["files"]:
        content = (tmp_path / "out" / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert [layer["name"] for layer in report["layers"]] == [layer.name for layer in result.layers]
    assert report["total"]["unquantized_bytes"] == result.unquantized_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = sum(t.nbytes for t in model.parameters()) + sum(b.nbytes for b in model.buffers())
    rotary = sum(b.nbytes for name, b in model.named_buffers() if "rotary" in name)
    assert report["total"]["bytes"] + result.unquantized_bytes == kept - rotary


def test_two_runs_give_the_same_bytes(source: Callable[..., Path], tmp_path: Path) -> None:
    one, other = (quantize_checkpoint(source("llama"), tmp_path / name, "int8").files for name in "ab")
    assert one == other


def test_the_report_needs_no_output(source: Callable[..., Path], tmp_path: Path) -> None:
    result = quantize_checkpoint(source("llama"), tmp_path / "out", "nf4")
    assert tuple(report_checkpoint(source("llama"), "nf4")) == result.layers
    config = from_spec("nf4", compute_dtype=torch.bfloat16)
    from_memory = report_model(AutoModelForCausalLM.from_pretrained(source("llama")), config)
    assert sorted(from_memory, key=lambda r: r.name) == sorted(result.layers, key=lambda r: r.name)


def test_holds_a_few_tensors_at_a_time(source: Callable[..., Path], tmp_path: Path) -> None:
    path = source("llama", num_hidden_layers=6)
    sizes = [header.nbytes for header in read_checkpoint_headers(path).values()]
    peaks: list[int] = []
    gc.collect()
    gc.freeze()  # what was there before is no business of this test
    try:
        quantize_checkpoint(path, tmp_path / "out", "nf4", progress=lambda *_: peaks.append(live_bytes()))
    finally:
        gc.unfreeze()
    assert len(peaks) == len(sizes)
    assert max(peaks) <= 3 * max(sizes) < sum(sizes) / 4


def live_bytes() -> int:
    """Bytes of the tensors that Python can reach and that are not on meta, each storage once."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = min(thing.nbytes, storage.nbytes())
    return sum(found.values())


def test_an_existing_directory_is_left_alone(source: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(OutputError, match=r"out exists and is not an empty directory; accepted is a path that is free"):
        quantize_checkpoint(source("llama"), tmp_path / "out", "nf4")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]
    with pytest.raises(OutputError, match="nowhere is not a directory"):
        quantize_checkpoint(source("llama"), tmp_path / "nowhere" / "out", "nf4")
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(source("llama"), tmp_path / "empty", "nf4")
    assert (tmp_path / "empty" / SINGLE_FILE).is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(
    error: type[BaseException], source: Callable[..., Path], tmp_path: Path
) -> None:
    def progress(done: int, total: int, name: str) -> None:
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out.*/config.json"))
        if done > total / 2:
            raise error

    with pytest.raises(error):
        quantize_checkpoint(source("llama"), tmp_path / "out", "nf4", progress=progress, max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(source: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(
        source("bloom"), tmp_path / "out", "nf4", progress=lambda done, total, _: seen.append((done, total))
    )
    total = sum(header.nbytes for header in read_checkpoint_headers(source("bloom")).values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_a_quantized_checkpoint_is_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    quantize_checkpoint(source("llama"), tmp_path / "once", "nf4")
    with pytest.raises(QuantConfigError, match=r"once is quantized already \(bitsandbytes\); accepted are unquantized"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", "int8")
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "once" / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantConfigError, match=r"quantized already \(tensor model.layers.0\S+ is U8\)"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", "int8")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("quantization", ["nf5", "none", {"load_in_4bit": False}, {"bits": 3}])
def test_an_unknown_quantization_is_refused(quantization: Any, source: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(QuantConfigError, match="accepted|set one of them"):
        quantize_checkpoint(source("llama"), tmp_path / "out", quantization)
    assert list(tmp_path.iterdir()) == []


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "missing": (
        lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k},
        r"in lacks 3 of the model's tensors: model.layers.1.mlp.\w+.weight, ",
    ),
    "shape": (
        lambda t: t | {"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 64)},
        r"model.layers.1.mlp.up_proj.weight has shape \[64, 64\]; \[192, 128\] is needed",
    ),
    "norm shape": (lambda t: t | {"model.norm.weight": torch.zeros(3)}, r"model.norm.weight has shape \[3\]; \[128\]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, source: Callable[..., Path], tmp_path: Path) -> None:
    change, sentence = DAMAGES[damage]
    path = copy_with(source("llama"), tmp_path / "in", change)
    with pytest.raises(CheckpointError, match=sentence):
        quantize_checkpoint(path, tmp_path / "out", "nf4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_a_model_that_cannot_be_built_is_refused_with_the_reason(source: Callable[..., Path], tmp_path: Path) -> None:
    path = copy_with(source("llama"), tmp_path / "in", dict)
    config = json.loads((path / "config.json").read_text()) | {"hidden_act": "none-such"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"in: transformers cannot build its model: KeyError: .*none-such"):
        quantize_checkpoint(path, tmp_path / "out", "nf4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_what_is_not_the_models_is_told(
    source: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_with(source("llama"), tmp_path / "in", lambda t: t | {"model.other": torch.zeros(2)})
    quantize_checkpoint(path, tmp_path / "out", "nf4")
    assert re.search(r"in: 1 tensors are not the model's: model.other", caplog.text)
    assert "model.other" not in read_checkpoint_headers(tmp_path / "out")


def test_a_shard_is_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    dtypes = [torch.uint8, torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    dtypes += [torch.int16, torch.int32, torch.int64]
    tensors = {f"té{i}": torch.arange(i + 3).to(dtype) for i, dtype in enumerate(dtypes * 2)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "matrix": torch.randn(5, 3).t()}
    writer = ShardWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    (file,) = writer.finish(parameters=0)
    expected = tmp_path / "expected"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, expected, {"format": "pt"})
    assert (tmp_path / file.name).read_bytes() == expected.read_bytes()
    assert file.sha256 == hashlib.sha256(expected.read_bytes()).hexdigest()


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add({"scalar": torch.ones(1)})
    with pytest.raises(CheckpointError, match="tensor scalar would be written twice"):
        writer.add({"scalar": torch.ones(1)})
    writer.close()


def test_the_package_offers_it() -> None:
    assert quant.quantize_checkpoint is quantize_checkpoint
