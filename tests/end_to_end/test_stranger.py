"""The stranger's path: serve with no argument, talk, look, stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest

from server.memory.components import exact
from tests.end_to_end.server import Server, alive, children, free_port, serve, start

ROOT = Path(__file__).parent.parent.parent
MESSAGES = [{"role": "user", "content": "Tell me a story."}]


def test_a_streamed_chat_completion(demo: Server) -> None:
    body = {
        "model": "halfbyte-demo",
        "messages": MESSAGES,
        "stream": True,
        "max_tokens": 40,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    pieces, finish, usage = [], None, None
    with demo.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line.removeprefix("data: "))
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            pieces.append(choice["delta"].get("content") or "")
            finish = choice["finish_reason"] or finish
    assert finish in ("stop", "length")
    assert len([piece for piece in pieces if piece]) > 5, "the answer came in one piece"
    assert usage is not None
    assert 0 < usage["completion_tokens"] <= 40
    assert (usage["completion_tokens"] == 40) == (finish == "length")
    del body["stream"], body["stream_options"]
    with demo.client() as client:
        whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"] == "".join(pieces)
    assert whole["choices"][0]["finish_reason"] == finish
    details = usage.pop("prompt_tokens_details"), whole["usage"].pop("prompt_tokens_details")
    assert details[0]["cached_tokens"] <= details[1]["cached_tokens"] < usage["prompt_tokens"]
    assert whole["usage"] == usage


def test_metrics_and_memory_agree(demo: Server) -> None:
    with demo.client() as client:
        memory = client.get("/memory").json()
        metrics = client.get("/metrics").text
    (model,) = [entry for entry in memory["models"] if entry["name"] == "halfbyte-demo"]
    measured, planned = model["measured"], model["planned"]
    assert measured["packed_weights"] > 0
    assert measured["absmax"] > 0
    assert exact(measured) == exact(planned)
    assert abs(model["unaccounted"]) < 50_000_000
    for component, size in measured.items():
        lines = [
            line
            for line in metrics.splitlines()
            if line.startswith("halfbyte_memory_bytes{")
            and f'component="{component}"' in line
            and "halfbyte-demo" in line
        ]
        assert [float(line.rpartition(" ")[2]) for line in lines] == [float(size)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_cleanly(number: int) -> None:
    with serve() as server:
        below = children(server.process.pid)
        assert len(server.engines()) == 1
        assert server.stop(number) == 0
        assert "Traceback" not in server.log
        wait_until_gone(below)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_stops_cleanly_through_make() -> None:
    """A terminal's Ctrl-C reaches the whole foreground group: make, the server, not the engines."""
    port = free_port()
    command = ["make", "--no-print-directory", "-C", str(ROOT), "serve", f"PORT={port}"]
    with start(command, port) as server:
        server.wait_until_ready()
        below = children(server.process.pid)
        os.killpg(server.process.pid, signal.SIGINT)
        server.process.wait(timeout=30)
        assert "Traceback" not in server.log
        wait_until_gone(below)


def test_ctrl_c_while_loading_ends_at_once() -> None:
    with serve(wait=False) as server:
        while not server.engines():
            time.sleep(0.02)
        below = children(server.process.pid)
        assert server.stop() == 0
        assert "Traceback" not in server.log
        wait_until_gone(below)


def test_a_killed_server_leaves_no_engine() -> None:
    with serve() as server:
        below = children(server.process.pid)
        server.process.kill()
        server.process.wait()
        wait_until_gone(below)


def test_probes_answer_while_loading() -> None:
    with serve(wait=False) as server:
        deadline = time.monotonic() + 60
        seen: dict[str, set[int]] = {"/livez": set(), "/startupz": set(), "/readyz": set()}
        phases = set()
        while time.monotonic() < deadline and not all(200 in statuses for statuses in seen.values()):
            for path, statuses in seen.items():
                try:
                    answer = httpx.get(server.url + path, timeout=5)
                except httpx.TransportError:
                    continue
                statuses.add(answer.status_code)
                if answer.status_code == 503:
                    phases |= {entry["phase"] for entry in answer.json()["models"].values()}
        assert seen == {"/livez": {200}, "/startupz": {200, 503}, "/readyz": {200, 503}}
        assert phases


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [pid for pid in pids if alive(pid)]
        if not left:
            return
        time.sleep(0.05)
    pytest.fail(f"processes {left} are still there")
