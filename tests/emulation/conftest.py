"""Builds the emulated CUDA library and puts it in the place of the CPU's, so that what is written for devices runs."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quant import native
from tests.quant import operands

ROOT = Path(__file__).parents[2]
LIBRARY_VARIABLE = "HALFBYTE_EMULATION_LIBRARY"
"""Names a library that is built already; a run under AddressSanitizer and the mutation test set it."""


FEW_BLOCKSIZES = (64, 512)
"""Of the block sizes that tests/quant/test_native.py goes over, those that are emulated."""
MANY_VALUES = 1000
"""What it calls `count` is emulated up to here."""
STREAM = 0x57AEA0
"""What every call of `device` names as its stream; the emulation refuses launches on another."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sizes down what tests/quant/test_native.py asks of a device."""

    def wanted(item: pytest.Item) -> bool:
        if Path(__file__).parent not in item.path.parents or not hasattr(item, "callspec"):
            return True
        parameters = item.callspec.params
        few = parameters.get("blocksize", FEW_BLOCKSIZES[0]) in FEW_BLOCKSIZES
        return few and parameters.get("count", 0) <= MANY_VALUES

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def tool(name: str) -> str:
    """The tool beside this Python (the development extras bring cmake and ninja), else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which is neither beside {sys.executable} nor on PATH")
    return found


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, whatever that is."""
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False, cwd=ROOT
    )


def build(sources: Path, directory: Path, *options: str) -> Path:
    """The emulated library of a tree that has csrc and tests/emulation; fails with the compiler's words."""
    configure = [tool("cmake"), "-S", str(sources / "csrc"), "-B", str(directory), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DHALFBYTE_CUDA=OFF", "-DHALFBYTE_EMULATION=ON", *options]
    for command in (configure, [tool("cmake"), "--build", str(directory), "--target", "halfbyte_emulation"]):
        done = run(*command)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)} gave {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return directory / "emulation" / "libhalfbyte_emulation.so"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulated library, loaded as any other."""
    given = os.environ.get(LIBRARY_VARIABLE)
    path = Path(given) if given else build(ROOT, tmp_path_factory.mktemp("emulation"))
    loaded = native.load_library(path)
    loaded.hb_emulation_seed.argtypes = (ctypes.c_uint64,)
    loaded.hb_emulation_seed.restype = None
    loaded.hb_emulation_stream.argtypes = (ctypes.c_void_p,)
    loaded.hb_emulation_stream.restype = None
    return loaded


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


@pytest.fixture
def device(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device type whose kernels are the emulated ones in this test: the CPU, whose memory they use.

    Every order is drawn from a fresh seed. What torch.empty returns is full of NaN patterns. References of these sizes
    gain nothing from threads.
    """
    seed = secrets.randbits(64)
    print("emulation seed", seed)
    library.hb_emulation_seed(seed)
    kernels = native.Kernels(library, "emulation")
    monkeypatch.setattr(native, "kernels", lambda device_type: kernels)
    filled = native.filled

    def on_stream(entry: str, **fields: Any) -> Any:
        args = filled(entry, **fields)
        args.call.stream = STREAM
        return args

    library.hb_emulation_stream(STREAM)
    monkeypatch.setattr(native, "filled", on_stream)
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **options)  # type: ignore[call-overload]
        tensor.view(-1).view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield "cpu"
    torch.set_num_threads(threads)
    library.hb_emulation_stream(None)
