"""Paged attention against attention spelled out in float64, with every block that must not be read full of NaN.

In float32 the compiled kernel answers, in float64 the plain-torch version that other devices use.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from quant import ops
from server.model.attention import Call, PagedBatch, Segment, Segments, Tables, attention
from server.model.paged_cache import LayerShape, PagedCache

BLOCK = 4
BLOCKS = 40


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence, one row and head at a time: [H, n, D], [G, L, D], [G, L, E] -> [n, H, E]; row i is at first + i."""
    heads, rows, _ = query.shape
    out = torch.zeros(rows, heads, value.shape[-1], dtype=torch.float64)
    for head in range(heads):
        shared = head * key.shape[0] // heads
        for row in range(rows):
            last = first + row
            begin = 0 if window is None else max(0, last - window + 1)
            scores = key[shared, begin : last + 1].double() @ query[head, row].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            powers = (scores - scores.max()).exp()
            total = powers.sum()
            if sinks is not None:
                total = total + (sinks[head].double() - scores.max()).exp()
            out[row, head] = (powers / total) @ value[shared, begin : last + 1].double()
    return out


def settings_of(extra: dict[str, object], window: int | None, heads: int) -> dict[str, object]:
    """What transformers hands to attention; `s_aux` becomes random sinks."""
    settings: dict[str, object] = {**extra, "sliding_window": window}
    if settings.get("s_aux"):
        settings["s_aux"] = torch.randn(heads)
    return settings


class Sequences:
    """Random sequences over a poisoned cache: each step takes the next rows of each and compares what comes out."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
    ) -> None:
        self.heads, self.lengths = heads, lengths
        shape = LayerShape(kv_heads, key_dim, value_dim, dtype, torch.device("cpu"))
        self.cache = PagedCache([shape], BLOCKS, BLOCK)
        for tensor in self.cache.tensors:
            tensor.fill_(float("nan"))
        free = random.sample(range(BLOCKS), BLOCKS)
        self.tables = [torch.tensor([free.pop() for _ in range(-(-length // BLOCK))]) for length in lengths]
        self.queries = [torch.randn(heads, length, key_dim, dtype=dtype) * 2 for length in lengths]
        self.keys = [torch.randn(kv_heads, length, key_dim, dtype=dtype) for length in lengths]
        self.values = [torch.randn(kv_heads, length, value_dim, dtype=dtype) for length in lengths]

    def step(self, parts: list[tuple[int, int, int]], **settings: object) -> None:
        """parts: (sequence, first position, one beyond the last) in packed order."""
        segments, slots, row = [], [], 0
        for which, first, end in parts:
            segments.append(Segment(row, end - first, first, self.tables[which]))
            slots += [int(self.tables[which][p // BLOCK]) * BLOCK + p % BLOCK for p in range(first, end)]
            row += end - first
        packed = [
            torch.cat([tensors[which][:, first:end] for which, first, end in parts], dim=1)
            for tensors in (self.queries, self.keys, self.values)
        ]
        out, _ = attention(
            torch.nn.Module(),
            *(tensor[None] for tensor in packed),
            None,
            paged=PagedBatch(self.cache, torch.tensor(slots), segments),
            **settings,
        )
        scale = settings.get("scaling") or self.queries[0].shape[-1] ** -0.5
        expected = [
            reference(
                self.queries[which][:, first:end],
                self.keys[which],
                self.values[which],
                first,
                float(scale),  # type: ignore[arg-type]
                settings.get("sliding_window"),  # type: ignore[arg-type]
                settings.get("softcap"),  # type: ignore[arg-type]
                settings.get("s_aux"),  # type: ignore[arg-type]
            )
            for which, first, end in parts
        ]
        assert out.shape[0] == 1
        # A float32 score's error is some eps times the sum of its products, up to 25 here, and a weight is wrong by
        # as much of itself: 1e-5 of values of up to 4. A key too many or too few is a thousand times that.
        torch.testing.assert_close(out[0].double(), torch.cat(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 4, 7], ids="window={}".format)
@pytest.mark.parametrize("extra", [{}, {"softcap": 5.0}, {"s_aux": True}, {"scaling": 0.5}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim"), [(4, 4, 8, 8), (6, 2, 8, 8), (4, 1, 12, 8)])
def test_chunks_and_decodes_agree_with_the_reference(
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    extra: dict[str, object],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    settings = settings_of(extra, window, heads)
    lengths = [random.randint(9, 25) for _ in range(3)]
    sequences = Sequences(lengths, heads, kv_heads, key_dim, value_dim, dtype)
    cut = random.randint(1, 7)
    sequences.step([(0, 0, cut), (1, 0, 8)], **settings)
    sequences.step([(1, 8, 9), (0, cut, 8), (2, 0, 1)], **settings)
    done = {0: 8, 1: 9, 2: 1}
    while parts := [(which, at, at + 1) for which, at in done.items() if at < lengths[which]]:
        random.shuffle(parts)
        sequences.step(parts, **settings)
        done = {which: min(at + 1, lengths[which]) for which, at in done.items()}


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float64, 0)], ids=str)
def test_the_kernel_answers_where_it_can(dtype: torch.dtype, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a whole batch, with tables that are made once for all layers."""
    tables = []
    kernel = ops.paged_attention

    def counted(*arguments: Any) -> torch.Tensor:
        tables.append(arguments[3])
        return kernel(*arguments)

    monkeypatch.setattr(ops, "paged_attention", counted)
    layers = [LayerShape(2, 8, 8, dtype, torch.device("cpu"))] * 3
    segments = [Segment(0, 2, 0, torch.tensor([3])), Segment(2, 1, 0, torch.tensor([9, 1]))]
    batch = PagedBatch(PagedCache(layers, BLOCKS, BLOCK), torch.tensor([12, 13, 36]), segments)
    query, key, value = (torch.randn(heads, 3, 8).to(dtype) for heads in (4, 2, 2))
    for _ in layers:
        assert batch.attend(Call(query, key, value, 0.3, None, None, None)).shape == (3, 4, 8)
    assert len(tables) == calls * len(layers)
    assert all(table is tables[0] for table in tables)


def test_a_kernel_with_tables_asks_for_no_segments() -> None:
    """Torch's attention asks for them, once for all layers."""
    made = []

    def make() -> list[Segment]:
        made.append([Segment(0, 2, 0, torch.tensor([3, -1])), Segment(2, 1, 0, torch.tensor([9, 1]))])
        return made[-1]

    tables = Tables(torch.tensor([[3, -1], [9, 1]]), torch.tensor([0, 2, 3]), torch.zeros(2, dtype=torch.int64))
    found = []
    for dtype, times in ((torch.float32, 0), (torch.float64, 1)):
        torch.manual_seed(5)
        query, key, value = (torch.randn(heads, 3, 8).to(dtype) for heads in (4, 2, 2))
        cache = PagedCache([LayerShape(2, 8, 8, dtype, torch.device("cpu"))] * 2, BLOCKS, BLOCK)
        batch = PagedBatch(cache, torch.tensor([12, 13, 36]), Segments(make), tables=tables)
        found += [batch.attend(Call(query, key, value, 0.3, None, None, None)).double() for _ in range(2)]
        assert len(made) == times
    torch.testing.assert_close(found[0], found[3], rtol=1e-5, atol=2e-5)


def test_a_row_is_the_same_whatever_its_neighbours_hold() -> None:
    shape = LayerShape(2, 8, 8, torch.float32, torch.device("cpu"))
    own = [torch.randn(heads, 6, 8) for heads in (4, 2, 2)]
    found = []
    for _ in range(2):
        cache = PagedCache([shape], BLOCKS, BLOCK)
        packed = [torch.cat([mine, torch.randn_like(mine)], dim=1) for mine in own]
        segments = [Segment(0, 6, 0, torch.tensor([3, 5])), Segment(6, 6, 0, torch.tensor([9, 1]))]
        slots = torch.tensor([12, 13, 14, 15, 20, 21, 36, 37, 38, 39, 4, 5])
        call = Call(packed[0], packed[1], packed[2], 0.3, None, None, None)
        found.append(PagedBatch(cache, slots, segments).attend(call)[:6])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "was not handed the batch's 'paged' context"),
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, "a mask or a position bias of its own"),
        ({"position_bias": torch.zeros(1, 1, 2, 2)}, "a mask or a position bias of its own"),
        ({"is_causal": False}, "is not causal"),
        ({"rows": 2}, "has a batch of 2 rows"),
    ],
    ids=["no context", "mask", "bias", "not causal", "rows"],
)
def test_what_is_not_honoured_is_refused(arguments: dict[str, object], words: str) -> None:
    qkv = [torch.zeros(int(arguments.get("rows", 1)), 1, 2, 4) for _ in range(3)]  # type: ignore[call-overload]
    context = {"paged": PagedBatch(PagedCache([], 1), torch.zeros(2), [])} if arguments else {}
    settings = {key: value for key, value in arguments.items() if key not in ("attention_mask", "rows")}
    with pytest.raises(ValueError, match=words):
        attention(torch.nn.Module(), *qkv, arguments.get("attention_mask"), **context, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_past_the_dispatcher_gives_the_same_bits(dtype: torch.dtype) -> None:
    cache = PagedCache([LayerShape(2, 8, 8, dtype, torch.device("cpu"))], BLOCKS, BLOCK)
    query, key, value = (torch.randn(heads, 3, 8, dtype=dtype) for heads in (4, 2, 2))
    call = Call(query, key, value, 0.3, None, None, torch.randn(4))
    segments = [Segment(0, 2, 0, torch.tensor([3])), Segment(2, 1, 0, torch.tensor([9, 1]))]
    found = []
    for mode in (torch.no_grad(), torch.enable_grad()):
        batch = PagedBatch(cache, torch.tensor([12, 13, 36]), segments)
        with mode:
            found.append(batch.attend(call))
        assert (batch._direct is None) == (mode.__class__ is torch.enable_grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("store", [torch.int8, torch.bfloat16, torch.float32], ids=str)
def test_kernel_and_torch_write_and_read_the_same_cache(store: torch.dtype) -> None:
    """In float32 the kernels, in float64 plain torch: codes and scales are equal, what is read differs by rounding."""
    query, key, value = (torch.randn(heads, 3, 8) for heads in (4, 2, 2))
    segments = [Segment(0, 2, 0, torch.tensor([3])), Segment(2, 1, 0, torch.tensor([9, 1]))]
    outputs, caches = [], []
    for dtype in (torch.float32, torch.float64):
        caches.append(PagedCache([LayerShape(2, 8, 8, store, torch.device("cpu"))], BLOCKS, BLOCK))
        call = Call(*(tensor.to(dtype) for tensor in (query, key, value)), 0.3, 2, None, None)
        outputs.append(PagedBatch(caches[-1], torch.tensor([12, 13, 36]), segments).attend(call))
    for ours, theirs in zip(*(cache.tensors for cache in caches), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-5, atol=2e-5)
