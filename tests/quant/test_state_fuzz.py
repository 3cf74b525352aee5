"""Arbitrary tensors under a packed weight's names: read and computed with, or refused in one sentence; nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import PackedWeight
from quant.errors import CheckpointError
from quant.state import NAMES_4BIT, NAMES_8BIT, Packed4bit, Packed8bit

NAMES = sorted({*NAMES_4BIT, *NAMES_8BIT})
DTYPES = (torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = st.sampled_from((0, 1, 2, 3, 4, 4, 8, 15, 16, 17, 32, 64, 255, 256, 257))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, up to three dimensions, contiguous or not, of arbitrary bytes; sometimes on meta or sparse."""
    shape = draw(st.lists(SIZES, max_size=3).filter(lambda sizes: torch.Size(sizes).numel() <= 4096))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(("plain", "plain", "plain", "strided", "meta", "sparse")))
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    seed = draw(st.integers(0, 2**31))
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        return raw.squeeze(-1) > 127
    tensor = raw.to(torch.uint8).view(dtype).squeeze(-1)
    if kind == "strided" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    return tensor.to_sparse() if kind == "sparse" and tensor.dim() and dtype == torch.float32 else tensor


def base(kind: str) -> dict[str, torch.Tensor]:
    if kind == "int8":
        return Packed8bit.quantize(torch.randn(4, 64)).to_checkpoint()
    return Packed4bit.quantize(torch.randn(4, 64), "nf4", double_quant=kind == "nf4-dq").to_checkpoint()


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
@settings(max_examples=100)
@given(
    changes=st.dictionaries(st.sampled_from(NAMES), tensors(), max_size=2),
    dropped=st.sets(st.sampled_from(NAMES), max_size=1),
)
def test_any_tensors_are_read_or_refused(kind: str, changes: dict[str, torch.Tensor], dropped: set[str]) -> None:
    given_tensors = {name: tensor for name, tensor in (base(kind) | changes).items() if name not in dropped}
    try:
        read = PackedWeight.from_checkpoint(given_tensors, name="model.q")
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert refusal.startswith("tensor model.q.")
        assert "\n" not in refusal
        return
    assert read.dequantize().shape == read.shape
    again = PackedWeight.from_checkpoint(read.to_checkpoint())
    assert torch.equal(again.dequantize().nan_to_num(), read.dequantize().nan_to_num())


def test_a_sparse_tensor_is_refused() -> None:
    tensors_given = base("nf4")
    tensors_given["weight.absmax"] = tensors_given["weight.absmax"].to_sparse()
    with pytest.raises(CheckpointError, match="absmax is not a plain tensor but torch.sparse_coo"):
        PackedWeight.from_checkpoint(tensors_given)
