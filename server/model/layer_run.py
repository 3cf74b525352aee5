"""The calls of decoder layers for a number of rows, laid out once: a layer as two chains, layers in a row as one call.

What a step brings (where its rows are, angles, slots, the attention's tables) is put into structs that stay; so little
else is done in a step because after a layer's weights nothing of Python is left in a processor's caches.

    layer    FirstHalf: norm, q k v, rotary, cache write | SecondHalf: attention, o, sum, norm, gate up, down, sum

Nobody looks at all rows that a model's last layer gives, but at those whose logits are wanted. The keys and values of
the others are; so its first half is computed for all rows, and its second one for those that are wanted.

Not here: which layers these are, and whether they still are what they were (fuse_layer.py); which layer is the last
(last_layer.py); the calls (quant/chain.py).
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from quant import native
from quant.chain import Chain, Run
from quant.direct import WORKSPACE, Direct
from quant.errors import ShapeError
from server.model.attention import PagedBatch
from server.model.paged_cache import Stores

Angles = tuple[torch.Tensor, torch.Tensor]
_LINE: Final = 64
"""Bytes of a cache line."""


class FirstHalf:
    """A layer's calls up to its attention: q, k and v among them."""

    def __init__(self, layer: nn.Module, directs: Sequence[Direct], rows: int, dtype: torch.dtype) -> None:
        parts: Any = layer._modules
        attention, norm = parts["self_attn"], parts["input_layernorm"]
        self.head_dim = attention.head_dim
        self.calls = chain = Chain(rows, dtype)
        self._norm, x = chain.rms_norm(None, norm.weight, norm.variance_epsilon)
        query, key, value = chain.linear(x, directs)
        if "q_norm" in attention._modules:
            query, key = self._normed(attention.q_norm, query), self._normed(attention.k_norm, key)
        self.query, key = (rows_.view(rows, -1, self.head_dim) for rows_ in (query, key))
        value = value.view(rows, key.shape[1], -1)
        self._rotary = chain.rotary(self.query, key)
        self._write = chain.cache_write(key, value)
        chain.ready()
        self.heads = (key.shape[1:], value.shape[1:])

    def _normed(self, norm: Any, heads: torch.Tensor) -> torch.Tensor:
        _, out = self.calls.rms_norm(heads.view(-1, self.head_dim), norm.weight, norm.variance_epsilon)
        return out.view(heads.shape)

    def hold(self, stores: Stores) -> tuple[int, int, int | None]:
        """The cache's keys, values and scales from now on; their addresses."""
        keys, values, scales = stores.keys, stores.values, stores.scales
        write = self._write
        write.keys, write.values, write.slot_count = keys.data_ptr(), values.data_ptr(), keys.shape[:2].numel()
        write.store_dtype = native.STORE_CODES[keys.dtype]
        write.scales = None if scales is None else scales.data_ptr()
        return write.keys, write.values, write.scales

    def place(self, source: int) -> None:
        """From where rows come, by address."""
        self._norm.x = source

    def point(self, cos: int, sin: int, slots: int) -> None:
        """To what a step brings for each row, by address."""
        self._rotary.cos, self._rotary.sin, self._write.slots = cos, sin, slots


class SecondHalf:
    """A layer's calls from its attention on: o, gate, up and down among them."""

    def __init__(self, layer: nn.Module, directs: Sequence[Direct], rows: int, first: FirstHalf) -> None:
        """Of as many rows as `first` has, or of some of them."""
        parts: Any = layer._modules
        norm = parts["post_attention_layernorm"]
        o, gate, up, down = directs
        (_, value_size), heads = first.heads[1], first.query.shape[1]
        self.calls = chain = Chain(rows, first.calls.dtype, goes_on_from=first.calls)
        self.attention, self.attended = chain.attention(heads, value_size)
        self._first_sum, hidden = chain.add(None, *chain.linear(self.attended.flatten(1), [o]))
        _, x = chain.rms_norm(hidden, norm.weight, norm.variance_epsilon)
        (product,) = chain.linear(chain.swiglu(*chain.linear(x, [gate, up])), [down])
        self._last_sum, self.out = chain.add(hidden, product)
        chain.ready()

    def place(self, source: int) -> None:
        """From where the rows come that the layer was given, by address."""
        self._first_sum.a = source

    def place_out(self, out: int) -> None:
        """To where rows go."""
        self._last_sum.out = out


class LayerChain:
    """A layer's two halves for a number of rows; `directs` are its q, k, v, o, gate, up and down."""

    def __init__(self, layer: nn.Module, directs: tuple[Direct, ...], rows: int, dtype: torch.dtype) -> None:
        attention: Any = layer._modules["self_attn"]
        options = attention.__dict__["_options"]
        self.options = (options.scale, options.window, options.softcap)
        self.rows = rows
        self.first = FirstHalf(layer, directs[:3], rows, dtype)
        self.second = SecondHalf(layer, directs[3:], rows, self.first)
        self.stores: Stores | None = None
        self.addresses: tuple[int, int, int | None] = (0, 0, None)
        """Of the layer's keys, values and scales in the cache."""
        self.pointed: object = None
        """What its structs were last pointed to."""

    @property
    def out(self) -> torch.Tensor:
        return self.second.out

    def has_current_buffers(self) -> bool:
        """Whether chains that are made now hand on their rows where this one does."""
        return self.first.calls.has_current_buffers() and self.second.calls.has_current_buffers()

    def hold(self, stores: Stores) -> None:
        """The layer's part of the cache from now on. Raises ShapeError where it does not fit."""
        found = (stores.keys.shape[2:], stores.values.shape[2:])
        if found != self.first.heads:
            raise ShapeError(
                f"the cache's keys and values have heads of {list(found[0])} and {list(found[1])}; "
                f"{' and '.join(str(list(shape)) for shape in self.first.heads)} are needed"
            )
        self.stores = stores
        self.addresses = self.first.hold(stores)


class Ending:
    """The second half of a model's last layer, for some of a batch's rows."""

    def __init__(self, layer: nn.Module, directs: tuple[Direct, ...], rows: int, chain: LayerChain) -> None:
        """`chain` is the layer's for any number of rows."""
        self._half = SecondHalf(layer, directs[3:], rows, chain.first)
        self._run = Run([self._half.calls])
        self._options = chain.options

    def __call__(self, query: torch.Tensor, hidden: torch.Tensor, stores: Stores, part: PagedBatch) -> torch.Tensor:
        """The rows' queries [rows, H, D] and what the layer was given of them [rows, hidden] -> what it gives.

        Their keys and values, and those of all rows before them, are in the cache. `part` has these rows alone.
        """
        out = torch.empty_like(hidden)
        args = part.direct_arguments(query, stores, self._half.attended, *self._options)
        self._run.set_step(0, self._half.attention, args)
        self._half.place(hidden.data_ptr())
        self._half.place_out(out.data_ptr())
        self._run()
        return out


class LayerRun:
    """Layers that follow each other in a model, as one call: between them, rows stay in the chains' buffers."""

    def __init__(self, chains: Sequence[LayerChain]) -> None:
        self.chains = list(chains)
        self._run = Run([half.calls for chain in chains for half in (chain.first, chain.second)])
        self._between = chains[0].out
        self._head_dims = {chain.first.head_dim for chain in chains}
        self._attention: list[Any] = []
        """Each layer's struct, and under the same index the first layer that has all of it but the cache in common."""
        self._alike: list[int] = []
        self._pointed: list[object] = []
        """What the last step brought."""

    def __call__(self, hidden_states: torch.Tensor, angles: Angles, context: PagedBatch) -> torch.Tensor:
        """[1, rows, hidden] -> what the last layer gives. Raises ShapeError where cache or angles do not fit."""
        out = torch.empty_like(hidden_states)
        self._prepare(hidden_states, angles, context)
        self.chains[-1].second.place_out(out.data_ptr())
        self._run()
        return out

    def shortened(
        self,
        hidden_states: torch.Tensor,
        angles: Angles,
        context: PagedBatch,
        wanted: Sequence[int],
        ending: Ending | None,
    ) -> torch.Tensor:
        """The same of the rows that are wanted, by the ending for so many, and zeros in the others'."""
        out = torch.zeros_like(hidden_states)
        stores = self._prepare(hidden_states, angles, context)
        self._run(2 * len(self.chains) - 1)
        if ending is not None:
            rows = torch.tensor(wanted)
            given = hidden_states[0] if len(self.chains) == 1 else self._between
            query, hidden = self.chains[-1].first.query.index_select(0, rows), given.index_select(0, rows)
            out[0].index_copy_(0, rows, ending(query, hidden, stores[-1], context.wanted_part()))
        return out

    def _prepare(self, hidden_states: torch.Tensor, angles: Angles, context: PagedBatch) -> Sequence[Stores]:
        """Everything that a step brings, but where its last layer's rows go; the layers' parts of the cache."""
        cos, sin = angles
        self._check(cos, sin, context.slots)
        stores = context.next_stores(len(self.chains))
        if not all(map(operator.is_, stores, [chain.stores for chain in self.chains])) or not self._attention:
            self._hold(stores)
        shared, places = self._shared(stores, angles, context)
        slots = context.slots.data_ptr()
        brought = [*places, slots, *map(bytes, shared.values())]
        # In most steps it is where it was in the one before. Another run may have pointed the chains elsewhere since.
        if brought != self._pointed or not all(chain.pointed is self._pointed for chain in self.chains):
            self._pointed = brought
            self._point(*places, slots, shared)
        source = hidden_states.data_ptr()
        self.chains[0].first.place(source)
        self.chains[0].second.place(source)
        return stores

    def _point(self, cos: int, sin: int, slots: int, shared: dict[int, Any]) -> None:
        """All layers' structs to what a step brings, but where its rows come from."""
        between = self._between.data_ptr()
        for chain, args, first in zip(self.chains, self._attention, self._alike, strict=True):
            chain.first.place(between)
            chain.first.point(cos, sin, slots)
            chain.second.place(between)
            chain.second.place_out(between)
            ctypes.memmove(ctypes.byref(args), ctypes.byref(shared[first]), ctypes.sizeof(args))
            args.keys, args.values, args.scales = chain.addresses
            chain.pointed = self._pointed

    def _shared(
        self, stores: Sequence[Stores], angles: Angles, context: PagedBatch
    ) -> tuple[dict[int, Any], tuple[int, int]]:
        """A step's structs of the layers that others are like, and where its cosines and sines are: in one workspace,
        behind what the largest call needs of it.
        """
        shared = {}
        for first in set(self._alike):
            chain = self.chains[first]
            query, attended = chain.first.query, chain.second.attended
            shared[first] = context.direct_arguments(query, stores[first], attended, *chain.options)
        needed = -(-max(args.call.workspace_bytes for args in shared.values()) // _LINE) * _LINE
        cos, sin = (x.nbytes for x in angles)
        workspace = WORKSPACE.at_least(needed + cos + sin)
        for args in shared.values():
            args.call.workspace = workspace
        places = workspace + needed, workspace + needed + cos
        for place, x in zip(places, angles, strict=True):
            ctypes.memmove(place, x.data_ptr(), x.nbytes)
        return shared, places

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
        self._alike, self._attention, self._pointed = [], [], []
        for i, (chain, own) in enumerate(zip(self.chains, stores, strict=True)):
            chain.hold(own)
            shapes = (own.keys.shape, own.values.shape, own.keys.dtype)
            places = (chain.first.query.data_ptr(), chain.second.attended.data_ptr())
            self._alike.append(alike.setdefault((*shapes, *places, *chain.options), i))
            args = native.STRUCTS["hb_paged_attention"]()
            self._attention.append(args)
            self._run.set_step(2 * i + 1, chain.second.attention, args)
