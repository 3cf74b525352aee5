"""What every test shares: quiet libraries, and CUDA tests that skip with a reason where there is no device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
