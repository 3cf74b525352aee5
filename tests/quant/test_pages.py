"""The arena of packed weights: memory of one's own, whole memory back, and the kernel asked for huge pages."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import threading
from pathlib import Path

import pytest
import torch

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, pages
from quant.pages import SMALLEST, Arena
from tests.quant.operands import same_bits

MEGABYTE = 1 << 20
CPU = torch.device("cpu")


def mapping_of(address: int) -> str | None:
    """What /proc says of the mapping that holds an address; None where nothing is mapped."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(number, 16) for number in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return mapping
    return None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (333, 777), (1 << 20, 1), (40 * MEGABYTE,)], ids=str)
def test_tensors_do_not_overlap_and_share_no_storage(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arena = Arena()
    placed = [arena.empty(shape, dtype).fill_(value) for value in (1, 2, 3)]
    for value, place in zip((1, 2, 3), placed, strict=True):
        assert bool((place == value).all())
        assert place.shape == shape
        assert place.dtype == dtype
        assert place.data_ptr() % 64 == 0
        assert place.untyped_storage().nbytes() == place.nbytes, "savers look for tensors that share a storage"


def test_small_and_foreign_tensors_are_torchs_own() -> None:
    assert pages.empty((SMALLEST,), torch.uint8, torch.device("meta")).is_meta
    for size in (0, SMALLEST - 1):
        assert pages.empty((size,), torch.uint8, CPU).untyped_storage().resizable(), "as memory of torch's is"
    assert not pages.empty((SMALLEST,), torch.uint8, CPU).untyped_storage().resizable()


def test_tensors_follow_each_other_and_the_memory_goes_with_the_last() -> None:
    arena = Arena()
    tensors = [arena.empty((MEGABYTE,), torch.uint8) for _ in range(8)]
    assert [b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(tensors)] == [MEGABYTE] * 7
    last = tensors.pop().fill_(7)
    address = last.data_ptr()
    tensors.clear()
    gc.collect()
    assert mapping_of(address) is not None
    assert bool((last == 7).all())
    del last
    gc.collect()
    assert mapping_of(address) is None
    assert arena.empty((MEGABYTE,), torch.uint8).fill_(1).all(), "and there is more"


def test_threads_get_memory_of_their_own() -> None:
    arena = Arena()
    placed: list[tuple[int, torch.Tensor]] = []

    def place(value: int) -> None:
        for _ in range(20):
            placed.append((value, arena.empty((SMALLEST,), torch.uint8).fill_(value)))

    threads = [threading.Thread(target=place, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(placed) == 80
    assert all(bool((tensor == value).all()) for value, tensor in placed)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_the_kernel_is_asked_for_huge_pages() -> None:
    place = Arena().empty((8 * MEGABYTE,), torch.uint8)
    assert re.search(r"VmFlags:.* hg\b", mapping_of(place.data_ptr()) or "")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Linear4bit, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float64)),
        (Linear4bit, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_search=True)),
        (Linear8bit, BitsAndBytesConfig(load_in_8bit=True)),
    ],
)
def test_layers_with_placed_weights_are_copied_and_moved_like_any(kind: type, config: BitsAndBytesConfig) -> None:
    layer = kind.from_float(torch.nn.Linear(512, 640, bias=False), config)  # type: ignore[attr-defined]
    assert not layer.weight.untyped_storage().resizable(), "the weight is in the arena"
    x = torch.randn(3, 512)
    with torch.inference_mode():
        expected = layer(x)
        for other in (copy.deepcopy(layer), layer.to("cpu"), layer.half()):
            assert same_bits(other(x), expected)
