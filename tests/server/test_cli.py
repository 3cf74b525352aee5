"""server/cli.py and server/app.py as a process: sentences, exit codes, signals, and no torch in the HTTP process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.app import bind
from server.cli import main
from server.config import ALL_KEYS, SECRET_KEYS
from server.errors import ConfigError
from tests.server.conftest import wait_for

ROOT = Path(__file__).parent.parent.parent
RUN = "import sys; from server.cli import main; main(sys.argv[1:])"
SCRIPTED = (
    "import sys, functools; sys.path.insert(0, {root!r}); import server.app; "
    "from tests.server.scripted_engine import command; "
    "server.app.create_app = functools.partial(server.app.create_app, command=command); " + RUN
)


def environment(**changes: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HALFBYTE_")}
    return clean | {"PYTHONPATH": str(ROOT)} | changes


def halfbyte(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real command, for what ends by itself."""
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(**variables), timeout=60, check=False
    )


@contextmanager
def serving(path: Path, tmp_path: Path, script: dict[str, Any], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`halfbyte serve` with scripted engines, listening on a port of its own; its stderr is a pipe."""
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump({"models": [{"name": "m", "path": str(path), "quantization": script}]}))
    command = [sys.executable, "-c", SCRIPTED.format(root=str(ROOT)), "serve", "--config", str(file), "--port", "0"]
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen([*command, *arguments], stderr=log, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def url(tmp_path: Path) -> str:
    """Where the server says that it listens."""
    found = None

    def listening() -> bool:
        nonlocal found
        found = re.search(r"listening on (http://\S+),", (tmp_path / "log").read_text())
        return found is not None

    wait_for(listening, 30)
    assert found is not None
    return found.group(1)


def wait_ready(base: str) -> None:
    wait_for(lambda: answers(base + "/readyz"), 30)


def answers(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


def engines_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_importing_loads_no_torch() -> None:
    heavy = ("torch", "transformers", "quant", "numpy")
    code = f"import sys, server.cli, server.app; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "/nowhere"], "MODEL: '/nowhere' is not a directory"),
        (["serve", "--port", "x"], "--port: 'port' is 'x'"),
        (["serve", "--nope", "x"], "--nope"),
        (["serve", "--port"], "--port"),
        (["serve", "a", "b"], "b"),
        (["frobnicate"], "frobnicate"),
        (["plan", "/nowhere"], "MODEL"),
        (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["serve", "--api-keys", "x"], "--api-keys"),
        (["serve", "--admin-key", "x"], "--admin-key"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [name for name in os.environ if name.startswith("HALFBYTE_")]:
        monkeypatch.delenv(variable)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ")
    assert words in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_mistake_as_a_process() -> None:
    result = halfbyte("serve", HALFBYTE_PORT="tcp://10.0.0.1:80")
    assert result.returncode == 2
    assert result.stderr.startswith("error: HALFBYTE_PORT: ")
    assert result.stdout == ""


def test_help_names_every_setting_and_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in ALL_KEYS:
        if key != "model" and key not in SECRET_KEYS:
            assert f"--{key.replace('_', '-')} " in text
            assert f"[HALFBYTE_{key.upper()}]" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"halfbyte \S+\n", capsys.readouterr().out)


def test_a_taken_port_is_a_config_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on '127.0.0.1' port {port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"can't listen on '192\.0\.2\.1'"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize(("kind", "code"), [("config", 2), ("checkpoint", 1), ("does_not_fit", 3), ("internal", 1)])
def test_a_model_that_fails_to_load_ends_the_server(model_path: Path, tmp_path: Path, kind: str, code: int) -> None:
    with serving(model_path, tmp_path, {"fail": [kind, "the weights are purple"]}) as process:
        assert process.wait(30) == code
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[-1] == "error: the weights are purple"
    assert "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_running_requests_finish(model_path: Path, tmp_path: Path, number: int) -> None:
    with serving(model_path, tmp_path, {"step_seconds": 0.02}) as process:
        base = url(tmp_path)
        wait_ready(base)
        (engine,) = engines_of(process.pid)
        body = {"model": "m", "prompt": "ab", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", base + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            wait_for(lambda: httpx.get(base + "/readyz").json()["status"] == "draining")
            assert httpx.get(base + "/livez").status_code == 200
            refused = httpx.post(base + "/v1/completions", json=body)
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            assert refused.headers["Retry-After"] == "1"
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert not Path(f"/proc/{engine}").exists()
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert re.search(r"INFO server.app: drained in \d+\.\d s, 0 requests and their 0 tokens were cut", log)


def test_an_engine_that_dies_in_the_drain_is_not_started_again(model_path: Path, tmp_path: Path) -> None:
    with serving(model_path, tmp_path, {"step_seconds": 0.02, "max_model_len": 100_000}) as process:
        base = url(tmp_path)
        wait_ready(base)
        (engine,) = engines_of(process.pid)
        body = {"model": "m", "prompt": "ab", "max_tokens": 90_000, "stream": True}
        with httpx.stream("POST", base + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(base + "/readyz").json()["status"] == "draining")
            os.kill(engine, signal.SIGKILL)
            assert "SIGKILL" in [line for line in lines if line][-1]
        assert process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert "is not started again" in log
    assert "Traceback" not in log


def test_requests_that_outlast_the_drain_end_with_a_sentence(model_path: Path, tmp_path: Path) -> None:
    script = {"step_seconds": 0.02, "max_model_len": 100_000}
    with serving(model_path, tmp_path, script, "--drain-seconds", "0.3") as process:
        base = url(tmp_path)
        wait_ready(base)
        body = {"model": "m", "prompt": "ab", "max_tokens": 90_000, "stream": True}
        with httpx.stream("POST", base + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert re.search(r"WARNING server.app: drained in 0\.\d s, 1 requests and their [1-9]\d* tokens were cut", log)


def test_a_second_signal_stops_at_once(model_path: Path, tmp_path: Path) -> None:
    script = {"step_seconds": 0.02, "max_model_len": 100_000}
    with serving(model_path, tmp_path, script) as process:
        base = url(tmp_path)
        wait_ready(base)
        (engine,) = engines_of(process.pid)
        body = {"model": "m", "prompt": "ab", "max_tokens": 90_000, "stream": True}
        with httpx.stream("POST", base + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            assert process.wait(30) == 0
            assert time.monotonic() - started < 15, "the drain would take 30"
            del lines
        assert not Path(f"/proc/{engine}").exists()
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert re.search(r"SIGINT again: stopping at once, 1 requests and their [1-9]\d* tokens are cut", log)


def test_a_signal_while_loading_ends_the_engine_too(model_path: Path, tmp_path: Path) -> None:
    with serving(model_path, tmp_path, {"load_seconds": 60}) as process:
        url(tmp_path)
        wait_for(lambda: engines_of(process.pid))
        (engine,) = engines_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        wait_for(lambda: not Path(f"/proc/{engine}").exists())
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_killed_server_leaves_no_engine(model_path: Path, tmp_path: Path) -> None:
    with serving(model_path, tmp_path, {}) as process:
        wait_ready(url(tmp_path))
        (engine,) = engines_of(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda: not Path(f"/proc/{engine}").exists())
