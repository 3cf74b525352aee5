"""The tables: what they must satisfy by their definitions, and that C++ has the same ones."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch

from quant import formats, native, reference


def float32(value: float) -> float:
    """The value as a float32 holds it."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


C_TABLES: dict[str, tuple[float, ...]] = {
    "nf4": formats.NF4.table,
    "fp4": formats.FP4.table,
    "nf4_thresholds": formats.NF4.thresholds,
    "fp4_thresholds": formats.FP4.thresholds,
    "nf4_ranks": tuple(map(float, formats.NF4.code_of_rank)),
    "fp4_ranks": tuple(map(float, formats.FP4.code_of_rank)),
    "dynamic": formats.DYNAMIC_MAP,
    "dynamic_midpoints": tuple(formats.DYNAMIC_MIDPOINTS.tolist()),
    "nf4_int8": tuple(map(float, formats.NF4.int8_table)),
    "fp4_int8": tuple(map(float, formats.FP4.int8_table)),
    "int8_steps": (formats.NF4.int8_step, formats.FP4.int8_step),
}


@pytest.mark.parametrize("name", native.TABLE_CODES)
def test_cpp_has_the_same_table(name: str) -> None:
    found = native.kernels("cpu").table(name)
    assert found == [float32(value) for value in C_TABLES[name]]


def test_block_sizes_of_cpp_are_these() -> None:
    kernels = native.kernels("cpu")
    x = torch.randn(10000)
    for blocksize in formats.BLOCKSIZES:
        packed, absmax = kernels.quantize_4bit(x, "nf4", blocksize)
        assert packed.numel() == formats.packed_bytes(10000)
        assert absmax.numel() == formats.block_count(10000, blocksize)
    for blocksize in (formats.BLOCKSIZES[0] // 2, formats.BLOCKSIZES[-1] * 2):
        with pytest.raises(native.NativeError, match="block size"):
            kernels.quantize_4bit(x, "nf4", blocksize)


@pytest.mark.parametrize("quant_type", formats.FOUR_BIT)
def test_code_of_every_table_value_is_its_own(quant_type: str) -> None:
    """Ranking a table value gives back a code of that value, and ranks go up with values."""
    number_format = formats.FOUR_BIT[quant_type]
    values = number_format.table[:8] if number_format.signed_magnitude else number_format.table
    for value in values:
        rank = sum(value > threshold for threshold in number_format.thresholds)
        assert number_format.table[number_format.code_of_rank[rank]] == value
    ranked = [number_format.table[code] for code in number_format.code_of_rank]
    assert ranked == sorted(ranked)
    assert number_format.table[number_format.zero_code] == 0.0


@pytest.mark.parametrize("quant_type", formats.FOUR_BIT)
def test_thresholds_are_midpoints(quant_type: str) -> None:
    """FP4's are rounded decimals in the checkpoints' own kernels, NF4's exact float32 midpoints."""
    number_format = formats.FOUR_BIT[quant_type]
    ranked = [number_format.table[code] for code in number_format.code_of_rank]
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(ranked)]
    tolerance = 1e-6 if quant_type == "fp4" else 3e-8
    assert number_format.thresholds == pytest.approx(midpoints, abs=tolerance)


@pytest.mark.parametrize("quant_type", formats.FOUR_BIT)
def test_no_other_unit_rounds_the_table_better(quant_type: str) -> None:
    """Mean squared error over the codes of normal weights; what the sample cannot tell apart is within 1 %."""
    packed, _ = reference.quantize_4bit(torch.randn(1 << 20), quant_type, 64)
    shares = torch.bincount(torch.cat([packed >> 4, packed & 15]), minlength=16) / (1 << 20)
    table = torch.tensor(formats.FOUR_BIT[quant_type].table)
    errors = {
        unit: float((shares * ((table * unit).round() / unit - table).square()).sum())
        for unit in range(64, formats.INT8_MAX + 1)
    }
    own = formats.FOUR_BIT[quant_type].int8_unit
    assert errors[own] <= 1.01 * min(errors.values())
    assert errors[own] < 0.8 * errors[formats.INT8_MAX]
    assert max(map(abs, formats.FOUR_BIT[quant_type].int8_table)) == own


def test_nf4_is_made_of_normal_quantiles() -> None:
    """QLoRA's construction: 8 positive and 7 negative quantiles between 0.5 and 0.9677083, and zero, scaled to 1."""
    high = 0.9677083
    positive = torch.special.ndtri(torch.linspace(high, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -torch.special.ndtri(torch.linspace(high, 0.5, 8, dtype=torch.float64))[:-1]
    table = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    assert formats.NF4.table == pytest.approx((table / table.max()).tolist(), abs=2e-7)


def test_dynamic_map_is_the_recipe_of_the_checkpoints() -> None:
    """Seven decades of midpoints of equal steps; constants, since the last bit depends on the linspace."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        magnitudes = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += [*magnitudes, *(-m for m in magnitudes)]
    assert list(formats.DYNAMIC_MAP) == pytest.approx(sorted(values), rel=1e-6)
    assert list(formats.DYNAMIC_MAP) == sorted(formats.DYNAMIC_MAP)
    assert all(
        float32(value) == tensor
        for value, tensor in zip(formats.DYNAMIC_MAP, formats.DYNAMIC_TABLE.tolist(), strict=True)
    )


@pytest.mark.parametrize(("count", "bytes_", "blocks"), [(0, 0, 0), (1, 1, 1), (64, 32, 1), (65, 33, 2), (129, 65, 3)])
def test_sizes(count: int, bytes_: int, blocks: int) -> None:
    assert formats.packed_bytes(count) == bytes_
    assert formats.block_count(count, 64) == blocks
