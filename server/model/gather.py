"""transformers' cache classes over the paged cache: for one forward call, the pages of its rows, gathered side by side.

Models that never call our attention ask their cache for keys and values, [rows, heads, width, dim], and attend by
themselves. Here a row's tokens lie in the same pages as everywhere else; a layer writes the new ones there and hands
out a copy of all, the last ones in the last column:

    row 0   . . . . a b c d e|f      width: the longest row; past: width without the new tokens
    row 1   x y z z y x y z x|y      . is padding: a copy of the row's own first token, which the mask hides

The copies are one layer's, and gone when the next layer runs; transformers' DynamicCache copies as much when it joins
the new tokens to the old. Pages belong to the scheduler, and which rows share a call is cache_runner.py's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from quant import kv
from server.model.paged_cache import LayerShape, PagedCache, Stores
from server.model.transfer import on_device

Indices = npt.NDArray[np.int64]


class Span(NamedTuple):
    """What one row of a call reads and writes of its sequence; no position from `end` on is ever read."""

    blocks: Sequence[int]
    """The sequence's cache blocks in order."""
    first: int
    """The first position that is read."""
    start: int
    """The first that is written; those before it are there."""
    end: int


class Gather:
    """Where the rows of one call lie in the cache; all layers share it. Every row writes as many tokens, maybe none."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span], device: torch.device) -> None:
        self._cache = cache
        self.rows = len(spans)
        self.new = spans[0].end - spans[0].start
        lengths = np.array([span.end - span.first for span in spans])
        self.width = int(lengths.max())
        self.past = self.width - self.new
        places = np.stack([_slots(span, self.width, cache.block_tokens) for span in spans])
        self._slots = torch.from_numpy(places)  # [rows, width]
        self._indices: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._writes: dict[torch.device, torch.Tensor] = {}
        columns = np.arange(self.width)
        padding = self.width - lengths[:, None]
        self.mask: torch.Tensor | None = None
        """Which columns are tokens, int64 [rows, width]; None where all are."""
        if padding.any():
            self.mask = on_device((columns >= padding).astype(np.int64), device)
        self.positions = on_device(columns[self.past :] - padding, device)
        """Of the new tokens, counted from `first`, int64 [rows, new]."""

    def layers(self) -> Cache:
        """The cache to hand to the model in this call."""
        return Cache(layers=[GatheredLayer(self, stores) for stores in self._cache.layers])

    def write(self, stores: Stores, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts the new tokens, [rows, heads, new, dim], into a layer's pages."""
        device = stores.keys.device
        writes = self._writes.get(device)
        if writes is None:
            writes = on_device(self._slots[:, self.past :].flatten(), device)
            self._writes[device] = writes
        stores.write(writes, *(states.transpose(1, 2).flatten(0, 1) for states in (keys, values)))

    def read(self, stores: Stores, which: int) -> torch.Tensor:
        """A copy of all tokens' keys (0) or values (1) in a layer's pages, [rows, heads, width, dim], as computed."""
        store = stores.tensors[which]
        heads, dim = store.shape[2:]
        indices = self._indices.get((heads, store.device))
        if indices is None:
            per_head = self._slots[:, None, :] * heads + torch.arange(heads)[:, None]
            indices = on_device(per_head.flatten(), store.device)
            self._indices[heads, store.device] = indices
        found = store.view(-1, dim).index_select(0, indices)
        if stores.scales is None:
            found = found.to(stores.computed)
        else:
            scales = stores.scales.view(-1, 2).index_select(0, indices)[:, which]
            found = kv.dequantize_heads(found, scales, stores.computed)
        return found.view(self.rows, heads, self.width, dim)


class GatheredLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a cache that lives for one forward call."""

    def __init__(self, gather: Gather, stores: Stores) -> None:
        self.is_initialized = True  # all that the classes above set beside keys and values
        self._gather = gather
        self._stores = stores
        self._length = gather.past

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]  # elsewhere an attribute; cross-attention reads it
        """A copy of all tokens' keys, [rows, heads, width, dim]."""
        return self._gather.read(self._stores, 0)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        return self._gather.read(self._stores, 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in the new tokens' keys and values, [rows, heads, new, dim], and gives those of all tokens."""
        self._gather.write(self._stores, key_states, value_states)
        self._length = self._gather.width
        if self._gather.past == 0 and self._stores.keys.dtype == key_states.dtype:  # all that there is
            return key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0


def _slots(span: Span, width: int, block_tokens: int) -> Indices:
    """Slots of a row's tokens, in the last columns of `width`; before them stands the first one's."""
    positions = np.arange(span.end - width, span.end).clip(min=span.first)
    blocks: Indices = np.asarray(span.blocks, dtype=np.int64)
    slots: Indices = blocks[positions // block_tokens] * block_tokens + positions % block_tokens
    return slots


def cached_shapes(cache: DynamicCache, tokens: int) -> list[LayerShape]:
    """Per layer, what a cache that has seen a row of tokens keeps of each; empty where a layer keeps anything else."""
    layers: list[Any] = cache.layers
    if any(type(layer) is not DynamicLayer or layer.get_seq_length() != tokens for layer in layers):
        return []
    pairs = [(layer.keys, layer.values) for layer in layers]
    return [
        LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device) for keys, values in pairs
    ]
