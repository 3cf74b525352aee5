"""The calls of decoder layers for a number of rows, laid out once: a layer as a chain, layers in a row as one call.

What a step brings (where its rows are, angles, slots, the attention's tables) is put into structs that stay; so little
else is done in a step because after a layer's weights nothing of Python is left in a processor's caches. Not here:
which layers these are, and whether they still are what they were (fuse_layer.py); the calls (quant/chain.py).
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quant import native
from quant.chain import Chain, Run
from quant.direct import WORKSPACE, Direct
from quant.errors import ShapeError
from server.model.attention import PagedBatch
from server.model.paged_cache import Stores

Angles = tuple[torch.Tensor, torch.Tensor]


class LayerChain:
    """One layer's calls for a number of rows: q, k, v, o, gate, up and down among them."""

    def __init__(self, layer: nn.Module, directs: tuple[Direct, ...], rows: int, dtype: torch.dtype) -> None:
        parts: Any = layer._modules
        attention, first, second = parts["self_attn"], parts["input_layernorm"], parts["post_attention_layernorm"]
        q, k, v, o, gate, up, down = directs
        options = attention.__dict__["_options"]
        self.options = (options.scale, options.window, options.softcap)
        self.head_dim, self.rows = attention.head_dim, rows
        self.calls = chain = Chain(rows, dtype)
        self._norm, x = chain.rms_norm(None, first.weight, first.variance_epsilon)
        query, key, value = chain.linear(x, [q, k, v])
        if "q_norm" in attention._modules:
            query, key = self._normed(attention.q_norm, query), self._normed(attention.k_norm, key)
        self.query, key = (rows_.view(rows, -1, self.head_dim) for rows_ in (query, key))
        value = value.view(rows, key.shape[1], -1)
        self._rotary = chain.rotary(self.query, key)
        self._write = chain.cache_write(key, value)
        self.attention, self.attended = chain.attention(self.query.shape[1], value.shape[2])
        self._first_sum, hidden = chain.add(None, *chain.linear(self.attended.flatten(1), [o]))
        _, x = chain.rms_norm(hidden, second.weight, second.variance_epsilon)
        (product,) = chain.linear(chain.swiglu(*chain.linear(x, [gate, up])), [down])
        self._last_sum, self.out = chain.add(hidden, product)
        chain.ready()
        self._heads = (key.shape[1:], value.shape[1:])
        self.stores: Stores | None = None
        self.addresses: tuple[int, int, int | None] = (0, 0, None)
        """Of the layer's keys, values and scales in the cache."""

    def _normed(self, norm: Any, heads: torch.Tensor) -> torch.Tensor:
        _, out = self.calls.rms_norm(heads.view(-1, self.head_dim), norm.weight, norm.variance_epsilon)
        return out.view(heads.shape)

    def hold(self, stores: Stores) -> None:
        """The layer's part of the cache from now on. Raises ShapeError where it does not fit."""
        keys, values, scales = stores.keys, stores.values, stores.scales
        if (keys.shape[2:], values.shape[2:]) != self._heads:
            raise ShapeError(
                f"the cache's keys and values have heads of {list(keys.shape[2:])} and {list(values.shape[2:])}; "
                f"{' and '.join(str(list(shape)) for shape in self._heads)} are needed"
            )
        self.stores = stores
        write = self._write
        write.keys, write.values, write.slot_count = keys.data_ptr(), values.data_ptr(), keys.shape[:2].numel()
        write.store_dtype = native.STORE_CODES[keys.dtype]
        write.scales = None if scales is None else scales.data_ptr()
        self.addresses = write.keys, write.values, write.scales

    def place(self, source: int, out: int) -> None:
        """From where to where rows go, by address."""
        self._norm.x = self._first_sum.a = source
        self._last_sum.out = out

    def point(self, cos: int, sin: int, slots: int) -> None:
        """To what a step brings for each row, by address."""
        self._rotary.cos, self._rotary.sin, self._write.slots = cos, sin, slots


class LayerRun:
    """Layers that follow each other in a model, as one call: between them, rows stay in the chains' buffers."""

    def __init__(self, chains: Sequence[LayerChain]) -> None:
        self.chains = list(chains)
        self._run = Run([chain.calls for chain in chains])
        self._between = chains[0].out.data_ptr()
        self._head_dims = {chain.head_dim for chain in chains}
        self._attention: list[Any] = []
        """Each layer's struct, and under the same index the first layer that has all of it but the cache in common."""
        self._alike: list[int] = []

    def __call__(self, hidden_states: torch.Tensor, angles: Angles, context: PagedBatch) -> torch.Tensor:
        """[1, rows, hidden] -> what the last layer gives. Raises ShapeError where cache or angles do not fit."""
        cos, sin = angles
        self._check(cos, sin, context.slots)
        out = torch.empty_like(hidden_states)
        stores = context.next_stores(len(self.chains))
        if not all(map(operator.is_, stores, [chain.stores for chain in self.chains])) or not self._attention:
            self._hold(stores)
        last = len(self.chains) - 1
        step = cos.data_ptr(), sin.data_ptr(), context.slots.data_ptr()
        shared = self._shared(stores, context)
        for i, (chain, args, first) in enumerate(zip(self.chains, self._attention, self._alike, strict=True)):
            source = hidden_states.data_ptr() if i == 0 else self._between
            chain.place(source, out.data_ptr() if i == last else self._between)
            chain.point(*step)
            ctypes.memmove(ctypes.byref(args), ctypes.byref(shared[first]), ctypes.sizeof(args))
            args.keys, args.values, args.scales = chain.addresses
        self._run()
        return out

    def _shared(self, stores: Sequence[Stores], context: PagedBatch) -> dict[int, Any]:
        """A step's structs of the layers that others are like; all in one workspace, which fits the largest."""
        shared = {}
        for first in set(self._alike):
            chain = self.chains[first]
            shared[first] = context.direct_arguments(chain.query, stores[first], chain.attended, *chain.options)
        workspace = WORKSPACE.at_least(max(args.call.workspace_bytes for args in shared.values()))
        for args in shared.values():
            args.call.workspace = workspace
        return shared

    def _check(self, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor) -> None:
        rows = self.chains[0].rows
        found = (cos.shape[2], sin.shape[2], slots.shape[0])
        for head_dim in self._head_dims:
            if found != (head_dim, head_dim, rows):
                raise ShapeError(
                    f"the angles have {found[:2]} values and there are {found[2]} slots; "
                    f"{head_dim} values and {rows} slots are needed"
                )

    def _hold(self, stores: Sequence[Stores]) -> None:
        """These parts of the cache from now on, one for each layer."""
        alike: dict[tuple[object, ...], int] = {}
        self._alike, self._attention = [], []
        for i, (chain, own) in enumerate(zip(self.chains, stores, strict=True)):
            chain.hold(own)
            shapes = (own.keys.shape, own.values.shape, own.keys.dtype)
            places = (chain.query.data_ptr(), chain.attended.data_ptr())
            self._alike.append(alike.setdefault((*shapes, *places, *chain.options), i))
            args = native.STRUCTS["hb_paged_attention"]()
            self._attention.append(args)
            self._run.set_step(i, chain.attention, args)
