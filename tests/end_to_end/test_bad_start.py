"""Starts that must fail: one clear sentence on stderr, the right exit code, no traceback, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.server import run_halfbyte
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def models_yaml(directory: Path, text: str) -> Path:
    file = directory / "models.yaml"
    file.write_text(text)
    return file


def check(arguments: list[str | Path], code: int, *words: str) -> None:
    result = run_halfbyte("serve", "--port", "0", *arguments)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", ("models.yaml", "line")),
        ("- 1", ("models.yaml",)),
        ("models: []", ("models",)),
        ("models:\n- {name: a, path: MODEL, colour: red}", ("colour",)),
        ("modles:\n- {name: a, path: MODEL}", ("modles",)),
        ("models:\n- {name: a, path: MODEL}\n- {name: a, path: MODEL}", ("'a'",)),
        ("models:\n- {name: a, path: MODEL, adapters: [x]}", ("adapters",)),
        ("models:\n- {name: a, path: MODEL, max_model_len: many}", ("max_model_len", "many")),
        ("models:\n- {name: a, path: /nowhere/model}", ("/nowhere/model",)),
        ("models:\n- {name: a, path: MODEL, quantization: nf5}", ("nf5", "nf4")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_models_yaml(tmp_path: Path, model: Path, text: str, words: tuple[str, ...]) -> None:
    check(["--config", models_yaml(tmp_path, text.replace("MODEL", str(model)))], 2, *words)


def test_bad_flags(tmp_path: Path) -> None:
    check([tmp_path], 2, str(tmp_path), "config.json")
    check(["--config", tmp_path / "absent.yaml"], 2, "absent.yaml")


def test_truncated_weights(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    check([path], 1, "model.safetensors", "truncated")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    check([path], 1, "safetensors")


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    marker = tmp_path / "it-ran"
    (path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    result = run_halfbyte("serve", "--port", "0", path)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    assert not marker.exists()


def test_what_does_not_fit_is_refused_before_loading(tmp_path: Path) -> None:
    """A KV cache of 200 billion tokens: the plan says no before anything is read, with both figures."""
    path = save_tiny("llama", tmp_path)
    config = models_yaml(tmp_path, f"models:\n- {{name: a, path: {path}, kv_cache: {{tokens: 200000000000}}}}")
    check(["--config", config], 3, "needs", "free")
    result = run_halfbyte("plan", "--config", config, "--json")
    assert result.returncode == 3
