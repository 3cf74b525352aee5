"""The image builds, runs as a stranger would run it, and stops with a drain. Needs buildah, podman and a base image.

python -m pytest tests/end_to_end/test_container.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.end_to_end.containers import BUILD_SECONDS, ROOT, TAG, build, missing, podman
from tests.end_to_end.server import Server, free_port, start

STREAMS = 4
STREAMED_TOKENS = 1000
BUILD_TOOLS = ("as", "c++", "cc", "cmake", "g++", "gcc", "git", "ld", "make", "ninja", "nvcc", "pip", "pip3", "strip")
OWN_LAYER_BYTES = 50_000_000


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(BUILD_SECONDS),
    pytest.mark.skipif(bool(missing()), reason=missing() or "everything is here"),
]


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    build(TAG, ROOT)
    yield TAG
    podman("rmi", TAG)


@contextlib.contextmanager
def container(image: str, **environment: str) -> Iterator[tuple[str, Server]]:
    """A ready server as docs/container.md runs it, with no privilege at all, and the container's name."""
    port = free_port()
    name = f"halfbyte-test-{os.getpid()}-{port}"
    command = ["podman", "run", "--name", name, "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
    command += ["--security-opt", "no-new-privileges", "--memory", "1g", "--network", "host"]
    for variable, value in {"HALFBYTE_HOST": "127.0.0.1", "HALFBYTE_PORT": str(port), **environment}.items():
        command += ["--env", f"{variable}={value}"]
    try:
        with start([*command, image], port) as server:
            server.wait_until_ready()
            yield name, server
    finally:
        subprocess.run(["podman", "rm", "--force", name], capture_output=True, check=False)


def stop_during_streams(name: str, server: Server) -> list[list[dict[str, Any] | str]]:
    """Sends SIGTERM as a container runtime does, once all streams have begun; returns the events of each."""
    all_begun = threading.Barrier(STREAMS + 1, timeout=60)

    def stream() -> list[dict[str, Any] | str]:
        body = {"model": "halfbyte-demo", "prompt": "The", "max_tokens": STREAMED_TOKENS, "ignore_eos": True}
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
        ):
            assert response.status_code == 200, response.read()
            events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            first = next(events)
            all_begun.wait()
            return [event if event == "[DONE]" else json.loads(event) for event in (first, *events)]

    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream) for _ in range(STREAMS)]
        all_begun.wait()
        podman("stop", "--time", "60", name)
        collected = [future.result() for future in streams]
    assert podman("inspect", name, "--format", "{{.State.ExitCode}}") == "0"
    assert f"SIGTERM: draining, {STREAMS} requests are open" in server.log, "streams were over before the signal came"
    return collected


def test_serves_read_only_without_privileges(image: str) -> None:
    with container(image) as (name, server):
        with server.client() as client:
            answer = client.post("/v1/completions", json={"model": "halfbyte-demo", "prompt": "The", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] == 4
        podman("healthcheck", "run", name)
        assert podman("exec", name, "id", "-u") == "10001"
        written = {line.split()[1] for line in podman("diff", name).splitlines()}
        assert {path for path in written if not path.startswith("/etc")} == set(), "only podman's own mount points"


def test_streams_that_end_within_the_limit_are_whole(image: str) -> None:
    with container(image, HALFBYTE_DRAIN_SECONDS="60") as (name, server):
        for *chunks, last in stop_during_streams(name, server):
            assert last == "[DONE]"
            reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
            assert [reason for reason in reasons if reason] == ["length"]
        assert re.search(r"drained in \d+\.\d s, 0 requests and their 0 tokens were cut", server.log)


def test_streams_that_take_longer_end_with_an_error(image: str) -> None:
    with container(image, HALFBYTE_DRAIN_SECONDS="0.1") as (name, server):
        for events in stop_during_streams(name, server):
            assert "error" in [event for event in events if event != "[DONE]"][-1]
        assert re.search(rf"drained in \d+\.\d s, {STREAMS} requests and their \d+ tokens were cut", server.log)


def test_the_health_check_notices_a_server_that_does_not_answer(image: str) -> None:
    with container(image) as (name, _):
        podman("healthcheck", "run", name)
        podman("kill", "--signal", "STOP", name)
        check = subprocess.run(["podman", "healthcheck", "run", name], capture_output=True, check=False)
        assert check.returncode != 0


def test_holds_nothing_that_builds(image: str) -> None:
    loop = f"for tool in {' '.join(BUILD_TOOLS)}; do command -v $tool; done; true"
    assert podman("run", "--rm", "--entrypoint", "sh", image, "-c", loop) == ""


def test_a_release_replaces_a_small_layer(image: str) -> None:
    """The dependencies, which change seldom, are one layer, and our own files are another."""
    layers = [entry["size"] for entry in json.loads(podman("history", "--format", "json", image))]
    own, dependencies = [size for size in layers if size > 0][:2]
    assert own < OWN_LAYER_BYTES < dependencies
