"""The emulation itself: it computes what PTX says, a missing barrier or wait shows, and faults end in a sentence."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.emulation import conftest

pytestmark = pytest.mark.timeout(600)  # the first of a session builds the library

OK = 0
LAUNCH_FAILED = 14
THREADS = 128


def test_tensor_core_fragments_are_those_of_a_matrix_product(library: ctypes.CDLL) -> None:
    """Small integers: every sum is exact, and no two places of an operand can be exchanged unseen."""
    a = torch.randint(-99, 100, (16, 16)).to(torch.bfloat16)
    b = torch.randint(-99, 100, (16, 8)).to(torch.bfloat16)
    out = torch.ones(16, 8)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, out)]
    assert library.hb_emulated_multiply(*pointers) == OK
    assert torch.equal(out, a.float() @ b.float() + 1)


def test_int8_fragments_are_those_of_a_matrix_product(library: ctypes.CDLL) -> None:
    a = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    b = torch.randint(-128, 128, (32, 8), dtype=torch.int8)
    out = torch.ones(16, 8, dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, out)]
    assert library.hb_emulated_multiply_int8(*pointers) == OK
    assert torch.equal(out, a.int() @ b.int() + 1)


def pass_on(library: ctypes.CDLL, barrier: bool) -> bool:
    out = torch.zeros(THREADS, dtype=torch.int32)
    assert library.hb_emulated_pass_on(THREADS, barrier, ctypes.c_void_p(out.data_ptr())) == OK
    return torch.equal(out, torch.arange(1, THREADS + 1, dtype=torch.int32) % THREADS)


def test_a_missing_barrier_shows_at_any_seed(library: ctypes.CDLL) -> None:
    for seed in range(50):
        library.hb_emulation_seed(seed)
        assert pass_on(library, barrier=True)
        assert not pass_on(library, barrier=False)


def test_a_launch_on_another_stream_is_refused(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    out = torch.zeros(THREADS, dtype=torch.int32)
    library.hb_emulation_stream(conftest.STREAM)
    status = library.hb_emulated_pass_on(THREADS, True, ctypes.c_void_p(out.data_ptr()))
    library.hb_emulation_stream(None)
    assert status == LAUNCH_FAILED
    assert f"its caller's is {hex(conftest.STREAM)}" in capfd.readouterr().err
    assert pass_on(library, barrier=True)


def test_the_order_comes_from_the_seed(library: ctypes.CDLL) -> None:
    def order(seed: int) -> torch.Tensor:
        library.hb_emulation_seed(seed)
        out = torch.zeros(THREADS, dtype=torch.int32)
        assert library.hb_emulated_pass_on(THREADS, False, ctypes.c_void_p(out.data_ptr())) == OK
        return out

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_copies_land_at_their_wait_but_for_a_few(library: ctypes.CDLL) -> None:
    source = torch.arange(THREADS * 4, dtype=torch.int32).view(THREADS, 4)
    for pending in (0, 1, 2):  # 2: no wait
        before, after = torch.zeros_like(source), torch.zeros_like(source)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, before, after)]
        assert library.hb_emulated_copy(THREADS, pointers[0], pending, *pointers[1:]) == OK
        early = (before == source).all(dim=1)
        assert 0 < int(early.sum()) < THREADS // 2
        assert (before[~early] == -1).all()  # what shared memory begins with
        assert torch.equal(after, source if pending == 0 else before)


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        (0, "of 64 threads 1 have ended and 63 wait at a barrier; none can go on"),
        (1, "while other lanes are at"),
        (2, "shfl.xor among lanes 0000ffff; only whole warps are emulated"),
        (3, "a copy goes outside of the shared memory"),
        (4, "a copy of 16 bytes is not aligned to them"),
        (5, "64 threads with 102400 bytes of shared memory are not accepted"),
        (6, "33 threads with 132 bytes of shared memory are not accepted"),
    ],
)
def test_a_fault_ends_the_launch_with_a_sentence(
    library: ctypes.CDLL, capfd: pytest.CaptureFixture[str], which: int, sentence: str
) -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    assert library.hb_emulated_fault(which, ctypes.c_void_p(memory.data_ptr())) == LAUNCH_FAILED
    assert sentence in capfd.readouterr().err
    assert pass_on(library, barrier=True)  # and the next one runs
