"""The kernels written for one instruction set give the same bits as the ones that run anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant import formats

START = """
import hashlib, sys, torch
from quant import ops
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(int(sys.argv[1]))
digest = hashlib.sha256()
formats = sys.argv[2].split(",")

def update(*tensors):  # any NaN equals any NaN
    for tensor in tensors:
        is_nan = tensor != tensor
        digest.update(is_nan.numpy().tobytes())
        digest.update(tensor.masked_fill(is_nan, 0).view(-1).view(torch.uint8).numpy().tobytes())
"""
MATMULS = """
for quant_type in formats:
    for blocksize in (32, 64, 256):
        for N, K in ((4, 16), (5, 64), (33, 96), (8, 48), (64, 512), (7, 130), (12, 2048)):
            weight = torch.randn(N, K, generator=generator)
            packed, absmax = ops.quantize_4bit(weight, quant_type, blocksize)
            codes, nested, offset = ops.quantize_absmax(absmax, 256)
            for M in (1, 2, 3, 4, 5, 8, 9):
                x = torch.randn(M, K, generator=generator)
                for statistics in ((absmax,), (codes, nested, offset)):
                    first, *rest = statistics
                    out = ops.linear_4bit(x, packed, first, quant_type, blocksize, [N, K], *rest)
                    assert torch.isfinite(out).all()
                    update(out)
"""
CONVERSIONS = """
def convert(values, quant_type, blocksize):
    packed, absmax = ops.quantize_4bit(values, quant_type, blocksize)
    scales = ops.search_scales_4bit(values, quant_type, blocksize)
    update(packed, absmax, scales, ops.encode_4bit(values, scales, quant_type, blocksize))
    hostile = torch.randn(scales.shape, generator=generator)
    hostile[1::9], hostile[3::9], hostile[5::9], hostile[7::9] = torch.inf, torch.nan, 0.0, -1e-40
    update(ops.encode_4bit(values, hostile, quant_type, blocksize))
    codes = torch.randint(0, 256, packed.shape, generator=generator, dtype=torch.uint8)
    for maxima in (absmax, hostile):
        update(ops.dequantize_4bit(codes, maxima, quant_type, blocksize, values.shape, values.dtype))
    update(*ops.quantize_absmax(absmax[absmax.isfinite()], 100))

def convert_rows(values):
    CB, SCB = ops.quantize_8bit(values)
    update(CB, SCB, ops.dequantize_8bit(CB, SCB, values.dtype), ops.dequantize_8bit(CB, -SCB, values.dtype))

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for count in (31, 9001):
        values = torch.randn(count, generator=generator) * 10 ** torch.randn(count, generator=generator)
        values[64:96], values[96:128], values[300:301], values[800:801] = 0.0, values[96:128] * 1e-38, 1e9, torch.nan
        for quant_type in formats:
            for blocksize in (32, 64, 1024):
                convert(values.to(dtype), quant_type, blocksize)
        for columns in (1, 15, 31, 100, 1000):
            convert_rows(values[: count // columns * columns].view(-1, columns).to(dtype))
"""
LARGE = """# so large that results are written around the caches
packed = torch.randint(0, 256, (1 << 23,), generator=generator, dtype=torch.uint8)
absmax = torch.randn(1 << 18, generator=generator)
update(*(ops.dequantize_4bit(packed, absmax, "nf4", 64, [1 << 24], dtype) for dtype in (torch.float32, torch.bfloat16)))
CB, SCB = packed.view(torch.int8)[: 8200 * 1023].view(8200, 1023), absmax[:8200]
update(ops.dequantize_8bit(CB, SCB, torch.float32))
"""


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not CPUINFO.is_file() or "avx512f" not in CPUINFO.read_text(), reason="this CPU has no variant beside the baseline"
)
@pytest.mark.parametrize(
    "script",
    [pytest.param(MATMULS, id="matmuls"), pytest.param(CONVERSIONS, id="conversions"), pytest.param(LARGE, id="large")],
)
def test_the_avx512_kernels_equal_the_baseline_to_the_bit(script: str) -> None:
    seed = str(int.from_bytes(os.urandom(4), "little"))

    def digest(level: dict[str, str]) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "HALFBYTE_CPU_LEVEL"} | level
        program = START + script + "print(digest.hexdigest())"
        command = [sys.executable, "-c", program, seed, ",".join(formats.FOUR_BIT)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert digest({}) == digest({"HALFBYTE_CPU_LEVEL": "baseline"}), f"seed {seed}"
