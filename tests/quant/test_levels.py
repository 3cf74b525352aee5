"""The kernels written for one instruction set give the same bits as the ones that run anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant import formats

DIGEST = """
import hashlib, sys, torch
from quant import ops
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(int(sys.argv[1]))
digest = hashlib.sha256()
for quant_type in sys.argv[2].split(","):
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
                    digest.update(out.numpy().tobytes())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for blocksize in (32, 64, 1024):
            values = (torch.randn(9001, generator=generator) * torch.rand(9001, generator=generator)).to(dtype)
            values[64:96], values[96:128], values[300] = 0.0, values[96:128] * 1e-38, torch.inf
            scales = ops.search_scales_4bit(values, quant_type, blocksize)
            for statistics in (scales, ops.quantize_4bit(values, quant_type, blocksize)[1]):
                codes = ops.encode_4bit(values, statistics, quant_type, blocksize)
                digest.update(statistics.numpy().tobytes())
                digest.update(codes.numpy().tobytes())
print(digest.hexdigest())
"""


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not CPUINFO.is_file() or "avx512f" not in CPUINFO.read_text(), reason="this CPU has no variant beside the baseline"
)
def test_the_avx512_kernels_equal_the_baseline_to_the_bit() -> None:
    seed = str(int.from_bytes(os.urandom(4), "little"))

    def digest(level: dict[str, str]) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "HALFBYTE_CPU_LEVEL"} | level
        command = [sys.executable, "-c", DIGEST, seed, ",".join(formats.FOUR_BIT)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert digest({}) == digest({"HALFBYTE_CPU_LEVEL": "baseline"}), f"seed {seed}"
