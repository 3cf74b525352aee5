"""The CUDA kernels, emulated, against the reference and float64: what tests/quant/test_native.py asks of any device."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch

from quant import native, ops
from quant.errors import NativeError
from tests.quant.operands import Experts4, Experts8, same_bits

# Collected here, they run with this directory's `device`.
from tests.quant.test_hopper import (  # noqa: F401
    either,
    hopper,
    test_hopper_row_is_the_same_in_every_batch,
    test_hopper_rows_are_the_same_however_the_work_is_cut,
    test_hopper_rows_are_the_same_in_every_panel,
    test_only_the_table_and_the_result_are_rounded,
    test_what_hopper_does_not_take_goes_the_other_way,
)
from tests.quant.test_linear_8bit_experts import (  # noqa: F401
    test_an_outlier_column_is_one_of_an_experts_rows_alone,
    test_linear_8bit_experts_have_the_bits_of_products_alone,
    test_linear_8bit_experts_of_nothing,
    test_linear_8bit_experts_read_operands_that_no_wide_copy_can_be_made_of,
    test_linear_8bit_experts_sums_beyond_int32_are_exact,
    test_linear_8bit_experts_without_rows_are_not_read,
)
from tests.quant.test_native import (  # noqa: F401
    no_reference_behind_the_back,
    test_4bit_codes_and_values_are_the_references,
    test_absmax_codes_and_values_are_the_references,
    test_codes_at_given_scales_are_the_references,
    test_every_16_bit_value_is_read_and_written_right,
    test_int8_codes_and_values_are_the_references,
    test_linear_4bit_experts_are_no_further_from_float64_than_dequantizing,
    test_linear_4bit_experts_have_the_bits_of_products_alone,
    test_linear_4bit_experts_of_nothing,
    test_linear_4bit_experts_without_rows_are_not_read,
    test_linear_4bit_is_no_further_from_float64_than_dequantizing,
    test_linear_4bit_of_nothing,
    test_linear_4bit_on_tensor_cores,
    test_linear_4bit_row_is_the_same_in_every_batch,
    test_linear_4bit_rows_are_the_same_however_the_work_is_cut,
    test_linear_8bit_in_tiles_of_every_size,
    test_linear_8bit_of_nothing,
    test_linear_8bit_rows_do_not_see_each_other,
    test_linear_8bit_sums_beyond_int32_are_exact,
    test_nan_and_infinity_stay_in_their_block,
    test_scales_that_are_found_are_the_references,
    test_weight_only_int8_in_tiles_of_every_size,
    test_weight_only_int8_is_no_further_from_float64_than_dequantizing,
    test_weight_only_int8_row_is_the_same_in_every_batch,
)
from tests.quant.test_rows import of_the_cpu, test_every_device_has_the_cpus_bits  # noqa: F401

pytestmark = pytest.mark.timeout(600)  # the first of a session builds the library


LINEAR4 = {
    "packed": torch.zeros(8 * 1088 // 2, dtype=torch.uint8),
    "absmax": torch.zeros(8 * 1088 // 64),
    "blocksize": 64,
}
ONE_EXPERT = {"E": 1, "ends": torch.ones(1, dtype=torch.int64)}
LINEAR8 = {"codes": torch.zeros(8 * 1088, dtype=torch.int8), "absmax": torch.zeros(8), "threshold": 1.0}


@pytest.mark.parametrize("shape", [(70, 64), (7, 33)])  # on tensor cores, and not
def test_experts_rows_that_end_where_they_cannot_stay_inside(
    device: str, shape: tuple[int, int], generator: torch.Generator
) -> None:
    """Nobody waits for a GPU to say what ends are; the worst that they can do is to give some rows wrong values."""
    x = torch.randn(20, shape[1], generator=generator).to(torch.bfloat16)
    experts = Experts4.random([9, 1, 10], 2, shape, "nf4", 64, 256, generator)
    right = experts.one_by_one(x, None, lambda rows, weight, _: ops.linear_4bit(rows, *weight.arguments()))  # type: ignore[arg-type]
    for ends in ([9, 2, 20], [-7, 2**62, 20], [2**63 - 1, -(2**63), 5], [30, 20, 10], [-1, -1, -1]):
        out = ops.linear_4bit_experts(x.to(device), torch.tensor(ends), *experts.arguments()[1:])
        assert out.shape == right.shape
        if ends[0] == 9:  # where experts agree about a row it is right
            assert same_bits(out[:2], right[:2])
            assert same_bits(out[10:], right[10:])


@pytest.mark.parametrize("outliers", ["batch", "all"])
def test_int8_experts_rows_that_end_where_they_cannot_stay_inside(
    device: str, outliers: str, generator: torch.Generator
) -> None:
    for dtype in (torch.float32, torch.float16):
        given = Experts8.random([9, 1, 10], (70, 64), 0, dtype, generator)
        right = given.multiply(device, 2.5, outliers)
        for ends in ([9, 2, 20], [-7, 2**62, 20], [2**63 - 1, -(2**63), 5], [30, 20, 10], [-1, -1, -1]):
            out = dataclasses.replace(given, ends=torch.tensor(ends)).multiply(device, 2.5, outliers)
            assert out.shape == right.shape
            if ends[0] == 9 and outliers == "all":  # where experts agree about a row it is right
                assert same_bits(out[:2], right[:2])
                assert same_bits(out[10:], right[10:])


@pytest.mark.parametrize(
    ("entry", "weight"),
    [
        ("hb_linear4", LINEAR4),
        *(("hb_linear8", {**LINEAR8, "outlier_rule": rule}) for rule in native.OUTLIER_CODES.values()),
        *(("hb_linear8_experts", {**LINEAR8, **ONE_EXPERT, "outlier_rule": rule}) for rule in (0, 1)),
    ],
)
def test_a_workspace_that_is_missing_or_small_is_refused(
    library: ctypes.CDLL, entry: str, weight: dict[str, object]
) -> None:
    """K is shared out among blocks at this shape, and their sums have to go somewhere. As much as asked for is enough:
    AddressSanitizer would see the first byte behind it."""
    kernels = native.Kernels(library, "emulation")
    run = getattr(library, entry)
    x, out = torch.ones(1, 1088, dtype=torch.bfloat16), torch.zeros(1, 8, dtype=torch.bfloat16)
    args = native.filled(entry, **weight, x=x, x_dtype=native.DTYPE_CODES[x.dtype], M=1, N=8, K=1088, out=out)
    args.call.threads = 1
    needed = kernels.workspace_bytes(entry, args)
    assert needed > 0
    with pytest.raises(NativeError, match="A pointer is null"):
        kernels.check_status(entry, run(ctypes.byref(args)))
    workspace = torch.full((needed,), 255, dtype=torch.uint8)
    args.call.workspace = workspace.data_ptr()
    args.call.workspace_bytes = needed - 1
    with pytest.raises(NativeError, match="The workspace is smaller"):
        kernels.check_status(entry, run(ctypes.byref(args)))
    args.call.workspace_bytes = needed
    kernels.check_status(entry, run(ctypes.byref(args)))
