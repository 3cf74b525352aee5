"""What the emulation models of Hopper: it computes what PTX says, what is left out shows, and faults end in a sentence.

The kernel itself is in test_kernels.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from quant import native
from quant.errors import NativeError
from tests.quant.operands import Weight4

pytestmark = pytest.mark.timeout(600)  # the first of a session builds the library

OK = 0
LAUNCH_FAILED = 14
NO_FENCE, NO_COMMIT, NO_WAIT = 1, 2, 3
HOPPER, NO_DEVICE = 0, -1


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def multiply(library: ctypes.CDLL, again: bool, fault: int = 0) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Small integers: every sum is exact, and no two places of an operand can be exchanged unseen."""
    a = torch.randint(-99, 100, (64, 64)).to(torch.bfloat16)
    b = torch.randint(-99, 100, (16, 64)).to(torch.bfloat16)
    out = torch.zeros(64, 16)
    status = library.hb_emulated_multiply_warpgroup(pointer(a), pointer(b), again, fault, pointer(out))
    return status, out, a.float() @ b.float().t() * (2 if again else 1)


@pytest.mark.parametrize("again", [False, True])
def test_a_warpgroups_fragments_are_those_of_a_matrix_product(library: ctypes.CDLL, again: bool) -> None:
    status, out, expected = multiply(library, again)
    assert status == OK
    assert torch.equal(out, expected)


@pytest.mark.parametrize("fault", [NO_COMMIT, NO_WAIT])
def test_sums_are_nothing_before_their_wait(library: ctypes.CDLL, fault: int) -> None:
    status, out, _ = multiply(library, False, fault)
    assert status == OK
    assert out.isnan().all()


def test_a_product_without_a_fence_is_refused(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    assert multiply(library, False, NO_FENCE)[0] == LAUNCH_FAILED
    assert "a product without a fence" in capfd.readouterr().err


def test_a_bulk_copy_is_there_behind_its_barrier(library: ctypes.CDLL) -> None:
    source = torch.randint(0, 255, (64,), dtype=torch.uint8)
    early = 0
    for seed in range(50):
        library.hb_emulation_seed(seed)
        for wait in (True, False):
            out = torch.zeros_like(source)
            assert library.hb_emulated_copy_in_bulk(pointer(source), wait, pointer(out)) == OK
            assert not wait or torch.equal(out, source)
            early += int(not wait and torch.equal(out, source))
    assert 0 < early < 25


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        (0, "a barrier is used that has not begun"),
        (1, "a bulk copy arrives at a barrier that it does not know"),
        (2, "a bulk copy is not aligned to 16 bytes"),
        (3, "a bulk copy goes outside of the shared memory"),
        (4, "ended with 1 copies under way"),
        (5, "of 32 threads 31 have ended and 1 wait at a barrier; none can go on"),
    ],
)
def test_a_misuse_ends_the_launch_with_a_sentence(
    library: ctypes.CDLL, capfd: pytest.CaptureFixture[str], which: int, sentence: str
) -> None:
    library.hb_emulation_seed(1)  # at which the copy of the fifth does not land at once
    assert library.hb_emulated_misuse(which, pointer(torch.zeros(64, dtype=torch.uint8))) == LAUNCH_FAILED
    assert sentence in capfd.readouterr().err


@pytest.mark.parametrize("wait", [True, False])
def test_a_launch_behind_another_waits_or_sees_nothing_of_it(library: ctypes.CDLL, wait: bool) -> None:
    number, out = torch.zeros(32, dtype=torch.int32), torch.full((32,), 7, dtype=torch.int32)
    assert library.hb_emulated_launch_behind(wait, pointer(number), pointer(out)) == OK
    assert (out == int(wait)).all()
    assert (number == 1).all()


@pytest.fixture
def devices(library: ctypes.CDLL) -> Iterator[Callable[[int], None]]:
    """Says which device is at hand from here on."""
    yield library.hb_emulation_device
    library.hb_emulation_device(HOPPER)


def test_another_device_refuses_the_kernel_with_a_sentence(
    library: ctypes.CDLL, device: str, devices: Callable[[int], None], generator: torch.Generator
) -> None:
    """Each time anew, though what a device answers is kept; those of high numbers are asked again."""
    arguments = Weight4.random((8, 64), "nf4", 64, None, generator).to(device).arguments()
    x = torch.randn(1, 64, generator=generator).to(torch.bfloat16)
    kernels = native.Kernels(library, "emulation", "hopper")
    for number in (HOPPER, 1, 1, HOPPER, 63, 64, 1000, HOPPER):
        devices(number)
        if number == HOPPER:
            kernels.linear_4bit(x, *arguments)
            continue
        with pytest.raises(NativeError, match=r"needs a GPU of compute capability 9.0 .* accepted here is"):
            kernels.linear_4bit(x, *arguments)
        native.Kernels(library, "emulation", "mma").linear_4bit(x, *arguments)


def test_no_device_is_not_called_one_of_another_kind(
    library: ctypes.CDLL, device: str, devices: Callable[[int], None], generator: torch.Generator
) -> None:
    arguments = Weight4.random((8, 64), "nf4", 64, None, generator).to(device).arguments()
    devices(NO_DEVICE)
    with pytest.raises(NativeError, match="No CUDA device can be used"):
        native.Kernels(library, "emulation", "hopper").linear_4bit(torch.zeros(1, 64).to(torch.bfloat16), *arguments)
