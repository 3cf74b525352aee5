"""Three models in one server, each with its own quantization in its own engine, all asked at once.

In float32 each answer must equal, token for token, what `transformers.generate` gives greedily for the same weights.
LLM.int8() rounds activations, and a difference in the last bit of a float32 sum can turn a rounding over, which moves
logits by about one percent. Its answers are compared up to the first step that is decided by less than that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import transformers
import yaml

import quant
from server.memory.components import exact
from tests.end_to_end.generation import greedy
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
PROMPTS = [tuple(10 + 7 * index + step for step in range(5 + 3 * index)) for index in range(8)]
NEW_TOKENS = 24
INT8_GAP = 0.05
"""Between the two best logits of a step, in standard deviations of that step's logits."""


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


def expected_texts(path: Path, fields: dict[str, object] | None) -> list[str]:
    """Greedy `transformers.generate` on the same weights and config, as far as no rounding decides."""
    options = {"quantization_config": quant.BitsAndBytesConfig(**fields)} if fields else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    smallest_gap = INT8_GAP if fields and fields.get("load_in_8bit") else 0.0
    texts, decided = [], 0
    for prompt in PROMPTS:
        found = greedy(model, prompt, NEW_TOKENS)
        open_steps = (found.gaps <= smallest_gap).nonzero().flatten().tolist()
        steps = open_steps[0] if open_steps else len(found.gaps)
        decided += steps
        answer = found.sequence[len(prompt) : len(prompt) + steps]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert decided > 3 * len(PROMPTS), "too few tokens are left to compare"
    return texts


def test_all_three_at_once_equal_generate(server: Server, paths: dict[str, Path]) -> None:
    def ask(job: tuple[tuple[int, ...], str]) -> str:
        prompt, name = job
        body = {"model": name, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    jobs = [(prompt, name) for prompt in PROMPTS for name in MODELS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = dict(zip(jobs, pool.map(ask, jobs), strict=True))
    for name, (_, fields) in MODELS.items():
        for prompt, expected in zip(PROMPTS, expected_texts(paths[name], fields), strict=True):
            answer = answers[prompt, name]
            if fields and "load_in_8bit" in fields:
                # A cut may fall into the bytes of one character, which then decode to replacement characters.
                assert answer.startswith(expected.rstrip("\ufffd")), name
            else:
                assert answer == expected, name


def test_each_has_an_engine_and_its_own_config(server: Server) -> None:
    assert len(server.engines()) == len(MODELS)
    with server.client() as client:
        listed = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
        memory = {entry["name"]: entry for entry in client.get("/memory").json()["models"]}
    assert listed.keys() == memory.keys() == MODELS.keys()
    for name, (_, fields) in MODELS.items():
        effective = listed[name]["quantization"]
        assert {key: effective[key] for key in fields or {}} == (fields or {})
        assert exact(memory[name]["planned"]) == exact(memory[name]["measured"])


def test_a_killed_engine_takes_nothing_else_down(server: Server) -> None:
    """The last test of this module: it kills one engine with SIGKILL in the middle of a stream, and it comes back."""
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
        assert ready.json()["models"][victim]["state"] == "restarting"
        server.wait_until_ready()
        assert client.get("/readyz").json()["models"][victim]["restarts"] == 1
        assert client.post("/v1/completions", json=body | {"model": victim}).status_code == 200
        metrics = client.get("/metrics").text
    assert f'halfbyte_engine_restarts_total{{model="{victim}",reason="signal"}} 1.0' in metrics
    assert len(set(server.engines()) - set(before)) == 1
    assert server.stop() == 0
    assert "Traceback" not in server.log


def _engine_of(name: str, engines: list[int]) -> int:
    """Engines are started in the order of the config file, so their process ids ascend in it."""
    return sorted(engines)[list(MODELS).index(name)]
