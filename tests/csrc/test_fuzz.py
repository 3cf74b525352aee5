"""Builds the libFuzzer target of the C entries with clang and runs it for a bounded time under sanitizers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.csrc.test_ctest import _build, _run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 30
SANITIZERS = "address,undefined,float-cast-overflow,fuzzer-no-link"
COMPILERS = ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))


def test_fuzzing_the_entries_finds_nothing(tmp_path: Path) -> None:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("needs clang++ (on Debian: apt-get install clang libclang-rt-dev), which is not on PATH")
    build = _build(
        tmp_path / "build",
        "-DHALFBYTE_CUDA=OFF",
        "-DBUILD_TESTING=ON",
        "-DHALFBYTE_FUZZ=ON",
        f"-DHALFBYTE_SANITIZE={SANITIZERS}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DCMAKE_C_COMPILER={compiler.replace('clang++', 'clang')}",
    )
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    _run(
        str(build / "tests" / "halfbyte_fuzz"),
        str(corpus),
        f"-max_total_time={SECONDS}",
        "-max_len=4096",
        f"-artifact_prefix={tmp_path}/",
    )
    assert len(list(corpus.iterdir())) > 50, "the fuzzer reached next to nothing"
