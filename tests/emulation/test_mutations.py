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

CUDA = conftest.ROOT / "csrc" / "cuda"
KERNELS = sorted(path for path in CUDA.glob("*.cu*") if not path.name.startswith("vocabulary"))
"""And headers of kernels, but for those that define the words."""
WORDS = (
    "block_barrier",
    "group_barrier",
    r"copies_wait<\d>",
    r"copies_wait<Stages - 2>",
    "barriers_begun",
    "barrier_arrive",
    "barrier_arrive_expecting",
    "barrier_arrive_after_copies",
    "barrier_wait",
    "products_begin",
    "products_commit",
    "products_wait",
    "predecessors_wait",
)
"""All but warp_barrier, which orders a warp's accesses to memory: that they are seen late is not modelled."""
SYNCHRONISATION = re.compile(rf"\b(?:{'|'.join(WORDS)})\([^;]*\);")
PLACES = [(path.name, match.start()) for path in KERNELS for match in SYNCHRONISATION.finditer(path.read_text())]
COMPARED = ("tests/emulation/test_kernels.py", "tests/emulation/test_attention.py")
COMPARISONS = (
    "tensor_cores or tiles_of or batch or hopper or cpus_bits or float64 or however or reference and not scales_that"
)
LIKELY = {
    "attention": "test_attention",
    "float_sums": "tensor_cores or every_batch",
    "linear4": "tensor_cores or hopper",
    "linear4_hopper": "hopper",
    "linear8": "tiles_of or linear_8bit",
    "rms_norm": "cpus_bits",
    "tile_stages": "tensor_cores or tiles_of",
}
"""By the longest beginning of a file's name: the comparisons made first, so that most changes are seen soon."""
TESTS_FAILED = 1


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, to be changed."""
    copy = tmp_path_factory.mktemp("mutated")
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(conftest.ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def compare(library: Path, likely: str | None = None) -> tuple[int, str]:
    """The comparisons' exit status and words; those that `likely` selects first, the others where these pass."""
    selections = [COMPARISONS] if likely is None else [f"({COMPARISONS}) and ({likely})", COMPARISONS]
    for selection in selections:
        command = (sys.executable, "-m", "pytest", "-q", "-x", *COMPARED, "-k", selection)
        done = conftest.run(*command, **{conftest.LIBRARY_VARIABLE: str(library)})
        if done.returncode != 0:
            break
    return done.returncode, f"{done.stdout}\n{done.stderr}"


def likely_for(name: str) -> str:
    """The comparisons that a file's change is most likely to be seen by."""
    return LIKELY[max((beginning for beginning in LIKELY if name.startswith(beginning)), key=len)]


def test_there_are_places_to_change() -> None:
    assert len(PLACES) >= 30


def test_the_unchanged_sources_pass(tree: Path) -> None:
    code, output = compare(conftest.build(tree, tree / "build"))
    assert code == 0, output


@pytest.mark.parametrize(("name", "start"), PLACES, ids=[f"{name}:{start}" for name, start in PLACES])
def test_without_it_a_comparison_fails(tree: Path, name: str, start: int) -> None:
    likely = likely_for(name)
    source = tree / "csrc" / "cuda" / name
    text = source.read_text()
    try:
        source.write_text(text[:start] + SYNCHRONISATION.sub("{}", text[start:], count=1))
        # The place may have been the only one that uses a parameter.
        code, output = compare(conftest.build(tree, tree / "build", "-DCMAKE_CXX_FLAGS=-Wno-unused-parameter"), likely)
    finally:
        source.write_text(text)
    crashed = code < 0
    assert crashed or code == TESTS_FAILED, output
    assert crashed or "assert" in output or "NativeError" in output, output  # wrong, or a thread waits for ever
