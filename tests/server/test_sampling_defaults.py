"""What a checkpoint recommends of how tokens are chosen, from its file to what the engine is told of a request."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from quant.errors import CheckpointError
from server.api.generation import sampling
from server.api.respond import options
from server.api.wire import ChatRequest, CompletionRequest
from server.demo import DEMO_MODEL_PATH
from server.engine.process import load_engine
from server.errors import LoadError
from server.model.load import recommended_sampling
from server.records import (
    LENGTH_PREFIX_BYTES,
    Generate,
    Loaded,
    ModelInfo,
    ModelSpec,
    SamplingParams,
    decode_to_engine,
    encode_frame,
)
from server.sampling_ranges import Recommendations
from tests.server.conftest import ServeScript
from tests.server.test_api import complete
from tests.server.test_process import granted, records_in
from tests.tiny_models import save_tiny

EVERY_FIELD: dict[str, int | float] = {
    "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "typical_p": 0.75, "repetition_penalty": 1.5,
}  # fmt: skip
OTHERS: dict[str, int | float] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0,
}  # fmt: skip
"""What OpenAI's API has in their places, which a request may ask for too."""


def recommends(path: Path, **values: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | values))
    return path


def recommended(path: Path) -> dict[str, int | float]:
    return recommended_sampling(ModelSpec("m", str(path)))


def test_every_field_is_read(tmp_path: Path) -> None:
    assert set(EVERY_FIELD) == set(Recommendations.model_fields)
    assert recommended(recommends(tmp_path / "all", **EVERY_FIELD)) == EVERY_FIELD
    assert recommended(recommends(tmp_path / "none")) == {}
    assert recommended(tmp_path) == {}
    assert recommended(recommends(tmp_path / "off", top_k=-1, do_sample=False, max_new_tokens=7)) == {"top_k": 0}
    assert repr(recommended(recommends(tmp_path / "whole", top_k=50.0, temperature=1))["top_k"]) == "50"


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(LoadError, match="could not be loaded"):
        recommended(tmp_path)


def test_the_demo_models_are_what_its_file_says() -> None:
    assert recommended(DEMO_MODEL_PATH) == {"temperature": 0.7, "top_p": 0.95}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 2.5}, "'temperature' is 2.5; it must be less than or equal to 2"),
        ({"temperature": "hot"}, "'temperature' is 'hot'; it must be a valid number"),
        ({"temperature": True}, "'temperature' is True; it must be a valid number"),
        ({"temperature": float("nan")}, "'temperature' is nan; it must be"),
        ({"top_k": 1e30}, "; it must be less than or equal to 1048576"),
        ({"top_k": 7.5}, "'top_k' is 7.5; it must be a valid integer"),
        ({"top_p": 0.0}, "'top_p' is 0.0; it must be greater than 0"),
        ({"repetition_penalty": 1000.0}, "'repetition_penalty' is 1000.0; it must be less than or equal to 100"),
    ],
    ids=str,
)
def test_what_no_request_may_have_is_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        recommended(recommends(tmp_path / "model", **values))
    assert words in str(raised.value)
    assert "generation_config.json" in str(raised.value)
    assert "sampling_defaults: openai" in str(raised.value)


@pytest.mark.parametrize(("whose", "expected"), [("model", {"temperature": 0.5, "top_k": 7}), ("openai", {})])
def test_the_engine_says_what_it_recommends(tmp_path: Path, whose: Any, expected: dict[str, int | float]) -> None:
    path = recommends(save_tiny("llama", tmp_path / "model"), temperature=0.5, top_k=7)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        load_engine(ModelSpec("m", str(path), threads=1, kv_cache_tokens=512, sampling_defaults=whose), granted(theirs))
        loaded = records_in(ours)[-1]
    assert isinstance(loaded, Loaded)
    assert loaded.info.sampling_defaults == expected
    request = CompletionRequest.model_validate({"model": "m", "prompt": "a"})
    asked = Generate("a", (1,), sampling([1], options(request, 4, tenant=""), (), loaded.info))
    assert decode_to_engine(encode_frame(asked)[LENGTH_PREFIX_BYTES:]) == asked  # its decoder insists on types


def told(body: CompletionRequest | ChatRequest, recommended: dict[str, int | float]) -> SamplingParams:
    info = ModelInfo(100, 320, (2,), "x", "float32", "cpu", {}, sampling_defaults=recommended)
    return sampling([1], options(body, 4, tenant=""), (), info)


@pytest.mark.parametrize("field", EVERY_FIELD)
def test_a_request_gets_what_it_leaves_open(field: str) -> None:
    for kind, what in (
        (CompletionRequest, {"prompt": "a"}),
        (ChatRequest, {"messages": [{"role": "user", "content": ""}]}),
    ):
        for given in ({}, {field: None}):
            found = told(kind.model_validate({"model": "m"} | what | given), EVERY_FIELD)
            assert {name: getattr(found, name) for name in EVERY_FIELD} == EVERY_FIELD
        found = told(kind.model_validate({"model": "m", field: OTHERS[field]} | what), EVERY_FIELD)
        assert {name: getattr(found, name) for name in EVERY_FIELD} == EVERY_FIELD | {field: OTHERS[field]}
        found = told(kind.model_validate({"model": "m", field: EVERY_FIELD[field]} | what), {})
        assert {name: getattr(found, name) for name in EVERY_FIELD} == OTHERS | {field: EVERY_FIELD[field]}


def test_models_lists_it_and_requests_are_answered(serve_scripts: ServeScript) -> None:
    with serve_scripts({"m": {"sampling_defaults": EVERY_FIELD}}) as running:
        with running.client() as client:
            assert client.get("/v1/models/m").json()["sampling_defaults"] == EVERY_FIELD
        assert complete(running, model="m").status_code == 200
