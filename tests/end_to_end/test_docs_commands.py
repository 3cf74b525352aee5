"""The commands of docs/ run: curl and halfbyte as they stand, but for the port, keys, and paths they tell to change.

Container runtimes, kubectl and compose are run by test_container.py and test_compose.py, or checked in tests/deploy;
`make` and benchmarks by who develops. A command that is of no kind named here fails.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.server import HALFBYTE, Server, clean_environment, serve
from tests.tiny_models import save_tiny

DOCS = Path(__file__).parent.parent.parent / "docs"
PROGRAMS = ("curl", "halfbyte")
ELSEWHERE = ("buildah", "cd", "debootstrap", "docker", "kubectl", "make", "podman", "promtool", "python", "tar")
EXPLAINED = re.compile(r" {3,}.*")
"""What stands behind a command in an indented block."""
ADMIN_KEY = "a-key-for-this-test"


def commands(page: str) -> list[str]:
    """Those of fenced blocks, and of indented lines that begin with a program."""
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    begins = "|".join((*PROGRAMS, *ELSEWHERE))
    indented = re.findall(rf"^ {{4}}((?:{begins}) .*)$", text, re.MULTILINE)
    return [*filter(None, fenced), *(EXPLAINED.sub("", line) for line in indented)]


def program(command: str) -> str:
    words = shlex.split(command)
    return next(word for word in words if "=" not in word)  # after NAME=value


PAGES = sorted(path.name for path in DOCS.glob("*.md"))
WITH_CURL = [page for page in PAGES if any(program(command) == "curl" for command in commands(page))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(HALFBYTE_ADMIN_KEY=ADMIN_KEY) as running:
        yield running


def run(command: str) -> str:
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env=clean_environment(), check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_of_a_known_kind(page: str) -> None:
    assert [command for command in commands(page) if program(command) not in (*PROGRAMS, *ELSEWHERE)] == []


@pytest.mark.parametrize("page", WITH_CURL)
def test_requests_are_answered(page: str, server: Server, model: Path) -> None:
    for command in commands(page):
        if program(command) == "curl":
            line = command.replace("http://127.0.0.1:8000", server.url).replace('"/models/small"', f'"{model}"')
            assert run(line.replace("ADMIN_KEY", ADMIN_KEY).replace("curl ", "curl --fail-with-body -sS ", 1))


def test_plans_and_copies_are_made(model: Path, tmp_path: Path) -> None:
    lines = {line for page in PAGES for line in commands(page) if program(line) == "halfbyte"}
    assert lines
    for number, line in enumerate(sorted(lines)):
        words = re.sub(r"\[MODEL\]|\bMODEL\b", str(model), line).replace("OUT", str(tmp_path / str(number)))
        assert run(words.replace(" ...", "").replace("halfbyte ", f"{HALFBYTE} ", 1))
