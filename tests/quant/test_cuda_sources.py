"""What csrc/cuda asks of CUDA, read from its text: it allocates nothing, waits for nothing, and has no instruction that
csrc/README.md does not list as one that only a GPU can show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted([*(CSRC / "cuda").iterdir(), CSRC / "library.cpp", CSRC / "checks.h"])
WORDS = ("vocabulary.cuh", "vocabulary_hopper.cuh")
OF_THE_RUNTIME = {
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetLastError",
    "cudaLaunchKernelEx",
}
"""What may be called: none of these allocates or waits."""
ALLOCATING = (
    r"\bnew\b|\b(?:m|c|re|aligned_)alloc\b|std::(?:vector|string|map|function|make_\w+|unique_ptr|shared_ptr)\b"
)


def code_of(path: Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def test_the_library_calls_nothing_that_allocates_or_waits() -> None:
    assert len(SOURCES) > 40
    called: set[str] = set()
    for path in SOURCES:
        code = code_of(path)
        called |= set(re.findall(r"\b(cu(?:da)?[A-Z]\w*)\(", code))
        assert not re.search(ALLOCATING, code), path.name
    assert called == OF_THE_RUNTIME


def test_kernels_are_plain_code() -> None:
    """PTX, and what only nvcc understands, is in the two files of words."""
    for path in SOURCES:
        if path.name not in WORDS:
            assert not re.search(r"\basm\b|<<<|__syncthreads|__CUDA_ARCH__", code_of(path)), path.name


@pytest.mark.parametrize("name", WORDS)
def test_every_instruction_is_listed(name: str) -> None:
    text = (CSRC / "README.md").read_text()
    listed = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text))
    code = code_of(CSRC / "cuda" / name)
    used = set(re.findall(r"\b((?:mma|cp|bar|wgmma|mbarrier|fence|griddepcontrol|setmaxnreg)(?:\.[a-z_]+)+)", code))
    assert used
    for instruction in used:
        assert any(instruction == one or instruction.startswith(f"{one}.") for one in listed), instruction
