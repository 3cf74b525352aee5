"""Each barrier and each wait of the kernels is there for a reason: without it, a comparison fails, or threads wait for
ever, or one reads far outside."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.emulation import conftest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KERNELS = sorted((conftest.ROOT / "csrc" / "cuda").glob("*.cu*"))  # and headers of kernels
SYNCHRONISATION = re.compile(r"\b(?:block_barrier\(\)|copies_wait<[^;]*>\(\));")
PLACES = [(path.name, match.start()) for path in KERNELS for match in SYNCHRONISATION.finditer(path.read_text())]
COMPARED = ("tests/emulation/test_kernels.py", "tests/emulation/test_attention.py")
COMPARISONS = "tensor_cores or tiles_of or batch or cpus_bits or float64 or however or reference and not scales_that"
TESTS_FAILED = 1


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, to be changed."""
    copy = tmp_path_factory.mktemp("mutated")
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(conftest.ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def compare(library: Path) -> tuple[int, str]:
    command = (sys.executable, "-m", "pytest", "-q", "-x", *COMPARED, "-k", COMPARISONS)
    done = conftest.run(*command, **{conftest.LIBRARY_VARIABLE: str(library)})
    return done.returncode, f"{done.stdout}\n{done.stderr}"


def test_there_are_places_to_change() -> None:
    assert len(PLACES) >= 7


def test_the_unchanged_sources_pass(tree: Path) -> None:
    code, output = compare(conftest.build(tree, tree / "build"))
    assert code == 0, output


@pytest.mark.parametrize(("name", "start"), PLACES, ids=[f"{name}:{start}" for name, start in PLACES])
def test_without_it_a_comparison_fails(tree: Path, name: str, start: int) -> None:
    source = tree / "csrc" / "cuda" / name
    text = source.read_text()
    try:
        source.write_text(text[:start] + SYNCHRONISATION.sub(";", text[start:], count=1))
        code, output = compare(conftest.build(tree, tree / "build"))
    finally:
        source.write_text(text)
    crashed = code < 0
    assert crashed or code == TESTS_FAILED, output
    assert crashed or "assert" in output or "none can go on" in output, output
