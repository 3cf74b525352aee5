"""POST /admin/plan: real planning processes behind a scripted server, and the plans of one that fails."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import SecretStr

from server.engine.planner import Planner
from server.errors import LoadError
from server.memory.plan import make_plan
from server.records import ModelSpec
from tests.server.conftest import RunningApp, ServeScript, wait_for
from tests.tiny_models import save_tiny

ADMIN = {"Authorization": "Bearer secret-admin-key"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def running(serve_scripts: ServeScript) -> Iterator[RunningApp]:
    with serve_scripts({"first": {}}, admin_key=SecretStr("secret-admin-key")) as running:
        yield running


def ask(running: RunningApp, body: object) -> httpx.Response:
    with running.client(headers=ADMIN) as client:
        client.timeout = httpx.Timeout(120)
        return client.post("/admin/plan", json=body)


def test_a_plan_is_that_of_the_command(running: RunningApp, path: Path) -> None:
    entry = {"name": "m", "path": str(path), "quantization": "nf4-dq", "kv_cache": {"tokens": 512}, "device": "cpu"}
    answer = ask(running, entry)
    assert answer.status_code == 200, answer.text
    expected = make_plan(ModelSpec("m", str(path), "nf4-dq", kv_cache_tokens=512, device="cpu")).document()
    document = answer.json()
    for each in (document["devices"][0], expected["devices"][0]):
        assert each["components"].pop("runtime_context") > 50_000_000
        assert each["components"].pop("mapped_files") > 0
        for varying in ("free_bytes", "available_bytes", "total_bytes", "peak_bytes"):
            del each[varying]
    for whole in (document, expected):
        del whole["most_sequences"]  # of what is free now
    assert document == json.loads(json.dumps(expected))
    assert document["fits"]


def test_what_models_here_have_been_promised_is_not_left(serve_scripts: ServeScript, path: Path) -> None:
    """Half of the promise, or more, is not what the process has taken: it is a few imports large."""
    promise = 2**33
    script = {"plan": {"device": "cpu", "capacity": 2**60, "peak": promise, "kept": promise}}
    with serve_scripts({"first": script}, admin_key=SecretStr("secret-admin-key")) as running:
        (device,) = ask(running, {"path": str(path), "kv_cache": {"tokens": 512}, "device": "cpu"}).json()["devices"]
    assert promise / 2 < device["promised_bytes"] < promise
    assert device["available_bytes"] == max(0, device["free_bytes"] - device["promised_bytes"])
    assert device["fits"] == (device["peak_bytes"] <= device["available_bytes"])


def test_what_does_not_fit_is_an_answer(running: RunningApp, path: Path) -> None:
    document = ask(running, {"path": str(path), "kv_cache": {"tokens": 2**40}, "device": "cpu"}).json()
    assert not document["fits"]
    assert document["nearest"][0]["changes"]["kv_cache"]["tokens"] < 2**40


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"path": "/nowhere"}, 400, "/nowhere"),
        ({"quantization": "nf5"}, 400, "nf5"),
        ({"quantisation": "nf4"}, 400, "quantisation"),
    ],
)
def test_refusals(running: RunningApp, path: Path, change: dict[str, Any], status: int, words: str) -> None:
    answer = ask(running, {"path": str(path)} | change)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_broken_checkpoint_is_refused(running: RunningApp, path: Path, tmp_path: Path) -> None:
    broken = save_tiny("llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\xff" * 20)
    answer = ask(running, {"path": str(broken)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checkpoint_refused")


def test_planning_loads_no_torch_where_it_is_asked_for(path: Path) -> None:
    code = f"""
import asyncio, sys
from server.engine.planner import Planner
from server.records import ModelSpec
made = asyncio.run(Planner().plan(ModelSpec("m", {str(path)!r}, device="cpu")))
print(made.fits, sorted({{"torch", "transformers", "quant"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "True []"


@pytest.mark.parametrize("code", ["pass", "print('nonsense')", "raise SystemExit(7)"])
def test_a_process_without_an_answer_is_an_error(code: str) -> None:
    with pytest.raises(LoadError, match="'m' ended with code"):
        asyncio.run(Planner([sys.executable, "-c", code]).plan(ModelSpec("m", "/nowhere")))


def test_a_process_that_does_not_end_is_ended(tmp_path: Path) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    async def cancelled() -> int:
        task = asyncio.create_task(Planner([sys.executable, "-c", code]).plan(ModelSpec("m", "/nowhere")))
        written = tmp_path / "pid"
        deadline = time.monotonic() + 30
        while not (written.is_file() and written.read_text()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return int(written.read_text())

    pid = asyncio.run(cancelled())
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    with pytest.raises(LoadError, match="longer than"):
        asyncio.run(
            Planner([sys.executable, "-c", "import time; time.sleep(600)"], seconds=0.2).plan(ModelSpec("m", "x"))
        )
