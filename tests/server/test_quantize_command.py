"""`halfbyte quantize`: what it writes, prints and refuses. What quantizing does is tested in tests/quant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quant
from server.cli import main
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "a model", dtype=torch.bfloat16)


def halfbyte(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_writes_a_checkpoint_and_reports_each_layer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert halfbyte("quantize", model, out, "--quantization", "nf4-dq", "--max-shard-size", "100 KB") == 0
    printed = capsys.readouterr()
    assert "model.norm.weight" in printed.err
    assert "14 layers, 245,760 weights at 4.129 bits" in printed.out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    layers = json.loads((out / "quantization_report.json").read_text())["layers"]
    assert len(layers) == 14
    for layer in layers:
        assert isinstance(loaded.get_submodule(layer["name"]), quant.Linear4bit)
        assert any(line.split()[:2] == [layer["name"], "nf4-dq"] for line in printed.out.splitlines())
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1


def test_fields_are_json_and_dtype_is_a_name(model: Path, tmp_path: Path) -> None:
    fields = '{"load_in_8bit": true, "llm_int8_threshold": 4.5}'
    assert halfbyte("quantize", model, tmp_path / "out", "--quantization", fields, "--dtype", "float16") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_threshold"] == 4.5
    assert config["dtype"] == "float16"


def test_what_is_refused_is_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, full = tmp_path / "done", tmp_path / "full"
    assert halfbyte("quantize", model, done, "--quantization", "int8") == 0
    full.mkdir()
    (full / "file").touch()
    capsys.readouterr()
    out = tmp_path / "out"
    for arguments, words in {
        (model, full, "--quantization", "nf4"): "full exists and is not an empty directory",
        (done, out, "--quantization", "nf4"): "done is quantized already (bitsandbytes)",
        (model, out, "--quantization", "nf5"): "'nf5'; accepted are nf4, fp4,",
        (model, out, "--quantization", "none"): "which quantizes nothing",
        (model, out, "--quantization", '{"load_in_4bit": 1}'): "load_in_4bit is 1; accepted are True and False",
        (model, out, "--quantization", "{"): "--quantization: '{' starts like a JSON object",
        (model, out, "--quantization", "nf4", "--dtype", "int4"): "--dtype: 'dtype' is 'int4'",
        (model, out, "--quantization", "nf4", "--max-shard-size", "5XB"): "--max-shard-size is '5XB'; accepted",
        (model, out, "--quantization", "nf4", "--max-shard-size", "0"): "--max-shard-size is '0'; accepted",
        (full, out, "--quantization", "nf4"): "a directory without config.json",
        (model, out): "Missing option '--quantization'",
    }.items():
        assert halfbyte("quantize", *arguments) == 2, arguments
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert words in printed.err
        assert printed.out == ""
        assert not out.exists()


def test_a_damaged_checkpoint_is_exit_code_1(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: -1000 if file.suffix == ".safetensors" else None])
    assert halfbyte("quantize", damaged, tmp_path / "out", "--quantization", "nf4") == 1
    assert "is truncated" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
