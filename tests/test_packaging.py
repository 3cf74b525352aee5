"""What is shipped: the wheel and the sdist hold what they must and nothing else; the Dockerfile keeps its promises."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist, and the wheel built from that sdist, as `make dist` does it but without a fresh environment."""
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_wheel_for_every_python(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert re.fullmatch(r"halfbyte-[\d.]+-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "quant/lib/libhalfbyte_cpu.so" in names
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        name.removeprefix("server/demo/model/") for name in names
    }
    assert {name.split("/")[0].split("-")[0] for name in names} == {"quant", "server", "halfbyte"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_where_the_sources_are_not(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Redirect' not in type(f).__name__];"
        f"sys.path.insert(0, {str(target)!r});"
        "import quant, torch; from quant import native;"
        "layer = quant.Linear4bit.from_float(torch.nn.Linear(64, 8), quant.BitsAndBytesConfig(load_in_4bit=True));"
        "layer(torch.ones(1, 64)); print(quant.__file__)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(target / "quant" / "__init__.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_sdist_holds_the_sources(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "csrc/CMakeLists.txt", "csrc/halfbyte.h", "quant/formats.py", "server/app.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "build/"))]


def test_the_dockerfile_copies_what_the_ignore_file_lets_through() -> None:
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_the_final_stage_is_small_and_safe() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "g++" not in final
    assert re.search(r"^USER [1-9]\d*$", final, re.MULTILINE)
    assert "HEALTHCHECK" in final
    assert 'ENTRYPOINT ["halfbyte"]' in final


def test_the_constraint_is_the_tested_torch() -> None:
    import torch

    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch.__version__.split("+")[0] == pinned
    assert f"torch=={pinned}" in DOCKERFILE
    assert f"| {pinned} (CPU) |" in (ROOT / "docs" / "development.md").read_text()


def test_nothing_is_left_undone_without_an_owner() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in listed.split("\0"):
        path = ROOT / name
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".yaml", ".toml") and path.is_file():
            found = re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text().replace("TODO|FIXME|XXX|HACK", ""))
            assert not found, f"{name}: {found}"
