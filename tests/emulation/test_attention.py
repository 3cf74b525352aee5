"""Attention and what stands around it on CUDA, emulated: the tests of every device, on fewer rows."""

from __future__ import annotations

import pytest
import torch

from tests.quant import test_paged_attention

# Collected here, they run with this directory's `device`.
from tests.quant.test_cache_write import (  # noqa: F401
    test_rows_are_rounded_to_the_caches_dtype,
    test_rows_go_to_their_slots_and_nowhere_else,
)
from tests.quant.test_native import no_reference_behind_the_back  # noqa: F401
from tests.quant.test_paged_attention import (  # noqa: F401
    test_a_row_is_the_same_however_the_work_is_cut,
    test_a_row_outside_of_the_cache_is_nan_where_tables_are_on_a_device,
    test_an_int8_head_without_a_scale_is_seen_by_those_who_see_it,
    test_large_scores_do_not_overflow,
    test_small_scales_lose_nothing_in_int8,
    test_what_is_not_finite_is_seen_by_those_who_see_it,
)

pytestmark = pytest.mark.timeout(600)  # the first of a session builds the library


@pytest.mark.parametrize(("heads", "dims"), [*test_paged_attention.SHAPES[:-1], ((40, 1), (16, 16))], ids=str)
@pytest.mark.parametrize("dtype", test_paged_attention.DTYPES, ids=str)
def test_kernel_agrees_with_float64(
    device: str, dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int], generator: torch.Generator
) -> None:
    """Around the borders of spans (256), of a warp's keys in one (64) and of blocks."""
    for which, (start, block_tokens) in enumerate([(255, 16), (511, 3), (100, 32), (63, 16), (7, 1), (530, 16)]):
        sequences = [(start, 1), (0, 2)]
        test_paged_attention.assert_near_float64(device, dtype, heads, dims, block_tokens, sequences, which, generator)


@pytest.mark.parametrize(("heads", "dims"), [((8, 2), (64, 64)), ((8, 1), (80, 96)), ((10, 2), (7, 33))], ids=str)
@pytest.mark.parametrize(("dtype", "store"), test_paged_attention.OTHER_STORES, ids=str)
def test_a_cache_of_another_dtype_agrees_with_float64(
    device: str,
    dtype: torch.dtype,
    store: torch.dtype,
    heads: tuple[int, int],
    dims: tuple[int, int],
    generator: torch.Generator,
) -> None:
    """Codes on tensor cores, and everything else without; around the same borders."""
    for which, (start, block_tokens) in enumerate([(255, 16), (63, 3), (530, 16)]):
        sequences = [(start, 1), (0, 2)]
        test_paged_attention.assert_near_float64(
            device, dtype, heads, dims, block_tokens, sequences, 2 * which, generator, store
        )
