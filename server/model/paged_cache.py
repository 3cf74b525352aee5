"""The paged KV cache: what each layer stores of a token, and where. Who writes and reads it: attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quant import formats, kv
from server.records import KV_BLOCK_TOKENS


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


def gather_tokens(stores: Stores, which: int, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys (0) or values (1) of some of a store's tokens: [L, heads, dim] in `dtype`."""

    def found(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(0, 1).index_select(0, tokens)

    rows = found(stores.tensors[which])
    if stores.scales is None:
        return rows.to(dtype)
    return kv.dequantize_heads(rows, found(stores.scales)[..., which], dtype)
