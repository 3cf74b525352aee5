"""The script that measures the CUDA kernels, as far as it goes without a GPU: arguments, checks, and the table."""

from __future__ import annotations

import ctypes
import dataclasses
import sys

import pytest
import torch

from benchmarks import cuda_contenders, cuda_measuring, cuda_operators, cuda_targets
from benchmarks.cuda_measuring import Result, Timer
from benchmarks.cuda_table import table
from quant import native
from quant.op_kernels import REFERENCE_ONLY
from quant.ops import NAMES
from tests.emulation import conftest

pytestmark = pytest.mark.timeout(600)  # the first of a session builds the library

APART = {"linear_4bit", "linear_8bit", "paged_attention"}
"""Operators with columns or tables of their own."""
WITHOUT_KERNEL = REFERENCE_ONLY["cuda"]


def once(calls: list[cuda_contenders.Call]) -> float:
    """A timer that makes each call."""
    for call in calls:
        assert isinstance(call(), torch.Tensor)
    return 10.0


def measure(library: ctypes.CDLL, timer: Timer = once) -> list[Result]:
    kernels = native.Kernels(library, "emulation")
    return list(cuda_measuring.measure(kernels, torch.device("cpu"), (48, 128), (1, 9), 20_000, None, timer))


def test_every_operator_is_measured(library: ctypes.CDLL) -> None:
    results = measure(library)
    operators = {result.contender.partition(",")[0] for result in results if not result.rows}
    assert operators == {*NAMES} - APART - WITHOUT_KERNEL
    products = [result for result in results if result.contender == "nf4"]
    assert [result.rows for result in products] == [1, 9]
    assert [result.rows for result in results if result.contender == "nf4-dq hopper"] == [1, 9]
    assert products[0].bytes == 48 * 64 + 48 * 128 // 64 * 4 + (128 + 48) * 2


def test_only_the_kernels_that_a_device_runs_are_measured(
    library: ctypes.CDLL, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = native.Kernels(library, "emulation", "hopper")
    assert [each.cuda_kernel for each in cuda_contenders.with_each_kernel(kernels)] == ["mma", "hopper"]
    library.hb_emulation_device(1)
    assert [each.cuda_kernel for each in cuda_contenders.with_each_kernel(kernels)] == ["mma"]
    library.hb_emulation_device(0)
    assert "needs a GPU of compute capability 9.0" in capsys.readouterr().out


def test_the_table_has_times_shares_and_ratios(library: ctypes.CDLL) -> None:
    text = table(measure(library), [], 1e9)
    products = text[text.index("## 48x128") :].splitlines()
    rows = [line.split("|")[1].strip() for line in products if line.startswith("| ")]
    assert rows[:3] == ["rows", "1", "9"]
    assert "| dequantize_absmax | 10.0 | 5% |" in text
    assert "Error from float64" in text
    assert "| nf4 | 1 to 4 | copying | 0.80 | not measured |" in text  # at a model's shape, not this small one
    assert "| 1.00x |  |" in text  # torch / nf4; no bitsandbytes here
    assert "Copying moved 0.00 TB/s" in text


def test_what_could_not_be_timed_stays_empty(library: ctypes.CDLL) -> None:
    text = table(measure(library, lambda calls: None), [], 1e9)
    assert "| dequantize_absmax |  |  |" in text


def test_errors_are_those_of_float64_and_of_dequantizing(library: ctypes.CDLL) -> None:
    results = [result for result in measure(library) if result.rows]
    own = {result.contender: result for result in results if result.rows == 9}
    dense = own.pop(cuda_contenders.TORCH)
    assert dense.error == dense.dequantized_error  # torch's product of the same values
    for result in own.values():
        assert result.error is not None
        assert result.dequantized_error is not None
        assert 1e-4 < result.dequantized_error < 5e-3  # results in bfloat16: 2^-9 at most, half of that on average
        assert result.held is None  # no GPU
    for name in ("nf4", "fp4"):  # only the table is rounded, and the result
        error, dequantized = own[name].error, own[name].dequantized_error
        assert error is not None
        assert dequantized is not None
        assert dequantized / 2 < error < dequantized


def test_targets_are_judged_by_the_worst_number_of_rows() -> None:
    def result(contender: str, rows: int, microseconds: float | None, error: float = 0.0) -> Result:
        return Result(cuda_targets.SHAPE, rows, contender, microseconds, 8_000_000, error, 0.002)

    results = [result("nf4", 1, 10.0, 0.002), result("nf4", 4, 20.0, 0.004), result(cuda_contenders.TORCH, 1, 28.0)]
    results += [result("nf4", 64, None), result("nf4-dq", 1, 8.0), result(cuda_contenders.TORCH, 4, 60.0)]
    lines = cuda_targets.verdicts(results, 1e12)
    assert "| nf4 | 1 to 4 | copying | 0.80 | 0.40 | no |" in lines
    assert "| nf4-dq | 1 to 4 | copying | 0.80 | 1.00 | yes |" in lines
    assert f"| nf4 | 1 to 4 | {cuda_contenders.TORCH} | 2.80 | 2.80 | yes |" in lines
    assert "| nf4 | 64 | bitsandbytes nf4 | 3.00 | not measured |  |" in lines
    assert "| nf4 | 1 to 2048 | dequantizing | 0.99 | 0.50 | no |" in lines


def test_every_target_names_what_is_measured(library: ctypes.CDLL) -> None:
    kernels = native.Kernels(library, "emulation")
    names = {*cuda_contenders.contenders(kernels, None)}
    assert {name for target in cuda_targets.TARGETS for name in target.contenders} <= names
    assert {rows for target in cuda_targets.TARGETS for rows in target.rows} <= {*cuda_operators.ROWS}
    assert cuda_targets.SHAPE in cuda_operators.SHAPES


def test_a_wrong_product_ends_the_run(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda_contenders.four_bit

    def wrong(*arguments: object) -> cuda_contenders.Weight:
        weight = right(*arguments)  # type: ignore[arg-type]
        return dataclasses.replace(weight, multiply=lambda x: weight.multiply(x) * 1.02)

    monkeypatch.setattr(cuda_contenders, "four_bit", wrong)
    with pytest.raises(SystemExit, match=r"nf4 at 1 rows of 48x128 is wrong: \d.\d\d% from the product in float64"):
        measure(library)


def measure_attention(library: ctypes.CDLL, timer: Timer = once) -> list[Result]:
    kernels = native.Kernels(library, "emulation")
    cached = ((1, 20), (3, 33))
    return list(cuda_measuring.measure_attention(kernels, torch.device("cpu"), cached, 200_000, timer))


def test_attention_is_measured_beside_torchs(library: ctypes.CDLL) -> None:
    results = measure_attention(library)
    assert results[0].bytes == 2 * (20 * 8 * 128 * 2 + 32 * 128 * 2)
    assert results[1].bytes == 2 * (20 * 8 * (128 + 4) + 32 * 128 * 2)
    text = table([], results, 1e9)
    assert "| 1 x 20 | paged_attention | 10.0 | 983% | 10.0 | 1.00x |" in text
    assert "| 3 x 33 | paged_attention int8 | 10.0 |" in text
    assert "| 3 x 33 | paged_attention |  |  |  |  |" in table([], measure_attention(library, lambda calls: None), 1e9)


def test_wrong_attention_ends_the_run(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda_contenders.Cached.attend

    def wrong(*arguments: object) -> torch.Tensor:
        return right(*arguments) * 1.02  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_contenders.Cached, "attend", wrong)
    with pytest.raises(SystemExit, match=r"paged_attention at 1 x 20 is wrong: \d.\d\d% from attention in float64"):
        measure_attention(library)


def test_arguments() -> None:
    options = cuda_operators.parse(["--shapes", "8x64", "16x32", "--rows", "1", "7", "--no-build"])
    assert options.shapes == [(8, 64), (16, 32)]
    assert options.rows == [1, 7]
    assert options.no_build
    assert options.sanitize == []
    assert cuda_operators.parse([]).shapes[0] == (4096, 4096)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shapes", "4096"], "'4096' is no shape; accepted is NxK with positive numbers"),
        (["--shapes", "0x5"], "'0x5' is no shape"),
        (["--rows", "-1"], "'-1' is no number of rows"),
        (["--sanitize", "thread"], "invalid choice: 'thread' (choose from"),
        (["--rows", "0"], "'0' is no number of rows; accepted is a positive one"),
    ],
)
def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit):
        cuda_operators.parse(arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_refuses_with_a_sentence() -> None:
    done = conftest.run(sys.executable, "-m", "benchmarks.cuda_operators", "--rows", "1")
    assert done.returncode != 0
    assert done.stderr.strip().endswith("torch sees none here; without one, tests/emulation checks the kernels.")
