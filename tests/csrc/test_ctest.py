"""Builds and runs the C tests with ctest, plainly and under sanitizers, and compiles the CUDA kernels where nvcc is."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quant import native
from quant.errors import NativeError

pytestmark = pytest.mark.timeout(900)  # two cores, a compiler and, in the slow ones, a sanitizer

ROOT = Path(__file__).parents[2]
CUDA_ARCHITECTURES = "80;90a"


def _tool(name: str) -> str:
    """The tool beside this Python (the development extras bring cmake and ninja), else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which is neither beside {sys.executable} nor on PATH")
    return found


def _run(*command: str) -> str:
    """Runs a command; its whole output is in the failure."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)} gave {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _build(directory: Path, *options: str) -> Path:
    cmake, ninja = _tool("cmake"), _tool("ninja")
    configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(directory), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    _run(*configure, *options)
    _run(cmake, "--build", str(directory))
    return directory


def _beside_the_library(elsewhere: Path) -> Path:
    """Where the editable install has built the library, so that it is not compiled once more; or else elsewhere."""
    built = list(ROOT.glob("build/py3-*/CMakeCache.txt"))
    return built[0].parent if len(built) == 1 else elsewhere


@pytest.mark.parametrize(
    "sanitizers",
    [
        pytest.param("", id="plain"),
        pytest.param("address,undefined", id="address+undefined", marks=pytest.mark.slow),
        pytest.param("thread", id="thread", marks=pytest.mark.slow),
    ],
)
def test_c_tests_pass(tmp_path: Path, sanitizers: str) -> None:
    if sanitizers:
        options = ("-DHALFBYTE_CUDA=OFF", "-DBUILD_TESTING=ON", f"-DHALFBYTE_SANITIZE={sanitizers}")
        directory = _build(tmp_path, *options)
    else:
        directory = _build(_beside_the_library(tmp_path), "-DBUILD_TESTING=ON")
    output = _run(_tool("ctest"), "--test-dir", str(directory), "--verbose", "--parallel", "2")
    if not sanitizers:
        _run(_tool("cmake"), "-DBUILD_TESTING=OFF", str(directory))  # the next install builds no tests
    assert " 0 failed expectations" in output
    assert output.count("ok  ") >= 20
    for level in native.levels(native.kernels("cpu").library):
        assert re.search(rf"halfbyte_tests_{level} \.+ +Passed", output), level


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library compiled, warnings being errors, for two architectures."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, which is not on PATH")
    options = ("-DHALFBYTE_CUDA=ON", f"-DHALFBYTE_CUDA_ARCHITECTURES={CUDA_ARCHITECTURES}")
    return _build(tmp_path_factory.mktemp("cuda"), *options) / "libhalfbyte_cuda.so"


@pytest.mark.slow
def test_cuda_library_without_a_device_says_so(cuda_library: Path) -> None:
    """Every entry checks its arguments first, then answers that nothing can be launched; nothing crashes."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device; tests marked cuda use the kernels for real")
    kernels = native.Kernels(native.load_library(cuda_library), "cuda")
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    sizes = {"n": 64, "blocksize": 64, "blocks": 4, "nested_blocksize": 256, "M": 2, "N": 2, "K": 32}
    sizes |= {"E": 1, "P": 1, "packed_bytes": 32}
    sizes |= {"T": 1, "S": 1, "H": 2, "G": 1, "D": 8, "block_tokens": 16, "max_blocks": 1, "slot_count": 16}
    for entry, struct in native.STRUCTS.items():
        if entry in native.CPU_ONLY:
            assert not hasattr(kernels.library, entry)
            continue
        args = struct()
        for name, kind in struct._fields_:
            if kind is ctypes.c_void_p:
                setattr(args, name, memory.data_ptr())
            elif name in sizes:
                setattr(args, name, sizes[name])
        args.call = native.Call(ctypes.sizeof(struct), None, memory.data_ptr(), memory.numel(), 1)
        status = getattr(kernels.library, entry)(ctypes.byref(args))
        with pytest.raises(NativeError, match=f"{entry} in the cuda library refused: No CUDA device can be used"):
            kernels.check_status(entry, status)
        args.call.struct_bytes += 1
        with pytest.raises(NativeError, match="another size"):
            kernels.check_status(entry, getattr(kernels.library, entry)(ctypes.byref(args)))
