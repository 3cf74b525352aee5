"""Attention over a paged KV cache, plugged into transformers' models.

On a CPU the whole batch is one call of quant's paged attention, and on CUDA a batch of single rows is; the plain-torch
version below serves prompts on CUDA, other devices and a cache whose dtype that kernel does not know.

transformers calls `attention` in every layer of a model set to ATTENTION_NAME, and hands it whatever the forward call
got under CONTEXT_ARGUMENT. No mask function is registered under that name, so transformers builds no mask; causality
and windows are ours. A batch is packed: all sequences' tokens in one row, `[1, T]`.

    T packed tokens      | chunk of s1 | s2 | s3 |         segments: which rows, from which position on
    per layer store      [blocks, block_tokens, kv_heads, head_dim], in the model's dtype or another, or in int8 with a
                         scale for each token and head beside it (quant/kv.py)
    write                row t -> slot = block * block_tokens + place      (one index_copy for the whole batch)
    read                 per sequence: its blocks in order, cut to its length; nothing beyond is ever read
    tables               all sequences' blocks, [S, widest], made once per batch and used by every layer; where nothing
                         is traced or differentiated, in a call past torch's dispatcher, with the same bits

This file chooses no batches and owns no queue; runner.py fills the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from quant import direct_rows, formats, kv, native, ops
from quant.direct import WORKSPACE, is_direct
from quant.direct_attention import DirectAttention
from server.records import KV_BLOCK_TOKENS

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
class LayerShape:
    """What one layer stores per token, as a probe forward saw it."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    """Of the store."""
    device: torch.device
    own_dtype: torch.dtype | None = None
    """What keys and values are computed in, where that is another."""

    @property
    def computed(self) -> torch.dtype:
        return self.own_dtype or self.dtype

    def stored_as(self, dtype: torch.dtype) -> LayerShape:
        """The same layer over a store of another dtype."""
        return replace(self, dtype=dtype, own_dtype=self.computed)


@dataclass(frozen=True, slots=True)
class Stores:
    """One layer's part of the cache."""

    keys: torch.Tensor  # [blocks, block_tokens, kv_heads, key_dim]
    values: torch.Tensor  # [blocks, block_tokens, kv_heads, value_dim]
    scales: torch.Tensor | None  # float32 [blocks, block_tokens, kv_heads, 2] where the others are int8
    computed: torch.dtype
    """What the layer computes keys and values in."""

    @classmethod
    def empty(cls, layer: LayerShape, blocks: int, block_tokens: int) -> Stores:
        """Zeros."""
        heads = (blocks, block_tokens, layer.kv_heads)
        keys, values = (
            torch.zeros(*heads, dim, dtype=layer.dtype, device=layer.device) for dim in (layer.key_dim, layer.value_dim)
        )
        has_scales = layer.dtype == torch.int8
        scales = torch.zeros(*heads, 2, device=layer.device) if has_scales else None
        return cls(keys, values, scales, layer.computed)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values] if self.scales is None else [self.keys, self.values, self.scales]

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Rows [T, kv_heads, key_dim] and [.., value_dim] to their slots, int64 [T], rounded to the stores' dtype."""
        for which, rows in enumerate((key, value)):
            if self.scales is not None:
                rows, scales = kv.quantize_heads(rows)
                self.scales.view(-1, *self.scales.shape[2:])[slots, :, which] = scales
            store = self.tensors[which]
            store.view(-1, *store.shape[2:]).index_copy_(0, slots, rows.to(store.dtype))


class PagedCache:
    """Keys and values of every layer, and in int8 their scales: what a block holds, it holds in all of them."""

    def __init__(self, layers: Sequence[LayerShape], blocks: int, block_tokens: int = KV_BLOCK_TOKENS) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.layers = [Stores.empty(layer, blocks, block_tokens) for layer in layers]
        self.is_direct = all(store.is_cpu and has_kernels(store.dtype) for store in self.tensors)
        """Whether the CPU's kernels read and write all of it."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for stores in self.layers for tensor in stores.tensors]


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether quant's kernels know a cache of this dtype; float64, which tests use, has plain torch."""
    return dtype in formats.STORE_DTYPES


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


@dataclass(frozen=True, slots=True)
class _Tables:
    """A batch's segments as the kernel takes them, int64."""

    blocks: torch.Tensor  # [S, widest], -1 where a sequence has none
    offsets: torch.Tensor  # [S + 1]
    starts: torch.Tensor  # [S]

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> _Tables:
        widest = max(len(segment.blocks) for segment in segments)
        blocks = torch.full((len(segments), widest), -1, device=device)  # where theirs are: nothing is waited for
        for row, segment in zip(blocks, segments, strict=True):
            row[: len(segment.blocks)] = segment.blocks
        offsets = torch.tensor([segment.row for segment in segments] + [segments[-1].row + segments[-1].rows])
        starts = torch.tensor([segment.start for segment in segments])
        return cls(blocks, offsets.to(device), starts.to(device))


@dataclass(slots=True)
class PagedBatch:
    """The context of one forward call. Layers are told apart by the order of their calls."""

    cache: PagedCache
    slots: torch.Tensor
    """Where each row's key and value go, int64 [T]: block * block_tokens + place."""
    segments: list[Segment]
    """In packed order, together all rows."""
    calls: int = 0
    _tables: dict[torch.device, _Tables] = field(default_factory=dict)
    _direct: DirectAttention | None = None
    _prepared: dict[tuple[object, ...], Any] = field(default_factory=dict)
    checked_angles: object = None
    """Position embeddings that a fused layer has found to be as it needs them; they serve all layers."""
    last: tuple[object, torch.Tensor] | None = None
    """The last fused layer that computed, and what it gave."""
    computed: Sequence[object] = ()
    """Fused layers whose turn is yet to come and that were computed with the last one, in their order."""
    _masks: dict[tuple[int, int | None, torch.device], torch.Tensor] = field(default_factory=dict)

    def attend(self, call: Call) -> torch.Tensor:
        stores = self.next_stores()
        device = stores.keys.device
        slots = self.slots if self.slots.device == device else self.slots.to(device)
        on_cuda = _has_cuda_kernels(call, stores)
        key, value = call.key.transpose(0, 1), call.value.transpose(0, 1)
        if is_direct(call.key) and self.is_direct(call.key.dtype):
            direct_rows.cache_write(key, value, stores.keys, stores.values, slots, stores.scales)
        elif on_cuda and key.stride(2) == value.stride(2) == 1:
            ops.cache_write(key, value, stores.keys, stores.values, slots, stores.scales)
        else:
            stores.write(slots, key, value)
        on_cpu = device.type == "cpu" and has_kernels(stores.keys.dtype) and call.query.dtype in formats.VALUE_DTYPES
        if on_cpu or (on_cuda and all(segment.rows == 1 for segment in self.segments)):
            return self.attend_at_once(call, stores)
        return self.attend_in_torch(call, stores)

    def next_stores(self) -> Stores:
        """Those of the layer whose turn it is."""
        stores = self.cache.layers[self.calls]
        self.calls += 1
        return stores

    def is_direct(self, dtype: torch.dtype) -> bool:
        """Whether layers that compute in `dtype` may use `direct_arguments` and the stores' addresses."""
        return self.cache.is_direct and dtype in formats.VALUE_DTYPES

    def attend_in_torch(self, call: Call, stores: Stores) -> torch.Tensor:
        """Sequence by sequence, over one layer's stores as they are now."""
        outputs = [self._attend_segment(call, index, stores) for index in range(len(self.segments))]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_at_once(self, call: Call, stores: Stores) -> torch.Tensor:
        """All sequences in one call of quant's kernel; the same."""
        query = call.query.transpose(0, 1)
        options = (call.scale, call.window or 0, call.softcap or 0.0, call.sinks, stores.scales)
        if is_direct(query):
            return self._direct_call()(query, stores.keys, stores.values, *options)
        tables = self._own_tables(stores.keys.device)
        return ops.paged_attention(
            query,
            stores.keys,
            stores.values,
            tables.blocks,
            tables.offsets,
            tables.starts,
            *options,
        )

    def direct_arguments(
        self,
        query: torch.Tensor,
        stores: Stores,
        out: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Any:
        """The struct of the kernel's call: query [T, H, D], a layer's stores, out [T, H, E].

        Layers of one shape that compute in the same memory share it, with the first one's stores.
        """
        keys, values = stores.keys, stores.values
        shapes = (query.shape, keys.shape, values.shape, keys.dtype)
        key = (query.data_ptr(), out.data_ptr(), *shapes, scale, window, softcap)
        args = self._prepared.get(key)
        if args is None:
            direct = self._direct_call()
            options = (scale, window or 0, softcap or 0.0, None, stores.scales)
            shared = direct.arguments_for(query, keys, values, out, *options)
            args = self._prepared[key] = type(shared).from_buffer_copy(shared)
        call = args.call
        call.workspace = WORKSPACE.at_least(call.workspace_bytes)
        return args

    def _direct_call(self) -> DirectAttention:
        if self._direct is None:
            tables = self._own_tables(torch.device("cpu"))
            self._direct = DirectAttention(tables.blocks, tables.offsets, tables.starts)
        return self._direct

    def _own_tables(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            self._tables[device] = _Tables.of(self.segments, device)
        return self._tables[device]

    def _attend_segment(self, call: Call, index: int, stores: Stores) -> torch.Tensor:
        segment = self.segments[index]
        first = 0 if call.window is None else max(0, segment.start - call.window + 1)  # nothing before it is seen
        key, value = (self._gather(stores, which, segment, first, call.query.dtype) for which in (0, 1))
        query = call.query[:, segment.row : segment.row + segment.rows]
        mask = self._mask(index, first, call.window, key.device)
        if call.softcap is not None or call.sinks is not None:
            return attend_plainly(query, key, value, mask, call)
        return _attend_fused(query, key, value, mask, call.scale)

    def _gather(self, stores: Stores, which: int, segment: Segment, first: int, dtype: torch.dtype) -> torch.Tensor:
        """Keys (0) or values (1) of positions first .. segment.end of a sequence: [heads, length, dim] in `dtype`."""
        size = self.cache.block_tokens
        store = stores.tensors[which]
        blocks = segment.blocks[first // size : -(-segment.end // size)].to(store.device)
        skipped = first // size * size

        def found(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, blocks).flatten(0, 1)[first - skipped : segment.end - skipped]

        if stores.scales is None:
            return found(store).to(dtype).transpose(0, 1)
        return kv.dequantize_heads(found(store), found(stores.scales)[..., which], dtype).transpose(0, 1)

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


def _has_cuda_kernels(call: Call, stores: Stores) -> bool:
    """Whether these rows and stores are on CUDA, in a dtype that quant's kernels take, and the kernels are there."""
    if stores.keys.device.type != "cuda" or not has_kernels(stores.keys.dtype):
        return False
    has_one_dtype = call.query.dtype == call.key.dtype == call.value.dtype
    return has_one_dtype and call.query.dtype in formats.VALUE_DTYPES and native.unavailable_because("cuda") is None


def _attend_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """torch's fused attention: [H, n, D], [G, L, D], [G, L, E] -> [n, H, E]."""
    heads, rows, _ = query.shape
    if rows == 1:  # heads that share keys become rows of one: no key is copied per head
        grouped = query.reshape(key.shape[0], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(grouped[None], key[None], value[None], scale=scale)
        return out.reshape(1, heads, -1)
    grouped_heads = heads != key.shape[0]
    out = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=scale, enable_gqa=grouped_heads
    )
    return out[0].transpose(0, 1)


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: Call
) -> torch.Tensor:
    """The same spelled out, with soft cap and sinks; the softmax in float32. Same shapes as the fused one."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (query @ key.transpose(1, 2)).float() * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return (weights.to(value.dtype) @ value).transpose(0, 1)
