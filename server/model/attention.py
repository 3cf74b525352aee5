"""Attention over a paged KV cache, plugged into transformers' models.

On a CPU the whole batch is one call of quant's paged attention. On CUDA single rows that follow each other are one, and
prompts that follow each other are gathered from their blocks for torch (prompts.py), which also serves other devices
and a cache whose dtype that kernel does not know.

transformers calls `attention` in every layer of a model set to ATTENTION_NAME, and hands it whatever the forward call
got under CONTEXT_ARGUMENT. No mask function is registered under that name, so transformers builds no mask; causality
and windows are ours. A batch is packed: all sequences' tokens in one row, `[1, T]`.

    T packed tokens      | chunk of s1 | s2 | s3 |         segments: which rows, from which position on
    per layer store      [blocks, block_tokens, kv_heads, head_dim], in the model's dtype or another, or in int8 with a
                         scale for each token and head beside it (quant/kv.py)
    write                row t -> slot = block * block_tokens + place      (one index_copy for the whole batch)
    read                 per sequence: its blocks in order, cut to its length and to what its window can see; nothing
                         beyond is ever read
    tables               all sequences' blocks, [S, widest], made once per batch and used by every layer; where nothing
                         is traced or differentiated, in a call past torch's dispatcher, with the same bits

This file chooses no batches and owns no queue; runner.py fills the context.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Final, Protocol, overload

import torch
from transformers import AttentionInterface

from quant import direct_rows, formats, native, ops
from quant.direct import is_direct
from quant.direct_attention import DirectAttention
from server.model import prompts
from server.model.paged_cache import PagedCache, Stores, gather_tokens, has_kernels
from server.model.transfer import on_device

ATTENTION_NAME: Final = "halfbyte"
CONTEXT_ARGUMENT: Final = "paged"
"""The keyword argument of the model's forward that reaches `attention` in every layer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's call, in the letters T tokens, H heads, G kv heads, D and E head sizes of keys and values."""

    query: torch.Tensor  # [H, T, D]
    key: torch.Tensor  # [G, T, D]
    value: torch.Tensor  # [G, T, E]
    scale: float
    window: int | None
    """Positions a token sees, itself included; None for all before it."""
    softcap: float | None
    sinks: torch.Tensor | None  # [H]: one more logit per head that takes its share of the softmax and gives nothing


class Context(Protocol):
    """What CONTEXT_ARGUMENT carries: a batch over the cache in service, a recorder while a model is being probed."""

    def attend(self, call: Call) -> torch.Tensor:
        """The layer's output, [T, H, E]."""
        ...


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, H, T, D], [1, G, T, D], [1, G, T, E] -> [1, T, H, E].

    Raises ValueError for what would change the result and isn't honoured here: a mask or a position bias of the
    model's own, a batch of more than one row, a forward call without our context.
    """
    context: Context | None = others.get(CONTEXT_ARGUMENT)
    if context is None:
        raise ValueError(f"{type(module).__name__} was not handed the batch's {CONTEXT_ARGUMENT!r} context")
    if attention_mask is not None or position_bias is not None:
        raise ValueError(f"{type(module).__name__} brings a mask or a position bias of its own")
    if not others.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f"{type(module).__name__} is not causal")
    if query.shape[0] != 1:
        raise ValueError(f"{type(module).__name__} has a batch of {query.shape[0]} rows; packed batches have one")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = Call(query[0], key[0], value[0], scale, sliding_window, softcap, s_aux)
    return context.attend(call)[None], None


def register() -> None:
    """Makes ATTENTION_NAME known to transformers; may be called again."""
    AttentionInterface.register(ATTENTION_NAME, attention)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's part of a packed batch."""

    row: int
    """First row in the packed batch."""
    rows: int
    start: int
    """Position of the first row in its sequence."""
    blocks: torch.Tensor
    """The sequence's cache blocks in order, int64 [n]; may be longer than needed."""

    @property
    def end(self) -> int:
        return self.start + self.rows

    def first_seen(self, window: int | None) -> int:
        """The first position that one of its rows sees."""
        return 0 if window is None else max(0, self.start - window + 1)


class Segments(Sequence[Segment]):
    """A batch's segments, made when somebody first asks: on a CPU, steps that decode go by tables, which a runner has
    without them.
    """

    def __init__(self, make: Callable[[], list[Segment]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> list[Segment]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> list[Segment]: ...

    def __getitem__(self, index: int | slice) -> Segment | list[Segment]:
        return self._made[index]

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._made)


@dataclass(frozen=True, slots=True)
class Tables:
    """A batch's sequences as the kernel takes them, int64."""

    blocks: torch.Tensor  # [S, widest]; what stands beyond a sequence's blocks is not read
    offsets: torch.Tensor  # [S + 1]
    starts: torch.Tensor  # [S]

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> Tables:
        widest = max(len(segment.blocks) for segment in segments)
        blocks = torch.full((len(segments), widest), -1, device=device)  # where theirs are: nothing is waited for
        for row, segment in zip(blocks, segments, strict=True):
            row[: len(segment.blocks)] = segment.blocks
        offsets = on_device([*(segment.row for segment in segments), segments[-1].row + segments[-1].rows], device)
        return cls(blocks, offsets, on_device([segment.start for segment in segments], device))


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Prompts that follow each other in a batch, as torch's attention takes them."""

    rows: slice
    tokens: torch.Tensor
    """Of the store, int64 [L]: what their rows see, one sequence behind the other."""
    lengths: prompts.Lengths


@dataclass(slots=True)
class PagedBatch:
    """The context of one forward call. Layers are told apart by the order of their calls."""

    cache: PagedCache
    slots: torch.Tensor
    """Where each row's key and value go, int64 [T]: block * block_tokens + place."""
    segments: Sequence[Segment]
    """In packed order, together all rows."""
    wanted: Sequence[int] | None = None
    """Rows with logits that somebody looks at, ascending, of each segment the last ones; None: all may have."""
    tables: Tables | None = None
    """Of the segments, where the slots are; made where none are given."""
    is_sealed: bool = False
    """Whether nobody changes a layer any more, nor what is done between two of them."""
    calls: int = 0
    _tables: dict[torch.device, Tables] = field(default_factory=dict)
    _direct: DirectAttention | None = None
    checked_angles: object = None
    """Position embeddings that a fused layer has found to be as it needs them; they serve all layers."""
    last: tuple[object, torch.Tensor] | None = None
    """The last fused layer that computed, and what it gave."""
    computed: Sequence[object] = ()
    """Fused layers whose turn is yet to come and that were computed with the last one, in their order."""
    _masks: dict[tuple[int, int | None, torch.device], torch.Tensor] = field(default_factory=dict)
    _gathered: dict[tuple[int | None, torch.device], list[_Gathered]] = field(default_factory=dict)
    _parts: list[tuple[slice, PagedBatch]] = field(default_factory=list)

    def attend(self, call: Call) -> torch.Tensor:
        (stores,) = self.next_stores()
        device = stores.keys.device
        slots = self.slots if self.slots.device == device else self.slots.to(device)
        on_cuda = _has_cuda_kernels(call, stores)
        if is_direct(call.key) and self.is_direct(call.key.dtype):
            key, value = call.key.transpose(0, 1), call.value.transpose(0, 1)
            direct_rows.cache_write(key, value, stores.keys, stores.values, slots, stores.scales)
        elif on_cuda:
            write_rows(call, stores, slots)
        else:
            stores.write(slots, call.key.transpose(0, 1), call.value.transpose(0, 1))
        on_cpu = device.type == "cpu" and has_kernels(stores.keys.dtype) and call.query.dtype in formats.VALUE_DTYPES
        if on_cuda:
            return self.attend_in_parts(call, stores)
        if on_cpu:
            return self.attend_at_once(call, stores)
        return self.attend_in_torch(call, stores)

    def next_stores(self, layers: int = 1) -> list[Stores]:
        """Those of as many layers whose turn it is."""
        stores = self.cache.layers[self.calls : self.calls + layers]
        self.calls += layers
        return stores

    def wanted_part(self) -> PagedBatch:
        """The batch with its wanted rows alone. They see what they saw; nothing of them is to be written again."""
        segments: list[Segment] = []
        wanted = self.wanted or ()
        for segment in self.segments:
            row, behind = (bisect_left(wanted, place) for place in (segment.row, segment.row + segment.rows))
            if behind > row:
                segments.append(replace(segment, row=row, rows=behind - row, start=segment.end - (behind - row)))
        return PagedBatch(self.cache, self.slots[:0], segments)

    def is_direct(self, dtype: torch.dtype) -> bool:
        """Whether layers that compute in `dtype` may use `direct_arguments` and the stores' addresses."""
        return self.cache.is_direct and dtype in formats.VALUE_DTYPES

    def attend_in_parts(self, call: Call, stores: Stores) -> torch.Tensor:
        """Single rows by quant's kernel, prompts by torch, each together as far as they follow each other."""
        if not self._parts:
            for _, found in groupby(self.segments, lambda segment: segment.rows == 1):
                segments = list(found)
                rows = slice(segments[0].row, segments[-1].row + segments[-1].rows)
                own = [replace(segment, row=segment.row - rows.start) for segment in segments]
                self._parts.append((rows, PagedBatch(self.cache, self.slots[rows], own)))
        outputs = []
        for rows, part in self._parts:
            own_call = replace(call, query=call.query[:, rows])
            is_single = part.segments[0].rows == 1
            outputs.append((part.attend_at_once if is_single else part.attend_prompts)(own_call, stores))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_prompts(self, call: Call, stores: Stores) -> torch.Tensor:
        """What all sequences see gathered, and one call of torch's attention for as many as may be gathered at once."""
        if not prompts.takes(call.query, call.value.shape[-1], call.softcap):
            return self.attend_in_torch(call, stores)
        query, dtype = call.query.transpose(0, 1), call.query.dtype
        outputs = []
        for part in self._gather_lists(call.window, stores.keys.device):
            key, value = (gather_tokens(stores, which, part.tokens, dtype) for which in (0, 1))
            options = (call.scale, call.window, call.sinks)
            outputs.append(prompts.attend_many(query[part.rows], key, value, part.lengths, *options))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_in_torch(self, call: Call, stores: Stores) -> torch.Tensor:
        """Sequence by sequence, over one layer's stores as they are now."""
        outputs = [self._attend_segment(call, index, stores) for index in range(len(self.segments))]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_at_once(self, call: Call, stores: Stores) -> torch.Tensor:
        """All sequences in one call of quant's kernel; the same."""
        query = call.query.transpose(0, 1)
        if is_direct(query):
            options = (call.scale, call.window or 0, call.softcap or 0.0, call.sinks, stores.scales)
            return self._direct_call()(query, stores.keys, stores.values, *options)
        return attend_by_tables(call, stores, self._own_tables(stores.keys.device))

    def direct_arguments(
        self,
        query: torch.Tensor,
        stores: Stores,
        out: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Any:
        """A struct of the kernel's call of its own: query [T, H, D], a layer's stores, out [T, H, E]. Its workspace is
        that of the moment, which a larger call replaces.
        """
        options = (scale, window or 0, softcap or 0.0, None, stores.scales)
        args = self._direct_call().arguments_for(query, stores.keys, stores.values, out, *options)
        return type(args).from_buffer_copy(args)

    def _direct_call(self) -> DirectAttention:
        if self._direct is None:
            tables = self._own_tables(torch.device("cpu"))
            self._direct = DirectAttention(tables.blocks, tables.offsets, tables.starts)
        return self._direct

    def _own_tables(self, device: torch.device) -> Tables:
        if self.tables is not None and self.slots.device == device:
            return self.tables
        if device not in self._tables:
            self._tables[device] = Tables.of(self.segments, device)
        return self._tables[device]

    def _attend_segment(self, call: Call, index: int, stores: Stores) -> torch.Tensor:
        segment = self.segments[index]
        first = segment.first_seen(call.window)
        tokens = self._tokens(segment, first, stores.keys.device)
        key, value = (gather_tokens(stores, which, tokens, call.query.dtype).transpose(0, 1) for which in (0, 1))
        query = call.query[:, segment.row : segment.row + segment.rows]
        mask = self._mask(index, first, call.window, key.device)
        if call.softcap is not None or call.sinks is not None:
            return prompts.attend_plainly(query, key, value, mask, call.scale, call.softcap, call.sinks)
        return prompts.attend_fused(query, key, value, mask, call.scale)

    def _tokens(self, segment: Segment, first: int, device: torch.device) -> torch.Tensor:
        """Where in a store positions first .. segment.end of a sequence are: block * block_tokens + place, int64."""
        size = self.cache.block_tokens
        blocks = segment.blocks[first // size : -(-segment.end // size)].to(device)
        skipped = first // size * size
        tokens = (blocks[:, None] * size + torch.arange(size, device=device)).flatten()
        return tokens[first - skipped : segment.end - skipped]

    def _gather_lists(self, window: int | None, device: torch.device) -> list[_Gathered]:
        """The batch's prompts in as few lists as prompts.MOST_GATHERED allows; made once for all layers of a window."""
        known = self._gathered.get((window, device))
        if known is not None:
            return known
        together: list[list[Segment]] = [[]]
        gathered = 0
        for segment in self.segments:
            seen = segment.end - segment.first_seen(window)
            if together[-1] and gathered + seen > prompts.MOST_GATHERED:
                together.append([])
                gathered = 0
            together[-1].append(segment)
            gathered += seen
        found = self._gathered[window, device] = [self._gather_list(part, window, device) for part in together]
        return found

    def _gather_list(self, segments: list[Segment], window: int | None, device: torch.device) -> _Gathered:
        firsts = [segment.first_seen(window) for segment in segments]
        tokens = [self._tokens(segment, first, device) for segment, first in zip(segments, firsts, strict=True)]
        lengths = prompts.Lengths.of([segment.rows for segment in segments], [len(part) for part in tokens], device)
        rows = slice(segments[0].row, segments[-1].row + segments[-1].rows)
        return _Gathered(rows, torch.cat(tokens), lengths)

    def _mask(self, index: int, first: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """What each row may see of positions first .. end: bool [rows, length], or None for everything."""
        segment = self.segments[index]
        if segment.rows == 1:
            return None
        known = self._masks.get((index, window, device))
        if known is None:
            rows = torch.arange(segment.start, segment.end, device=device)[:, None]
            columns = torch.arange(first, segment.end, device=device)
            known = columns <= rows
            if window is not None:
                known &= columns > rows - window
            self._masks[index, window, device] = known
        return known


def write_rows(call: Call, stores: Stores, slots: torch.Tensor) -> None:
    """A call's keys and values to their slots, int64 [T], by quant's operator, or torch where their heads have gaps."""
    key, value = call.key.transpose(0, 1), call.value.transpose(0, 1)
    if key.stride(2) == value.stride(2) == 1:
        ops.cache_write(key, value, stores.keys, stores.values, slots, stores.scales)
    else:
        stores.write(slots, key, value)


def attend_by_tables(call: Call, stores: Stores, tables: Tables) -> torch.Tensor:
    """A layer's attention by quant's operator: [T, H, E]."""
    return ops.paged_attention(
        call.query.transpose(0, 1),
        stores.keys,
        stores.values,
        tables.blocks,
        tables.offsets,
        tables.starts,
        call.scale,
        call.window or 0,
        call.softcap or 0.0,
        call.sinks,
        stores.scales,
    )


def _has_cuda_kernels(call: Call, stores: Stores) -> bool:
    """Whether these rows and stores are on CUDA, in a dtype that quant's kernels take, and the kernels are there."""
    if stores.keys.device.type != "cuda" or not has_kernels(stores.keys.dtype):
        return False
    has_one_dtype = call.query.dtype == call.key.dtype == call.value.dtype
    return has_one_dtype and call.query.dtype in formats.VALUE_DTYPES and native.unavailable_because("cuda") is None
