"""Every instruction set level that this machine has: honest sums, equal bits from the 8-bit matmul and from attention,
and rows that do not depend on their company. Each level runs in a process of its own, since a process decides once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quant import native
from quant.errors import NativeError

LEVELS = native.levels(native.kernels("cpu").library)

CHECKS = """
import hashlib, itertools, sys, torch
from quant import formats, native, ops, reference
from tests.quant.operands import Paged, Weight4
level, seed = sys.argv[1], int(sys.argv[2])
assert native.kernels("cpu").level == level
generator = torch.Generator().manual_seed(seed)
shapes = ((4, 16), (5, 64), (33, 96), (8, 48), (70, 512), (7, 130), (12, 2048), (3, 4096), (9, 65), (37, 4480))
for quant_type, blocksize, nested in itertools.product(formats.FOUR_BIT, (32, 64, 256), (None, 256)):
    for shape in shapes:
        weight = Weight4.random(shape, quant_type, blocksize, nested, generator)
        dense = weight.dense().double()
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(19, shape[1], generator=generator).to(dtype)
            together = ops.linear_4bit(x, *weight.arguments())
            for rows in (1, 2, 3, 5, 6, 7, 8, 13):
                assert torch.equal(ops.linear_4bit(x[:rows], *weight.arguments()), together[:rows]), (shape, rows)
            exact = x.double() @ dense.t()
            size = x.double().abs() @ dense.abs().t()
            error = (together.double() - exact).abs()
            if dtype == torch.float32:
                assert (error <= 6e-7 * size).all(), (shape, float((error / size).max()))
            else:  # no further than dequantizing to bfloat16 with float32 sums
                baseline = (x.float() @ weight.dense(dtype).float().t()).to(dtype).double()
                allowed = (baseline - exact).abs() + exact.abs() * torch.finfo(dtype).eps + 1e-6 * size
                assert (error <= allowed).all(), shape
for shape, dtype in itertools.product(((5, 64), (33, 250), (12, 2048)), (torch.float32, torch.bfloat16)):
    CB = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    SCB = torch.rand(shape[0], generator=generator)
    x = torch.randn(9, shape[1], generator=generator).to(dtype)
    dense = CB.double() * SCB.double()[:, None] / 127
    out = ops.linear_8bit(x, CB, SCB, 0.0, "all").double()
    exact, size = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    assert ((out - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 6e-7 * size).all(), shape
    for rows in (1, 2, 4, 7):
        assert torch.equal(ops.linear_8bit(x[:rows], CB, SCB, 0.0, "all").double(), out[:rows])
digest = hashlib.sha256()
shapes8 = ((1, 1), (7, 33), (33, 250), (70, 512), (3, 70000))
for shape, rows, dtype in itertools.product(shapes8, (1, 3, 9), (torch.float32, torch.bfloat16)):
    CB = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    SCB = torch.rand(shape[0], generator=generator)
    x = (torch.randn(rows, shape[1], generator=generator) * 3).to(dtype)
    for threshold, outliers in itertools.product((0.0, 6.0, 0.5), ("value", "batch")):
        out = ops.linear_8bit(x, CB, SCB, threshold, outliers)
        if shape[1] < 1000:
            assert torch.equal(out, reference.linear_8bit(x, CB, SCB, threshold, outliers)), (shape, threshold)
        digest.update(out.float().numpy().tobytes())
for dtype in formats.VALUE_DTYPES:
    for heads, dims in (((4, 4), (16, 32)), ((8, 1), (80, 96)), ((6, 2), (7, 33)), ((4, 1), (128, 128))):
        for options in ((0.3, 0, 0.0), (0.2, 70, 0.0), (0.2, 0, 4.0)):
            paged = Paged.random([(0, 90), (520, 7), (64, 1)], heads, dims, 16, dtype, generator)
            sinks = torch.randn(heads[0], generator=generator)
            out = ops.paged_attention(*paged.arguments(), *options, sinks)
            assert torch.isfinite(out).all()
            digest.update(out.view(torch.uint8).numpy().tobytes())
print("digest", digest.hexdigest())
"""


def run_at(level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {native.LEVEL_VARIABLE: level}
    command = [sys.executable, "-c", CHECKS, level, *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)


def test_every_level_is_right_and_exact_results_agree() -> None:
    seed = str(int.from_bytes(os.urandom(4), "little"))
    digests = {}
    for level in LEVELS:
        result = run_at(level, seed)
        assert result.returncode == 0, f"level {level}, seed {seed}: {result.stderr}"
        digests[level] = result.stdout
    assert len(set(digests.values())) == 1, f"seed {seed}: {digests}"


@pytest.mark.skipif(native.LEVEL_VARIABLE in os.environ, reason=f"{native.LEVEL_VARIABLE} is set")
def test_a_wide_level_runs_where_nothing_else_is_asked_for() -> None:
    assert native.kernels("cpu").level in LEVELS[-2:]


@pytest.mark.parametrize("level", ["none", "", "avx1024"])
def test_an_unknown_level_is_refused_with_what_is_accepted(level: str) -> None:
    result = run_at(level, "0")
    assert NativeError.__name__ in result.stderr
    assert re.search(
        rf"HALFBYTE_CPU_LEVEL is '{level}'; accepted on this machine are {', '.join(LEVELS)}", result.stderr
    )
