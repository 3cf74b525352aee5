"""Request bodies that nobody would write: each is accepted or refused in one sentence, and none is a fault of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server.api.errors import invalid_request
from server.api.wire import ChatRequest, CompletionRequest, Sampling
from tests.server.conftest import RunningApp

BODIES: dict[type[Sampling], dict[str, Any]] = {
    CompletionRequest: {"model": "echo", "prompt": "a"},
    ChatRequest: {"model": "echo", "messages": [{"role": "user", "content": "a"}]},
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
@given(data=st.data())
@settings(max_examples=120)
def test_any_value_in_any_field_is_accepted_or_refused_in_a_sentence(
    model: type[Sampling], data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(model.model_fields)) | st.text(max_size=8)
    body = BODIES[model] | data.draw(st.dictionaries(names, anything, max_size=3))
    try:
        model.model_validate(body)
    except ValidationError as error:
        details = [detail | {"loc": ("body", *detail["loc"])} for detail in error.errors(include_url=False)]
        refusal = invalid_request(details, model)
        assert refusal.status == 400
        assert 0 < len(refusal.message) < 1500
        assert "Value error" not in refusal.message
        assert "body" not in (refusal.param or "").split(".")


@pytest.mark.parametrize("field", ["prompt", "stop", "n", "logit_bias", "flavour", "model", "temperature"])
@pytest.mark.parametrize("depth", [100, 500, 900, 960, 5000])
def test_deep_nesting_is_refused_and_not_a_fault(echo: RunningApp, field: str, depth: int) -> None:
    base = json.dumps({"model": "echo", "prompt": "a"} | {field: None})
    body = base.replace(f'"{field}": null', f'"{field}": ' + "[" * depth + "]" * depth)
    with echo.client() as client:
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert len(response.text) < 2000


def test_a_long_value_is_cut_in_the_sentence(echo: RunningApp) -> None:
    with echo.client() as client:
        response = client.post("/v1/completions", json={"model": "echo", "prompt": "a", "n": "x" * 1_000_000})
    assert response.status_code == 400
    assert len(response.text) < 400
