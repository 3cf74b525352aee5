"""Every instruction set level that this machine has: honest sums, equal bits from everything but float sums, and
rows that do not depend on their company. A process decides once for a level: each has its own, which runs all scripts.

AMX, which few machines have, runs on emulated tiles too (tests/csrc/CMakeLists.txt says what is emulated)."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quant import native
from quant.errors import NativeError
from tests.csrc.test_ctest import _build

LEVELS = native.levels(native.kernels("cpu").library)

PROGRAM = """
import hashlib, itertools, json, pathlib, sys, torch, traceback
from quant import formats, native, ops, reference
from tests.quant.operands import Paged, Weight4
level, seed, scripts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
if len(sys.argv) > 4:
    native.library_path = lambda device_type: pathlib.Path(sys.argv[4])
assert native.kernels("cpu").level == level

def update(*tensors):  # any NaN equals any NaN
    for tensor in tensors:
        is_nan = tensor != tensor
        digest.update(is_nan.numpy().tobytes())
        digest.update(tensor.masked_fill(is_nan, 0).view(-1).view(torch.uint8).numpy().tobytes())

results = {}
for title, script in scripts.items():
    generator, digest = torch.Generator().manual_seed(seed), hashlib.sha256()
    native.set_batch_invariant(False)
    try:
        exec(compile(script, title, "exec"))
        results[title] = ["right", digest.hexdigest()]
    except Exception:
        results[title] = ["wrong", traceback.format_exc()]
print(json.dumps(results))
"""
MATMULS = """
shapes = ((4, 16), (5, 64), (33, 96), (8, 48), (70, 512), (7, 130), (12, 2048), (3, 4096), (9, 65), (37, 4480))
for quant_type, blocksize, nested in itertools.product(formats.FOUR_BIT, (32, 64, 256), (None, 256)):
    for shape in shapes:
        weight = Weight4.random(shape, quant_type, blocksize, nested, generator)
        dense = weight.dense().double()
        for dtype, invariant in itertools.product((torch.float32, torch.bfloat16), (True, False)):
            native.set_batch_invariant(invariant)
            x = torch.randn(19, shape[1], generator=generator).to(dtype)
            few, some, together = (ops.linear_4bit(x[:rows], *weight.arguments()) for rows in (3, 12, 19))
            by_rows = not invariant and dtype == torch.bfloat16
            if level != "avx512_bf16" or not by_rows:
                assert torch.equal(some, together[:12]), shape
            for rows in (1, 2, 3, 5, 6, 7, 8, 12, 13, 17):
                expected = (few if rows <= 3 else some if rows <= 12 else together) if by_rows else together
                assert torch.equal(ops.linear_4bit(x[:rows], *weight.arguments()), expected[:rows]), (shape, rows)
            rounded = ops.linear_4bit_int8(x, *weight.arguments())
            update(rounded)
            assert torch.equal(ops.linear_4bit_int8(x[:4], *weight.arguments()), rounded[:4]), shape
            exact = x.double() @ dense.t()
            size = x.double().abs() @ dense.abs().t()
            if dtype == torch.float32:
                error = (together.double() - exact).abs()
                assert (error <= 6e-7 * size).all(), (shape, float((error / size).max()))
            else:  # no further than dequantizing to bfloat16 with float32 sums
                eps, baseline = torch.finfo(dtype).eps, (x.float() @ weight.dense(dtype).float().t()).to(dtype).double()
                allowed = (baseline - exact).abs() + torch.maximum(exact.abs(), baseline.abs()) * eps + 1e-6 * size
                if level == "avx2":  # a table in fixed point is off by less, but not where dequantizing is by chance
                    allowed += 2**-12 * size
                assert ((some.double() - exact[:12]).abs() <= allowed[:12]).all(), shape
                # A table that is rounded once, lifted, is off by less than a quarter of a last bit on average; others
                # are rounded after scaling, as dequantizing does.
                for found in (few.double(), together.double()):
                    count = len(found)
                    rounded = torch.maximum(exact[:count].abs(), found.abs())
                    scaled = rounded * eps + 2**-9 * size[:count]
                    assert ((found - exact[:count]).abs() <= torch.maximum(scaled, allowed[:count])).all(), shape
for shape, dtype in itertools.product(((5, 64), (33, 250), (70, 260), (12, 2048)), (torch.float32, torch.bfloat16)):
    CB = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    SCB = torch.rand(shape[0], generator=generator)
    x = torch.randn(26, shape[1], generator=generator).to(dtype)
    dense = CB.double() * SCB.double()[:, None] / 127
    out = ops.linear_8bit(x, CB, SCB, 0.0, "all").double()
    exact, size = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    small = 2**-16 if level == "avx2" and dtype == torch.bfloat16 else 6e-7  # what fixed point takes off small x
    assert ((out - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + small * size).all(), shape
    for invariant in (True, False):
        native.set_batch_invariant(invariant)
        few, some, together = (ops.linear_8bit(rows, CB, SCB, 0.0, "all") for rows in (x[:3], x[:16], x))
        for rows in (1, 3, 4, 16, 17, 24):
            own = few if rows <= 3 else some if rows <= 16 else together
            expected = together if invariant or dtype == torch.float32 else own
            assert torch.equal(ops.linear_8bit(x[:rows], CB, SCB, 0.0, "all"), expected[:rows]), (shape, rows)
shapes8 = ((1, 1), (7, 33), (33, 250), (70, 512), (3, 70000))
for shape, rows, dtype in itertools.product(shapes8, (1, 3, 9), (torch.float32, torch.bfloat16)):
    CB = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    SCB = torch.rand(shape[0], generator=generator)
    x = (torch.randn(rows, shape[1], generator=generator) * 3).to(dtype)
    for threshold, outliers in itertools.product((0.0, 6.0, 0.5), ("value", "batch")):
        out = ops.linear_8bit(x, CB, SCB, threshold, outliers)
        if shape[1] < 1000:
            assert torch.equal(out, reference.linear_8bit(x, CB, SCB, threshold, outliers)), (shape, threshold)
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
        for quant_type in formats.FOUR_BIT:
            for blocksize in (32, 64, 1024):
                convert(values.to(dtype), quant_type, blocksize)
        for columns in (1, 15, 31, 100, 1000):
            convert_rows(values[: count // columns * columns].view(-1, columns).to(dtype))
"""
ATTENTION = """
for dtype in (torch.float32, torch.float16):
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": max(eps, 1e-5), "atol": max(2 * eps, 2e-5)}
    for heads, dims in (((4, 4), (16, 32)), ((8, 1), (80, 96)), ((6, 2), (7, 33)), ((4, 1), (128, 128))):
        for window, softcap in ((0, 0.0), (70, 0.0), (0, 4.0)):
            options = (dims[0] ** -0.5, window, softcap, torch.randn(heads[0], generator=generator))
            for store in (dtype, *formats.STORE_DTYPES):
                paged = Paged.random([(0, 90), (520, 7), (64, 1)], heads, dims, 16, dtype, generator, store)
                out = ops.paged_attention(*paged.arguments(), *options, paged.scales)
                torch.testing.assert_close(out.double(), paged.exact(*options), **tolerance)
                update(out)
"""
ATTENTION_ON_TILES = ATTENTION.replace("(torch.float32, torch.float16)", "(torch.bfloat16,)")
SMALL = """
for dtype in formats.VALUE_DTYPES:
    for rows, size in ((1, 2), (3, 34), (5, 1030)):
        x, other = (torch.randn(rows, size, generator=generator).to(dtype) for _ in range(2))
        update(ops.rms_norm(x, other[0], 1e-6), ops.swiglu(x * 4, other), ops.argmax(x))
        query, key = (torch.randn(rows, heads, size, generator=generator).to(dtype) for heads in (3, 1))
        update(*ops.rotary(query, key, x, other))
        for store in formats.STORE_DTYPES:
            keys, values = (torch.zeros(2, 4, 1, size, dtype=store) for _ in range(2))
            scales = torch.zeros(2, 4, 1, 2) if store == torch.int8 else None
            slots = torch.randperm(8, generator=generator)[:rows]
            ops.cache_write(key, key * 3, keys, values, slots, scales)
            update(keys, values, *(() if scales is None else (scales,)))
"""
LARGE = """# so large that results are written around the caches
packed = torch.randint(0, 256, (1 << 23,), generator=generator, dtype=torch.uint8)
absmax = torch.randn(1 << 18, generator=generator)
update(*(ops.dequantize_4bit(packed, absmax, "nf4", 64, [1 << 24], dtype) for dtype in (torch.float32, torch.bfloat16)))
CB, SCB = packed.view(torch.int8)[: 8200 * 1023].view(8200, 1023), absmax[:8200]
update(ops.dequantize_8bit(CB, SCB, torch.float32))
"""
SCRIPTS = {
    "matmuls": MATMULS,
    "conversions": CONVERSIONS,
    "attention": ATTENTION,
    "attention on tiles": ATTENTION_ON_TILES,
    "small": SMALL,
    "large": LARGE,
}


ASKS_FOR_KERNELS = 'from quant import native; native.kernels("cpu")'
STACK_TOO_SMALL_FOR_TILES = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
room = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, len(room))), None) == 0
from quant import native
library = native.kernels("cpu").library
print(native.kernels("cpu").level, *native.levels(library))
"""


def run_at(level: str, scripts: dict[str, str], seed: str, *library: str) -> dict[str, str]:
    """What each script's results hash to; where it finds them wrong, or the process does, the test fails."""
    result = run_alone(PROGRAM, {native.LEVEL_VARIABLE: level}, level, seed, json.dumps(scripts), *library)
    where = f"level {level}, seed {seed}, {' '.join(library)}"
    assert result.returncode == 0, f"{where}: {result.stderr}"
    return {name: f"{verdict}, {what}" for name, (verdict, what) in json.loads(result.stdout).items()}


def run_alone(program: str, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, at the level that `variables` name or else at the best one."""
    environment = {name: value for name, value in os.environ.items() if name != native.LEVEL_VARIABLE} | variables
    command = [sys.executable, "-c", program, *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)


def a_seed() -> str:
    return str(int.from_bytes(os.urandom(4), "little"))


def all_right(digests: dict[str, str], seed: str) -> None:
    for where, digest in digests.items():
        assert digest.startswith("right"), f"{where}, seed {seed}: {digest}"


@pytest.fixture(scope="module")
def seed() -> str:
    return a_seed()


@pytest.fixture(scope="module")
def at_every_level(seed: str) -> dict[str, dict[str, str]]:
    """By level, then by script."""
    return {level: run_at(level, SCRIPTS, seed) for level in LEVELS}


@pytest.mark.timeout(900)  # the first waits for five processes of a minute, on a machine that others may use
@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.startswith("attention")])
def test_every_level_is_right_and_exact_results_agree(
    at_every_level: dict[str, dict[str, str]], seed: str, script: str
) -> None:
    digests = {level: found[script] for level, found in at_every_level.items()}
    all_right(digests, seed)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", ["attention", "attention on tiles"])
def test_attention_is_right_at_every_level_and_agrees_where_sums_are_fused(
    at_every_level: dict[str, dict[str, str]], seed: str, script: str
) -> None:
    digests = {level: found[script] for level, found in at_every_level.items()}
    all_right(digests, seed)
    others = [digests.pop("baseline")]  # it cannot fuse
    if script == "attention on tiles" and "amx" in digests:
        others.append(digests.pop("amx"))  # its instruction has an order of its own
    assert len(set(digests.values())) <= 1, digests
    if digests:  # on x86: else another level's code has run
        assert len({*others, *digests.values()}) == len(others) + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="AMX is of x86-64")
def test_amx_on_emulated_tiles_is_right_and_its_exact_results_agree(tmp_path: Path) -> None:
    options = ("-DHALFBYTE_CUDA=OFF", "-DBUILD_TESTING=ON", "-DHALFBYTE_EMULATED_LIBRARIES=ON")
    directory = _build(tmp_path, *options) / "tests"
    seed, matmuls = a_seed(), {"matmuls": MATMULS}
    digests = {LEVELS[0]: run_at(LEVELS[0], matmuls, seed)["matmuls"]}
    # Trapping runs the shipped code, whose vectors are AVX-512's; where there are tiles, nothing traps, and it has run.
    for emulation in ("emulated", "trapped") if LEVELS[-1] == "avx512_bf16" else ("emulated",):
        library = str(directory / f"libhalfbyte_cpu_{emulation}.so")
        digests[emulation] = run_at("amx", matmuls, seed, library)["matmuls"]
    all_right(digests, seed)
    assert len(set(digests.values())) == 1, f"seed {seed}: {digests}"


@pytest.mark.skipif(native.LEVEL_VARIABLE in os.environ, reason=f"{native.LEVEL_VARIABLE} is set")
def test_a_wide_level_runs_where_nothing_else_is_asked_for() -> None:
    assert native.kernels("cpu").level in LEVELS[-2:]


@pytest.mark.parametrize("level", ["", "avx1024"])
def test_an_unknown_level_is_refused_with_what_is_accepted(level: str) -> None:
    result = run_alone(ASKS_FOR_KERNELS, {native.LEVEL_VARIABLE: level})
    assert NativeError.__name__ in result.stderr
    assert re.search(
        rf"HALFBYTE_CPU_LEVEL is '{level}'; accepted on this machine are {', '.join(LEVELS)}", result.stderr
    )


@pytest.mark.skipif("amx" not in LEVELS, reason="needs a processor with AMX")
def test_a_process_that_may_not_use_tiles_does_without() -> None:
    """Linux permits them to none with a thread whose stack for signals could not hold them."""
    forced = run_alone(STACK_TOO_SMALL_FOR_TILES, {native.LEVEL_VARIABLE: "amx"})
    assert f"is 'amx'; accepted on this machine are {', '.join(LEVELS[:-1])}." in forced.stderr
    free = run_alone(STACK_TOO_SMALL_FOR_TILES, {})
    level, *levels = free.stdout.split()
    assert levels == LEVELS[:-1], free.stderr
    assert level in ("avx512", "avx512_bf16")
