"""The emulated kernels under AddressSanitizer, which sees the first byte behind shared memory and behind a tensor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulation import conftest

pytestmark = pytest.mark.timeout(600)

FEW = (
    "tensor_cores and nested-by-3 or rounds_only and dtype1-nested or absmax_codes or scales and nf4"
    " or (codes_and_values or tiles_of or every_batch or bits_of_products or cpus_bits) and dtype1 and not fp4"
    " or stay_inside or int8_is or of_nothing or workspace"
    " or (agrees_with_float64 or however and 24 or to_their_slots) and bfloat16"
)
"""What a quick run takes: every kernel, one dtype of most."""
KERNELS = ("tests/emulation/test_kernels.py", "tests/emulation/test_attention.py")


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """AddressSanitizer's library, which has to be in a process from its start."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc, whose AddressSanitizer can be loaded into Python")
    path = conftest.run(compiler, "-print-file-name=libasan.so").stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip("gcc has no libasan.so here")
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory, sanitizer: str) -> Path:
    options = ("-DHALFBYTE_SANITIZE=address", "-DCMAKE_CXX_COMPILER=g++")
    return conftest.build(conftest.ROOT, tmp_path_factory.mktemp("sanitized"), *options)


def check(library: Path, sanitizer: str, *files: str, selection: str = "") -> None:
    """Each file's tests in a process of its own, two at a time."""
    environment = {
        conftest.LIBRARY_VARIABLE: str(library),
        "LD_PRELOAD": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and torch's
    }

    def run(file: str) -> subprocess.CompletedProcess[str]:
        return conftest.run(sys.executable, "-m", "pytest", "-q", "-x", file, "-k", selection, **environment)

    with ThreadPoolExecutor(2) as processes:
        for done in processes.map(run, files):
            assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_kernels_stay_inside_their_tensors(sanitized: Path, sanitizer: str) -> None:
    check(sanitized, sanitizer, *KERNELS, selection=FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a few minutes of a processor's time, beside whatever else runs
def test_all_kernels_stay_inside_their_tensors(sanitized: Path, sanitizer: str) -> None:
    check(sanitized, sanitizer, *KERNELS, "tests/emulation/test_emulator.py")


def test_a_byte_behind_a_tensor_is_seen(sanitized: Path, sanitizer: str) -> None:
    """The same library, one value more than the tensor has."""
    program = (
        "import ctypes, sys\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "memory = ctypes.CDLL(None).malloc\n"
        "memory.restype = ctypes.c_void_p\n"
        "out = memory(ctypes.c_size_t(4 * 64 - 1))\n"
        "library.hb_emulated_pass_on(64, True, ctypes.c_void_p(out))\n"
    )
    environment = {"LD_PRELOAD": sanitizer, "ASAN_OPTIONS": "detect_leaks=0"}
    done = conftest.run(sys.executable, "-c", program, str(sanitized), **environment)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
