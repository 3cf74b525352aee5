"""Batches with prompts on CUDA: single rows by quant's kernel, prompts by torch's varlen_attn.

That function runs on a GPU alone. Here its place is taken by its documentation, spelled out, so that what is gathered
and how it is cut are compared with float64; what it accepts is asked of the real one, with tensors that have no values;
and with a GPU the real one computes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from quant import native
from server.model import attention, prompts
from server.model.attention import Call, PagedBatch, Segment
from server.model.paged_cache import LayerShape, PagedCache
from tests.server.test_attention import BLOCK, BLOCKS, Sequences, settings_of


class Documented:
    """What torch documents of varlen_attn, one sequence at a time in float64."""

    def __init__(self) -> None:
        self.sequences: list[int] = []
        """Of each call."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: varlen.AuxRequest | None,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        left, right = window_size
        assert right == 0
        assert query.is_contiguous()
        assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        assert (len(query), len(key)) == (int(cu_seq_q[-1]), int(cu_seq_k[-1]))
        assert enable_gqa
        self.sequences.append(len(cu_seq_q) - 1)
        groups = query.shape[1] // key.shape[1]
        outputs, logarithms = [], []
        ends = zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True)
        for rows, tokens in ends:
            q = query[slice(*rows)].double().transpose(0, 1)
            k, v = (t[slice(*tokens)].double().repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
            last = torch.arange(len(q[0]))[:, None] + len(k[0]) - len(q[0])
            column = torch.arange(len(k[0]))
            seen = (column <= last) & ((column >= last - left) if left >= 0 else True)
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
            outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
            logarithms.append(scores.logsumexp(-1).float())
        out = torch.cat(outputs)
        return out if return_aux is None else (out, torch.cat(logarithms, dim=1))


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Documented:
    """A batch on the CPU goes the way of one on CUDA, in float32."""
    stand_in = Documented()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(prompts, "_GROUPED", {"enable_gqa": True})
    monkeypatch.setattr(prompts, "takes", lambda query, dim, softcap: softcap is None and query.shape[-1] == dim)
    monkeypatch.setattr(attention, "_has_cuda_kernels", lambda call, stores: True)
    return stand_in


@pytest.mark.parametrize("window", [None, 1, 4, 7], ids="window={}".format)
@pytest.mark.parametrize("extra", [{}, {"s_aux": True}, {"softcap": 5.0}, {"scaling": 0.5}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim"), [(6, 2, 8, 8), (4, 1, 12, 8)])
def test_prompts_and_single_rows_agree_with_the_reference(
    documented: Documented,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    extra: dict[str, object],
    window: int | None,
) -> None:
    settings = settings_of(extra, window, heads)
    sequences = Sequences([20, 12, 9, 17], heads, kv_heads, key_dim, value_dim, torch.float32)
    sequences.step([(0, 0, 5), (1, 0, 9)], **settings)
    sequences.step([(1, 9, 10), (0, 5, 11), (3, 0, 17), (2, 0, 1)], **settings)
    sequences.step([(0, 11, 20), (1, 10, 11), (2, 1, 9)], **settings)
    is_taken = key_dim == value_dim and "softcap" not in extra
    assert documented.sequences == ([2, 2, 1, 1] if is_taken else [])


def test_prompts_are_gathered_in_lists_of_a_bounded_length(
    documented: Documented, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a prompt that is longer goes alone. Two layers share the lists."""
    monkeypatch.setattr(prompts, "MOST_GATHERED", 16)
    sequences = Sequences([20, 12, 4, 17], 4, 2, 8, 8, torch.float32)
    sequences.step([(0, 0, 20), (1, 0, 12), (2, 0, 4), (3, 0, 2)])
    assert documented.sequences == [1, 2, 1]
    made: list[object] = []
    of = prompts.Lengths.of
    monkeypatch.setattr(prompts.Lengths, "of", lambda *a: (made.append(a), of(*a))[1])
    cache = PagedCache([LayerShape(2, 8, 8, torch.float32, torch.device("cpu"))] * 3, BLOCKS, BLOCK)
    batch = PagedBatch(cache, torch.tensor([12, 13]), [Segment(0, 2, 0, torch.tensor([3]))])
    query, key, value = (torch.randn(heads, 2, 8) for heads in (4, 2, 2))
    for window in (None, None, 1):
        batch.attend(Call(query, key, value, 0.3, window, None, None))
    assert len(made) == 2


@pytest.mark.parametrize("store", [torch.int8, torch.bfloat16], ids=str)
def test_a_cache_of_another_dtype_is_gathered_in_the_querys(documented: Documented, store: torch.dtype) -> None:
    cache = PagedCache([LayerShape(2, 8, 8, store, torch.device("cpu"))], BLOCKS, BLOCK)
    segments = [Segment(0, 1, 5, torch.tensor([7, 2])), Segment(1, 6, 0, torch.tensor([3, 5]))]
    query, key, value = (torch.randn(heads, 7, 8) for heads in (4, 2, 2))
    batch = PagedBatch(cache, torch.tensor([9, 12, 13, 14, 15, 20, 21]), segments)
    call = Call(query, key, value, 0.3, None, None, None)
    out = batch.attend(call)
    # Both read the same cache: what differs is float32's rounding of sums of some ten products of up to 10.
    torch.testing.assert_close(out, batch.attend_in_torch(call, cache.layers[0]), rtol=1e-5, atol=2e-5)
    assert documented.sequences == [1]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_torch_accepts_the_call(has_sinks: bool, window: int | None) -> None:
    """And answers in the shapes that are relied on: where they are not, sinks do not meet their heads."""
    rows, tokens, heads = 7, 20, 6
    lengths = prompts.Lengths.of([3, 4], [8, 12], torch.device("meta"))
    query, keys = (
        torch.empty(*shape, 64, dtype=torch.bfloat16, device="meta") for shape in ((rows, heads), (tokens, 2))
    )
    sinks = torch.empty(heads, device="meta") if has_sinks else None
    out = prompts.attend_many(query, keys, keys, lengths, 0.3, window, sinks)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim", "softcap", "taken"),
    [
        (torch.bfloat16, 128, 128, None, True),
        (torch.float16, 256, 256, None, True),
        (torch.bfloat16, 80, 80, None, True),
        (torch.float32, 128, 128, None, False),
        (torch.bfloat16, 264, 264, None, False),
        (torch.bfloat16, 36, 36, None, False),
        (torch.bfloat16, 192, 128, None, False),
        (torch.bfloat16, 128, 128, 50.0, False),
    ],
)
def test_what_goes_another_way(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dim: int, value_dim: int, softcap: float | None, taken: bool
) -> None:
    monkeypatch.setattr(prompts, "_has_flash", lambda device: device.type == "cuda")
    with FakeTensorMode():
        assert prompts.takes(torch.empty(4, 2, dim, dtype=dtype, device="cuda"), value_dim, softcap) == taken
    assert not prompts.takes(torch.empty(4, 2, dim, dtype=dtype), value_dim, softcap)


@pytest.mark.parametrize("store", [torch.bfloat16, torch.int8], ids=str)
def test_a_whole_batch_passes_every_check(monkeypatch: pytest.MonkeyPatch, store: torch.dtype) -> None:
    """Of our operators and torch's, with tensors that have no values."""
    monkeypatch.setattr(prompts, "takes", lambda *arguments: True)
    monkeypatch.setattr(attention, "_has_cuda_kernels", lambda call, stores: True)
    device = torch.device("meta")
    cache = PagedCache([LayerShape(2, 64, 64, store, device, torch.bfloat16)], BLOCKS, BLOCK)
    blocks = torch.zeros(2, dtype=torch.int64, device=device)
    segments = [Segment(0, 1, 5, blocks), Segment(1, 6, 1, blocks), Segment(7, 2, 3, blocks)]
    query, key, value = (torch.empty(heads, 9, 64, dtype=torch.bfloat16, device=device) for heads in (4, 2, 2))
    slots = torch.zeros(9, dtype=torch.int64, device=device)
    sinks = torch.empty(4, dtype=torch.bfloat16, device=device)
    out = PagedBatch(cache, slots, segments).attend(Call(query, key, value, 0.3, 4, None, sinks))
    assert (out.shape, out.dtype, out.device) == ((9, 4, 64), torch.bfloat16, device)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 1, 5], ids="window={}".format)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("store", [torch.bfloat16, torch.int8], ids=str)
def test_on_cuda_prompts_and_single_rows_are_near_torchs(
    monkeypatch: pytest.MonkeyPatch, window: int | None, has_sinks: bool, store: torch.dtype
) -> None:
    """Both round weights, results and, with sinks, results once more to bfloat16, by 2^-9 of values of up to 5: six
    roundings at most."""
    device = torch.device("cuda")
    if (reason := native.unavailable_because("cuda")) is not None:
        pytest.skip(reason)
    called: list[str] = []
    for name in ("attend_at_once", "attend_prompts"):
        method = getattr(PagedBatch, name)
        monkeypatch.setattr(PagedBatch, name, lambda *a, n=name, m=method: (called.append(n), m(*a))[1])
    cache = PagedCache([LayerShape(2, 64, 64, store, device, torch.bfloat16)], BLOCKS, BLOCK)
    for tensor in cache.tensors:
        if tensor.dtype == torch.int8:
            tensor.copy_(torch.randint(-9, 10, tensor.shape))
        else:
            tensor.copy_(torch.rand(tensor.shape) / 2)  # values, or scales of those
    query, key, value = (torch.randn(heads, 9, 64, device=device).to(torch.bfloat16) for heads in (4, 2, 2))
    sinks: Any = torch.randn(4, device=device) if has_sinks else None
    call = Call(query, key, value, 0.1, window, None, sinks)
    tables = [torch.tensor(blocks, device=device) for blocks in ([3, 8], [0, 1], [9, 4])]
    segments = [Segment(0, 1, 5, tables[0]), Segment(1, 6, 1, tables[1]), Segment(7, 2, 3, tables[2])]
    slots = torch.tensor([33, 1, 2, 3, 4, 5, 6, 39, 16], device=device)
    batch = PagedBatch(cache, slots, segments)
    out = batch.attend(call)
    torch.testing.assert_close(out, batch.attend_in_torch(call, cache.layers[0]), rtol=0, atol=6 * 2**-9 * 5)
    assert called == ["attend_at_once", "attend_prompts"]
