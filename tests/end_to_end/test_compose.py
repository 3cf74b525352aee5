"""deploy/compose.yaml is brought up: the server in its image, and a Prometheus that scrapes it by its name.

    python -m pytest tests/end_to_end/test_compose.py

It needs podman-compose beside what test_container.py needs. Prometheus is Debian's, in an image that is made here,
because no registry need be reached; its command, mounts, network and privileges are those of the file. Grafana has no
package there: its part of the file is checked in tests/deploy alone.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy.monitored import Prometheus, wait_for
from tests.end_to_end.containers import BUILD_SECONDS, ROOT, TAG, build, missing, podman
from tests.end_to_end.server import clean_environment, free_port

COMPOSE = ROOT / "deploy" / "compose.yaml"
PROMETHEUS_TAG = "localhost/halfbyte-test-prometheus"
PROMETHEUS_DOCKERFILE = """
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus \\
    && mkdir /prometheus && chown nobody /prometheus
USER nobody
ENTRYPOINT ["prometheus"]
"""
SERVICES = ("halfbyte", "prometheus")
READY_SECONDS = 120.0
WEIGHTS = 'halfbyte_memory_bytes{component="packed_weights"}'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(BUILD_SECONDS),
    pytest.mark.skipif(bool(missing("podman-compose")), reason=missing("podman-compose") or "everything is here"),
]


class Project:
    """The file under a name of its own, with the images that are here and on ports that are free."""

    def __init__(self, folder: Path) -> None:
        self.name = f"halfbyte-test-{os.getpid()}"
        self.url = f"http://127.0.0.1:{free_port()}"
        self.prometheus = Prometheus(f"http://127.0.0.1:{free_port()}")
        images = {"halfbyte": {"image": TAG}, "prometheus": {"image": PROMETHEUS_TAG}}
        self._images = folder / "images.yaml"
        self._images.write_text(yaml.safe_dump({"services": images}))

    def run(self, *arguments: str) -> str:
        ports = {"PORT": self.url.rpartition(":")[2], "PROMETHEUS_PORT": self.prometheus.url.rpartition(":")[2]}
        command = ["podman-compose", "--file", str(COMPOSE), "--file", str(self._images), "--project-name", self.name]
        result = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=clean_environment(**ports), check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def container(self, service: str) -> str:
        return f"{self.name}_{service}_1"

    def is_up(self) -> bool:
        """Whether the server is ready and Prometheus has seen what is loaded."""
        try:
            for probe in (self.url + "/readyz", self.prometheus.url + "/-/ready"):
                if httpx.get(probe, timeout=5).status_code != 200:
                    return False
            return bool(self.prometheus.query(WEIGHTS))
        except httpx.TransportError:
            return False

    def logs(self) -> str:
        return "\n".join(podman("logs", self.container(service)) for service in SERVICES)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    build(TAG, ROOT)
    context = tmp_path_factory.mktemp("prometheus")
    (context / "Dockerfile").write_text(PROMETHEUS_DOCKERFILE)
    build(PROMETHEUS_TAG, context)
    project = Project(tmp_path_factory.mktemp("compose"))
    try:
        project.run("up", "--detach", "--no-build", *SERVICES)
        wait_for(project.is_up, "the server is not ready, or not scraped", project.logs, seconds=READY_SECONDS)
        yield project
    finally:
        project.run("down", "--volumes", "--timeout", "40")
        podman("rmi", TAG, PROMETHEUS_TAG)


def test_answers_and_is_scraped(project: Project) -> None:
    body = {"model": "halfbyte-demo", "prompt": "The harbour", "max_tokens": 4}
    answer = httpx.post(project.url + "/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 4
    (weights,) = project.prometheus.query(WEIGHTS)
    assert weights["metric"]["job"] == "halfbyte"
    assert weights["metric"]["model"] == "halfbyte-demo"
    models = httpx.get(project.url + "/memory", timeout=10).json()["models"]
    assert float(weights["value"][1]) == models[0]["measured"]["packed_weights"]


def test_rules_are_loaded_and_healthy(project: Project) -> None:
    wait_for(
        lambda: all(rule["health"] == "ok" for rule in project.prometheus.rules()),
        "a rule was not evaluated",
        project.prometheus.rules,
    )
    assert "HalfbyteDown" in {rule["name"] for rule in project.prometheus.rules()}


@pytest.mark.parametrize("service", SERVICES)
def test_runs_as_the_file_says(project: Project, service: str) -> None:
    name = project.container(service)
    settings = podman("inspect", name, "--format", "{{.HostConfig.ReadonlyRootfs}} {{.EffectiveCaps}}")
    assert settings == "true []"
    assert podman("exec", name, "id", "-u") != "0"


def test_the_health_check_passes(project: Project) -> None:
    podman("healthcheck", "run", project.container("halfbyte"))
