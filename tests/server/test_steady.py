"""torch's own products and activations inside Steady: a row has its bits whatever the rows beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from server.model.steady import ROWS, Steady, UnsteadyError

MOST = 3 * ROWS + 1


@pytest.fixture(scope="module", params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many as an engine may have; shares of three are not of whole vectors."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def check(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, cuts: list[int]) -> None:
    """The rows of x at once are those of x in pieces, and what torch gives is near."""
    with Steady():
        whole = function(x)
        pieces = [function(piece) for piece in torch.tensor_split(x, cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    torch.testing.assert_close(whole, function(x), rtol=2**-6, atol=2**-6)


sizes = st.sampled_from([1, 8, 60, 64, 96, 320, 1000])
cuts_of_rows = st.lists(st.integers(1, MOST - 1), max_size=6, unique=True).map(sorted)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.mark.usefixtures("threads")
@given(rows=st.integers(1, MOST), N=sizes, K=sizes, dtype=dtypes, cuts=cuts_of_rows, has_bias=st.booleans())
@settings(max_examples=60)
def test_products_by_any_cut(rows: int, N: int, K: int, dtype: torch.dtype, cuts: list[int], has_bias: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, K, dtype=dtype), torch.randn(N, K, dtype=dtype) / K**0.5
    bias = torch.randn(N, dtype=dtype) if has_bias else None
    cuts = [cut for cut in cuts if cut < rows]
    check(lambda some: F.linear(some, weight, bias), x, cuts)
    check(lambda some: F.linear(some[None], weight, bias)[0], x, cuts)
    check(lambda some: some @ weight.T, x, cuts)
    one = Conv1D(N, K).to(dtype)
    check(one, x, cuts)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("width", [4096, 1000, 33])
def test_activations_by_any_cut(function: Callable[[torch.Tensor], torch.Tensor], width: int) -> None:
    """Also of rows that lie in wider ones, as the two halves of a gated product do."""
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.randn(37, 2 * width, dtype=dtype)
        for x in (wide[:, :width].contiguous(), wide[:, width:]):
            check(function, x, list(range(1, 37)))
            check(function, x, [5, 21])


def test_rotary_angles_are_products_without_a_sum() -> None:
    a, b = torch.randn(1, 8, 1), torch.randn(1, 1, 5)
    with Steady():
        assert torch.equal(a @ b, a * b)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.bmm(x, x),
        lambda x: x @ x,
        lambda x: torch.einsum("bij,bjk->bik", x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x),
    ],
)
def test_what_is_not_known_is_refused(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 3, 3)
    assert call(x).shape == x.shape
    with Steady(), pytest.raises(UnsteadyError):
        call(x)
