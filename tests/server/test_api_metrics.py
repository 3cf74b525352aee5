"""GET /metrics in front of scripted engines: what it answers, what it costs, and whose trace it names."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from server.api.tracing import trace_id
from tests.server.conftest import RunningApp, ServeScript, wait_for

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
"""What Prometheus sends, by its major version."""


@pytest.fixture(scope="module")
def with_vllms_names(serve_scripts: ServeScript) -> Iterator[RunningApp]:
    with serve_scripts({"echo": {}}, vllm_metrics=True) as running:
        yield running


def complete(running: RunningApp, **headers: str) -> None:
    body = {"model": "echo", "prompt": "abc", "max_tokens": 3}
    with running.client(headers=headers) as client:
        client.post("/v1/completions", json=body).raise_for_status()


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", PLAIN),
        ("*/*", PLAIN),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3", OPENMETRICS),
        ("application/openmetrics-text", OPENMETRICS),
        ('text/plain , Application/OpenMetrics-Text ; Version="1.0.0"', OPENMETRICS),
        (PROMETHEUS_2, OPENMETRICS),
        (PROMETHEUS_3, OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;escaping=dots", OPENMETRICS),
        ("application/openmetrics-text;q=0.5,text/plain", PLAIN),
        ("application/openmetrics-text;q=0", PLAIN),
        ("application/openmetrics-text;q=often", PLAIN),
        ("application/openmetrics-text;version=9.9.9", PLAIN),
        ("application/openmetrics-text;version=first", PLAIN),
        ("application/json", PLAIN),
        ("text/plain;version=x.y", PLAIN),
        (";=,;;,=", PLAIN),
    ],
)
def test_the_format_follows_the_accept_header(with_vllms_names: RunningApp, accept: str, content_type: str) -> None:
    """Whichever it is, every name is whole, vLLM's with their colon among them."""
    with with_vllms_names.client() as client:
        response = client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["Content-Type"] == content_type
    parse = (
        openmetrics.text_string_to_metric_families if "openmetrics" in content_type else text_string_to_metric_families
    )
    families = {family.name: family for family in parse(response.text)}
    assert "halfbyte_requests" in families
    assert [sample.labels["model_name"] for sample in families["vllm:num_requests_running"].samples] == ["echo"]


def test_a_sampled_trace_becomes_an_exemplar(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {}}) as running:
        complete(running, traceparent=f"00-{'ab' * 16}-{SPAN}-00")
        complete(running, traceparent=f"00-{TRACE}-{SPAN}-01")
        with running.client(headers={"Accept": OPENMETRICS}) as client:
            page = client.get("/metrics").text
    for family in openmetrics.text_string_to_metric_families(page):
        if family.name == "halfbyte_time_to_first_token_seconds":
            found = [sample.exemplar.labels for sample in family.samples if sample.exemplar is not None]
            assert found == [{"trace_id": TRACE}]
            break
    else:
        pytest.fail("there is no time to the first token")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", TRACE),
        (f"cc-{TRACE}-{SPAN}-03-what-comes-later", TRACE),
        (f"00-{TRACE}-{SPAN}-00", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        ("", None),
        ("00-" * 1000, None),
    ],
)
def test_trace_ids_are_those_of_well_formed_sampled_headers(header: str, found: str | None) -> None:
    assert trace_id(header) == found


def test_a_scrape_is_answered_while_the_engine_hangs(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {"hang_after_steps": 1}}) as running, running.client() as client:
        body = {"model": "echo", "prompt": "abc", "max_tokens": 100, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            assert "halfbyte_engine_steps_total" in client.get("/metrics").text
            # What comes now waits in the socket: the engine never reads it, nor that its client has gone.
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.5)
            page = client.get("/metrics").text
        assert 'halfbyte_requests_running{model="echo"} 1.0' in page
        assert 'halfbyte_requests_waiting{model="echo"} 1.0' in page


def test_errors_are_counted_by_their_code(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {"fault": "broken"}}) as running, running.client() as client:
        body = {"model": "echo", "prompt": "abc"}
        assert client.post("/v1/completions", json=body).status_code == 500
        assert client.post("/v1/completions", json=body | {"prompt": "a" * 1000}).status_code == 400
        assert client.post("/v1/completions", json=body | {"model": "other"}).status_code == 404
        assert running.metric("request_errors_total", model="echo", error="engine_error") == 1
        assert running.metric("request_errors_total", model="echo", error="invalid_request_error") == 1
        assert running.metric("requests_total", model="echo", finish_reason="error") == 1


def test_times_count_from_the_request_and_tokens_from_their_step(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {"step_seconds": 0.02}}) as running:
        complete(running)
        wait_for(lambda: running.metric("requests_total", model="echo", finish_reason="length") == 1)
        assert running.metric("prompt_tokens_total", model="echo") == running.metric(
            "request_prompt_tokens_sum", model="echo"
        )
        assert running.metric("inter_token_latency_seconds_count", model="echo") == 2
        assert running.metric("request_time_per_output_token_seconds_count", model="echo") == 1
        per_token = running.metric("request_time_per_output_token_seconds_sum", model="echo")
        assert running.metric("inter_token_latency_seconds_sum", model="echo") == pytest.approx(2 * per_token)
        first = running.metric("time_to_first_token_seconds_sum", model="echo")
        assert first >= 0.02
        assert running.metric("request_duration_seconds_sum", model="echo") >= first + 2 * per_token


def test_vllms_names_are_there_when_asked_for(with_vllms_names: RunningApp, echo: RunningApp) -> None:
    for accept in (PLAIN, PROMETHEUS_3):
        with with_vllms_names.client(headers={"Accept": accept}) as client:
            assert 'vllm:num_requests_running{engine="0",model_name="echo"}' in client.get("/metrics").text
    with echo.client() as client:
        assert "vllm:" not in client.get("/metrics").text


def test_a_stop_string_in_the_last_token_counts_as_the_client_sees_it(serve_scripts: ServeScript) -> None:
    body = {"model": "echo", "prompt": "abc", "max_tokens": 3, "stop": "c"}
    with serve_scripts({"echo": {}}) as running, running.client() as client:
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
        counted = {why: running.metric("requests_total", model="echo", finish_reason=why) for why in ("stop", "length")}
    assert counted == {"stop": 1, "length": 0}
