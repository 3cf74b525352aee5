"""Builds the libFuzzer target of the C entries with clang and runs it for a bounded time under sanitizers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.csrc.test_ctest import _build, _run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # most of it is clang, three minutes of a processor

SECONDS = 30
"""Of fuzzing, whatever the machine: the test looks for what a change broke. A search for more is the same program with
another -max_total_time."""
SEEDS = 100
"""Inputs to begin with, five for each of twenty entries, which an input's first byte chooses: however busy the
machine, every entry is called with more than zeros."""
MOST_BYTES = 4096
"""Of an input."""
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
    corpus, seeds = tmp_path / "corpus", tmp_path / "seeds"
    for directory in (corpus, seeds):
        directory.mkdir()
    for first in range(SEEDS):
        (seeds / str(first)).write_bytes(bytes([first]) + os.urandom(MOST_BYTES // 2))
    _run(
        str(build / "tests" / "halfbyte_fuzz"),
        str(corpus),
        str(seeds),
        f"-max_total_time={SECONDS}",
        f"-max_len={MOST_BYTES}",
        "-len_control=0",  # else the first half minute is spent on inputs of a few bytes
        f"-artifact_prefix={tmp_path}/",
    )
    assert len(list(corpus.iterdir())) > 50, "the fuzzer reached next to nothing"
