"""A real Prometheus scrapes a real server: every sample arrives, and promtool has nothing to complain about."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.end_to_end.server import Server, free_port, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")), reason="needs prometheus and promtool"
    ),
]
MODEL = "halfbyte-demo"


def ask(demo: Server) -> None:
    body = {"model": MODEL, "prompt": "The harbour", "max_tokens": 8}
    with demo.client() as client:
        client.post("/v1/completions", json=body).raise_for_status()


def test_promtool_accepts_the_exposition(demo: Server) -> None:
    ask(demo)
    with demo.client() as client:
        text = client.get("/metrics").text
    assert 'halfbyte_quantization_relative_error{format="nf4",group="self_attn.q_proj"' in text
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout + result.stderr == ""


def test_prometheus_sees_the_memory(demo: Server, tmp_path: Path) -> None:
    ask(demo)
    port = free_port()
    config = tmp_path / "prometheus.yml"
    target = demo.url.removeprefix("http://")
    job = {"job_name": "halfbyte", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
    config.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with start(command, port) as prometheus, demo.client() as client:
        query = {"query": f'halfbyte_memory_bytes{{model="{MODEL}"}}'}
        deadline = time.monotonic() + 30
        found: dict[str, int] = {}
        expected = None  # what is measured may change until the engine has come to rest
        while found != expected and time.monotonic() < deadline:
            time.sleep(0.5)
            try:
                answer = httpx.get(f"{prometheus.url}/api/v1/query", params=query).json()
            except httpx.TransportError:
                continue
            (model,) = client.get("/memory").json()["models"]
            expected = model["measured"]
            found = {row["metric"]["component"]: int(row["value"][1]) for row in answer["data"]["result"]}
        assert found == expected
