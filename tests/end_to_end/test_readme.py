"""Every command in the README runs: each block as it stands, but for ports and the paths it tells to change.

A block that no rule below knows fails, so that a new command cannot be added without being run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.server import Server, clean_environment, free_port, start
from tests.tiny_models import save_tiny

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.replace("\\\n", " ").strip().splitlines()]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="the README's commands need make")


@pytest.fixture(scope="module")
def made() -> Iterator[Server]:
    """`make serve`, as the README says it, on a free port."""
    assert "make serve" in COMMANDS
    port = free_port()
    with start(["make", "--no-print-directory", "-C", str(ROOT), "serve", f"PORT={port}"], port) as server:
        server.wait_until_ready()
        yield server
        os.killpg(server.process.pid, 2)
        server.process.wait(timeout=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def run(command: str, cwd: Path = ROOT, **environment: str) -> str:
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=clean_environment(**environment),
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_command_is_known() -> None:
    known = re.compile(r"make (serve|test)$|curl |\.venv/bin/halfbyte (plan|serve)")
    assert [command for command in COMMANDS if not known.match(command)] == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("curl")], ids=lambda c: c.split("8000")[1][:20]
)
def test_curl(made: Server, command: str) -> None:
    output = run(command.replace("http://127.0.0.1:8000", made.url).replace("curl ", "curl --fail -sS ", 1))
    if "stream" in command:
        assert output.strip().endswith("data: [DONE]")
    elif command.endswith("/metrics"):
        assert "halfbyte_memory_bytes{" in output
    else:
        assert json.loads(output)["models"][0]["name"] == "halfbyte-demo"


def test_make_test_collects_the_suite() -> None:
    """`make test` runs this very test; here the same command only collects, and of the suite only what is beside it."""
    assert "make test" in COMMANDS
    output = run("make test", PYTEST_ADDOPTS="--collect-only -q --ignore=tests/quant --ignore=tests/server")
    assert "tests/end_to_end/test_readme.py::test_make_test_collects_the_suite" in output
    assert re.search(r"\d{3,}(/\d+)? tests collected", output)


def test_plan_prints_the_table_that_the_readme_shows() -> None:
    output = run(".venv/bin/halfbyte plan".replace(".venv/bin", str(Path(sys.executable).parent)), COLUMNS="120")
    figures = re.findall(r"[a-z_0-9]+ *│ *([\d,]{5,})", output)
    assert len(figures) >= 4
    for row in re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", README, re.MULTILINE):
        assert re.search(rf"{row[0]} *│ *{re.escape(row[1])} ", output), row


def test_serving_a_path(model: Path) -> None:
    (command,) = [c for c in COMMANDS if "serve /path/to/model" in c]
    check_serves(command.replace("/path/to/model", str(model)), [model.name])


def test_serving_the_models_yaml(model: Path, tmp_path: Path) -> None:
    (text,) = [block for kind, block in BLOCKS if kind == "yaml"]
    content = text.replace("/path/to/model", str(model)).replace("/path/to/other", str(model))
    (tmp_path / "models.yaml").write_text(content)
    (command,) = [c for c in COMMANDS if "--config models.yaml" in c]
    check_serves(command, [entry["name"] for entry in yaml.safe_load(content)["models"]], cwd=tmp_path)


def check_serves(command: str, names: list[str], cwd: Path = ROOT) -> None:
    port = free_port()
    line = command.replace(".venv/bin", str(Path(sys.executable).parent)) + f" --port {port}"
    with start(["bash", "-c", f"cd {cwd} && exec {line}"], port) as server:
        server.wait_until_ready()
        with server.client() as client:
            assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == names
        assert server.stop() == 0


def test_the_python_example(model: Path) -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    code = code.replace("/path/to/model", str(model)) + "\nprint(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment()
    )
    assert result.stdout.strip() == "Linear4bit"


def test_every_link_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "csrc" / "README.md"):
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
