"""Three models in one server, each with its own quantization in its own engine, all asked at once.

In float32 each answer must equal, token for token, what `transformers.generate` gives greedily for the same weights.
The tiny models' tokenizer has one token per byte, and answers are compared as token ids through logprob-free means:
the text is asked for with special tokens excluded, so ids are recovered by encoding it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import transformers
import yaml

import quant
from tests.end_to_end.server import Server, serve
from tests.tiny_models import save_tiny

MODELS: dict[str, tuple[str, dict[str, object] | None]] = {
    "llama-nf4-dq": (
        "llama",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "mistral-int8": ("mistral", {"load_in_8bit": True}),
    "qwen3-none": ("qwen3", None),
}
PROMPTS = [[10 + 7 * index + step for step in range(5 + 3 * index)] for index in range(4)]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {
        name: save_tiny(architecture, directory / name, seed=index)
        for index, (name, (architecture, _)) in enumerate(MODELS.items())
    }


@pytest.fixture(scope="module")
def server(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    entries = [
        {"name": name, "path": str(paths[name]), "dtype": "float32"} | ({"quantization": fields} if fields else {})
        for name, (_, fields) in MODELS.items()
    ]
    config = tmp_path_factory.mktemp("config") / "models.yaml"
    config.write_text(yaml.safe_dump({"models": entries}))
    with serve("--config", config) as running:
        yield running


def expected_text(path: Path, fields: dict[str, object] | None, prompt: list[int]) -> str:
    """Greedy `transformers.generate` on the same weights with the same quantization config."""
    options = {"quantization_config": quant.BitsAndBytesConfig(**fields)} if fields else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))


def test_all_three_at_once_equal_generate(server: Server, paths: dict[str, Path]) -> None:
    def ask(job: tuple[str, list[int]]) -> str:
        name, prompt = job
        body = {"model": name, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    jobs = [(name, prompt) for prompt in PROMPTS for name in MODELS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = dict(zip([(name, tuple(prompt)) for name, prompt in jobs], pool.map(ask, jobs), strict=True))
    for name, (_, fields) in MODELS.items():
        for prompt in PROMPTS:
            assert answers[name, tuple(prompt)] == expected_text(paths[name], fields, prompt), name


def test_each_has_an_engine_and_its_own_config(server: Server) -> None:
    assert len(server.engines()) == len(MODELS)
    with server.client() as client:
        listed = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
        memory = {entry["name"]: entry for entry in client.get("/memory").json()["models"]}
    assert listed.keys() == memory.keys() == MODELS.keys()
    for name, (_, fields) in MODELS.items():
        effective = listed[name]["quantization"]
        assert {key: effective[key] for key in fields or {}} == (fields or {})
        assert memory[name]["planned"] == memory[name]["measured"]


def test_a_killed_engine_takes_nothing_else_down(server: Server) -> None:
    """The last test of this module: it kills one engine with SIGKILL in the middle of a stream."""
    import os
    import signal

    victim = "qwen3-none"
    body = {
        "model": victim,
        "prompt": PROMPTS[0],
        "max_tokens": 400,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    before = server.engines()
    received = []
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        received.append(next(lines))
        os.kill(_engine_of(victim, before), signal.SIGKILL)
        received += list(lines)
    text = "\n".join(received)
    assert '"error"' in text
    assert "SIGKILL" in text or "signal 9" in text
    with server.client() as client:
        for name in MODELS:
            body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
            assert client.post("/v1/completions", json=body).status_code == (503 if name == victim else 200)
        assert client.get("/livez").status_code == 200
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert victim in ready.text
    assert server.stop() == 0
    assert "Traceback" not in server.log


def _engine_of(name: str, engines: list[int]) -> int:
    """Engines are started in the order of the config file, so their process ids ascend in it."""
    return sorted(engines)[list(MODELS).index(name)]
