"""Attention and what stands around it on CUDA, emulated: the tests of every device, on fewer rows."""

from __future__ import annotations

import pytest
import torch

from tests.quant import test_paged_attention

# Collected here, they run with this directory's `device`.
from tests.quant.test_cache_write import test_rows_go_to_their_slots_and_nowhere_else  # noqa: F401
from tests.quant.test_native import no_reference_behind_the_back  # noqa: F401
from tests.quant.test_paged_attention import (  # noqa: F401
    test_a_row_is_the_same_however_the_work_is_cut,
    test_a_row_outside_of_the_cache_is_nan_where_tables_are_on_a_device,
    test_large_scores_do_not_overflow,
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
