"""What every test shares: quiet libraries, CUDA tests that skip with a reason where there is no device, and the two
halves that `make test` runs beside each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from server.engine.process import OPENMP_WAITING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(*OPENMP_WAITING)  # threads that look for work too long take it from the half beside theirs
hypothesis.settings.register_profile("halfbyte", deadline=None)  # how long an example takes is the machine's business
hypothesis.settings.load_profile("halfbyte")

COMPUTING: Final = ("tests/quant/", "tests/emulation/", "tests/csrc/")
"""Whose tests compute and compile; the others wait, for processes most of the time, and some of them look at clocks."""
COMPUTING_NICENESS: Final = 10


class Halves(LoadScopeScheduling):
    """Gives what computes to one worker of pytest-xdist and what waits to another; others have nothing to do."""

    def _split_scope(self, nodeid: str) -> str:
        return "computing" if nodeid.startswith(COMPUTING) else "waiting"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Halves:
    return Halves(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What computes steps back behind what looks at clocks, where they run beside each other."""
    if "PYTEST_XDIST_WORKER" in os.environ and item.nodeid.startswith(COMPUTING):
        os.nice(max(0, COMPUTING_NICENESS - os.nice(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `cuda` where torch sees no CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
    for item in items:
        if item.get_closest_marker("cuda"):  # keywords hold the names of directories too
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    import transformers

    transformers.logging.disable_progress_bar()


@pytest.fixture
def batch_invariant() -> Iterator[None]:
    """For tests of rows that must be the same in a batch of any size."""
    import quant.native

    quant.native.set_batch_invariant(True)
    yield
    quant.native.set_batch_invariant(False)
