"""The image builds, runs as a stranger would run it, and stops with a drain. Needs buildah, podman and a base image.

    CONTAINER_TEST_BASE_IMAGE=debian:bookworm-slim python -m pytest tests/end_to_end/test_container.py

CONTAINER_TEST_BUILD_ARGS holds more arguments for `buildah bud`: mounts or build arguments that a network needs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.server import free_port, start

ROOT = Path(__file__).parent.parent.parent
BASE_IMAGE = os.environ.get("CONTAINER_TEST_BASE_IMAGE")
TAG = "localhost/halfbyte-test"
BUILD_SECONDS = 1500

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(BUILD_SECONDS),
    pytest.mark.skipif(
        not (BASE_IMAGE and shutil.which("buildah") and shutil.which("podman")),
        reason="needs buildah, podman and CONTAINER_TEST_BASE_IMAGE",
    ),
]


def podman(*arguments: str) -> str:
    result = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    command = ["buildah", "bud", "--format", "docker", "--isolation", "chroot", "--layers", "-t", TAG]
    command += [
        "--build-arg",
        f"BASE_IMAGE={BASE_IMAGE}",
        *shlex.split(os.environ.get("CONTAINER_TEST_BUILD_ARGS", "")),
    ]
    result = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    yield TAG
    podman("rmi", TAG)


def test_serves_read_only_without_privileges_and_drains(image: str) -> None:
    name = f"halfbyte-test-{os.getpid()}"
    port = free_port()
    command = ["podman", "run", "--name", name, "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
    command += ["--network", "host", "--env", "HALFBYTE_HOST=127.0.0.1", "--env", f"HALFBYTE_PORT={port}", image]
    try:
        with start(command, port) as server:
            server.wait_until_ready()
            with server.client() as client:
                answer = client.post(
                    "/v1/completions", json={"model": "halfbyte-demo", "prompt": "The", "max_tokens": 4}
                )
            assert answer.json()["usage"]["completion_tokens"] == 4
            assert podman("exec", name, "id", "-u") == "10001"
            assert podman("exec", name, "sh", "-c", "command -v g++ cc pip || true") == ""
            podman("healthcheck", "run", name)
            podman("stop", "--time", "30", name)
            assert podman("inspect", name, "--format", "{{.State.ExitCode}}") == "0"
            assert "draining" in server.log
    finally:
        subprocess.run(["podman", "rm", "--force", name], capture_output=True, check=False)
