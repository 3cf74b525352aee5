"""Whole decoder layers of transformers' models in one call, for steps of up to MOST_ROWS rows.

A layer that is attention and a gated MLP, each after a norm and each added to what it was given, has a dozen calls once
its parts are fused (fuse.py, fuse_attention.py), and Python between them takes as long as small matmuls do. A fused
layer keeps its object, parts and names; where all of it may go past torch, for at most `quant.chain.MOST_ROWS` rows, it
goes as one chain of calls. Every other call is transformers' own, over the fused parts; the bits are the same.

Nothing is believed by name: a class is fused where its forward, run on stand-ins for its four parts, is
x + attention(norm(x)) and then x + mlp(norm(x)), bit for bit. Not here: the calls of a layer (layer_run.py).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from itertools import repeat
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from quant import native
from quant.chain import MOST_ROWS
from quant.direct import is_direct
from quant.siblings import direct_of
from quant.unchanged import Unchanged
from server.model.attention import CONTEXT_ARGUMENT, PagedBatch
from server.model.layer_run import Angles, Ending, LayerChain, LayerRun

LAYER_PARTS: Final = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_PROJECTIONS: Final = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_HIDDEN: Final = 64
_SEED: Final = 22
_LEARNT: Final = ("_state", "_follower", "_is_last")
_GROUPS_KEPT: Final = 16
"""For numbers of rows; a batch that grows or shrinks by one, or that has more or fewer guesses, meets them again."""

_Key = tuple[int, int, int]  # rows, threads, whether batches must not matter
_T = TypeVar("_T")


class FusedLayer(nn.Module):
    """Llama's decoder layer under any name, of parts that are fused; comes before the class of transformers."""

    def forward(self, hidden_states: torch.Tensor, *positional: Any, **named: Any) -> Any:
        context: Any = named.get(CONTEXT_ARGUMENT)
        angles: Any = named.get("position_embeddings")
        if not positional and isinstance(context, PagedBatch):
            if context.computed:
                return _handed_on(self, hidden_states, context)
            if _may_be_chained(hidden_states, angles, named, context):
                group = _group_from(self, hidden_states, context)
                if group is not None:
                    return group(hidden_states, angles, context)
        return super().forward(hidden_states, *positional, **named)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: pointers, neighbours and its place in a model stay behind."""
        return {name: value for name, value in self.__dict__.items() if name not in _LEARNT}


def _handed_on(layer: FusedLayer, hidden_states: torch.Tensor, context: PagedBatch) -> torch.Tensor:
    """What was computed ahead. Raises RuntimeError where the model does what it did not do when that was learnt."""
    expected, *context.computed = context.computed
    if expected is not layer or context.last is None or context.last[1] is not hidden_states:
        raise RuntimeError("the model changed what one of its layers gave before the next one got it")
    return hidden_states


def _may_be_chained(hidden_states: torch.Tensor, angles: Any, named: dict[str, Any], context: PagedBatch) -> bool:
    """Whether a call is one packed row of at most MOST_ROWS tokens, with angles for each, and nothing else to heed."""
    if hidden_states.dim() != 3 or hidden_states.shape[0] != 1 or not 1 <= hidden_states.shape[1] <= MOST_ROWS:
        return False
    if not is_direct(hidden_states) or not hidden_states.is_contiguous() or not context.is_direct(hidden_states.dtype):
        return False
    if any(named.get(name) is not None for name in ("attention_mask", "cache", "past_key_values")):
        return False
    if not isinstance(angles, tuple) or len(angles) != 2:
        return False
    if context.checked_angles is not angles:
        if not all(_is_angle(angle, hidden_states) for angle in angles):
            return False
        context.checked_angles = angles
    return bool(angles[0].shape[1] == hidden_states.shape[1])


def _is_angle(angle: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    has_rows = angle.dim() == 3 and angle.shape[:2] == hidden_states.shape[:2]
    return has_rows and angle.dtype is hidden_states.dtype and angle.is_cpu and angle.is_contiguous()


class _Group(LayerRun):
    """Layers that are known to follow each other."""

    def __init__(self, layers: list[FusedLayer], chains: list[LayerChain]) -> None:
        super().__init__(chains)
        self.layers = layers
        self.is_sealed = False
        """Whether it was found good while nobody changes any layer: then it stays so."""
        self._last: _State = layers[-1].__dict__["_state"]
        self._unchanged = Unchanged(*layers, are_roots_called=False)
        self._own = [vars(layer) for layer in layers]
        self._followers = [*layers[1:], None]

    def is_good(self) -> bool:
        """Whether these are the layers to be computed together, as they are, with nobody who looks at any of them."""
        followers = map(dict.get, self._own, repeat("_follower"))
        return all(map(operator.is_, followers, self._followers)) and self._unchanged()

    def __call__(self, hidden_states: torch.Tensor, angles: Angles, context: PagedBatch) -> torch.Tensor:
        """What the last layer gives; the others are told that theirs is done."""
        wanted = self._wanted(context)
        if wanted is None:
            out = super().__call__(hidden_states, angles, context)
        else:
            ending = self._last.ending(self.layers[-1], len(wanted), self.chains[-1])
            out = self.shortened(hidden_states, angles, context, wanted, ending)
        context.last = (self.layers[-1], out)
        context.computed = self.layers[1:]
        return out

    def _wanted(self, context: PagedBatch) -> Sequence[int] | None:
        """The rows that the last layer's second half is worth computing for alone; None where it is for all of them."""
        if "_is_last" not in self._own[-1] or _is_watched(self.layers[-1]):
            return None
        wanted = context.wanted
        return None if wanted is None or 2 * len(wanted) > self.chains[-1].rows else wanted


class _State:
    """What is made of a layer for one dtype, as long as the layer is what it was."""

    def __init__(self, layer: nn.Module, hidden_states: torch.Tensor) -> None:
        parts: Any = layer._modules
        self.dtype = hidden_states.dtype
        self.is_good = Unchanged(layer)
        self.chains: WeakValueDictionary[_Key, LayerChain] = WeakValueDictionary()
        self.groups: dict[_Key, _Group] = {}
        self.endings: dict[_Key, Ending] = {}
        owned = [parts[owner]._modules[name] for owner, names in _PROJECTIONS.items() for name in names]
        directs = [direct_of(part, hidden_states) for part in owned]
        self.directs = tuple(direct for direct in directs if direct is not None)
        norms: list[Any] = [module for name, module in layer.named_modules() if name.endswith("norm")]
        are_norms_ready = all(norm.weight.dtype is self.dtype and native.is_ready(norm.weight) for norm in norms)
        fits = parts["input_layernorm"].weight.shape == hidden_states.shape[2:]
        self.may_be_chained = are_norms_ready and fits and len(self.directs) == len(directs) and self.is_good()

    def ending(self, layer: nn.Module, rows: int, chain: LayerChain) -> Ending | None:
        """The layer's for so many wanted rows; None where there are none."""
        if not rows:
            return None
        key = _key_of(rows)
        ending = self.endings.pop(key, None) or Ending(layer, self.directs, rows, chain)
        _keep_last(self.endings, key, ending)
        return ending


def _chain_for(layer: nn.Module, hidden_states: torch.Tensor, key: _Key) -> LayerChain | None:
    """The layer's chain for such rows; None where a part has no call, or does more."""
    state: _State | None = layer.__dict__.get("_state")
    if state is None or state.dtype is not hidden_states.dtype or not state.is_good():
        state = layer.__dict__["_state"] = _State(layer, hidden_states)
    if not state.may_be_chained:
        return None
    chain = state.chains.get(key)
    if chain is None or not chain.has_current_buffers():
        chain = state.chains[key] = LayerChain(layer, state.directs, hidden_states.shape[1], state.dtype)
    return chain


def _group_from(layer: FusedLayer, hidden_states: torch.Tensor, context: PagedBatch) -> _Group | None:
    """The layer with those that are known to follow it; None where it has no chain itself.

    That a layer gets what another one gave, untouched, is learnt when it does.
    """
    if context.last is not None and context.last[1] is hidden_states:
        vars(context.last[0])["_follower"] = layer
    key = _key_of(hidden_states.shape[1])
    state: _State | None = layer.__dict__.get("_state")
    known = None if state is None or state.dtype is not hidden_states.dtype else state.groups.pop(key, None)
    is_good = known is not None and ((known.is_sealed and context.is_sealed) or known.is_good())
    group = known if is_good else _gathered(layer, hidden_states, key, known)
    if group is not None:
        group.is_sealed = context.is_sealed and group is known
        _keep_last(layer.__dict__["_state"].groups, key, group)
    return group


def _key_of(rows: int) -> _Key:
    return rows, native.thread_count(), native.batch_invariant()


def _keep_last(kept: dict[_Key, _T], key: _Key, value: _T) -> None:
    """Behind the others: the first is the one that has not been used for the longest, and goes when they are many."""
    kept[key] = value
    if len(kept) > _GROUPS_KEPT:
        del kept[next(iter(kept))]


def _gathered(layer: FusedLayer, hidden_states: torch.Tensor, key: _Key, known: _Group | None) -> _Group | None:
    """`known`, where it is what there is now."""
    layers: list[FusedLayer] = []
    chains: list[LayerChain] = []
    each: FusedLayer | None = layer
    while each is not None and each not in layers and not (layers and _is_watched(each)):
        chain = _chain_for(each, hidden_states, key)
        if chain is None or (chains and chain.out.data_ptr() != chains[0].out.data_ptr()):
            break  # not one of the same calls, whose buffers a follower leaves alone until its own end
        layers.append(each)
        chains.append(chain)
        each = None if _is_watched(each) else each.__dict__.get("_follower")
    if not chains:
        return None
    return known if known is not None and known.chains == chains else _Group(layers, chains)


def _is_watched(layer: FusedLayer) -> bool:
    """Whether somebody wants to see what it is given, or gives."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def is_layer(module: nn.Module) -> bool:
    """Whether a module of fused parts is what FusedLayer computes."""
    if tuple(sorted(module._modules)) != tuple(sorted(LAYER_PARTS)) or module._parameters or module._buffers:
        return False
    kind: Any = type(module)
    return _adds_its_parts(kind)


@functools.cache
def _adds_its_parts(kind: Any) -> bool:
    """Whether a class's forward looks at nothing but its four parts, and hands on what it is given."""
    x, a, b, c = torch.randn(4, 1, 3, _HIDDEN, generator=torch.Generator().manual_seed(_SEED)).unbind()
    angles, context, seen = (x, x), object(), []

    def attention(hidden_states: torch.Tensor, **named: Any) -> tuple[torch.Tensor, None]:
        seen.append(named)
        return hidden_states * b, None

    layer = kind.__new__(kind)  # transformers' layers ask for their own class
    nn.Module.__init__(layer)
    stand_ins: list[Any] = [lambda y: y * a, attention, lambda y: y * c, torch.tanh]
    vars(layer).update(zip(LAYER_PARTS, stand_ins, strict=True))
    try:
        found = layer.forward(x, attention_mask=None, position_embeddings=angles, **{CONTEXT_ARGUMENT: context})
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    hands_on = (
        len(seen) == 1 and seen[0].get("position_embeddings") is angles and seen[0].get(CONTEXT_ARGUMENT) is context
    )
    middle = x + x * a * b
    return hands_on and isinstance(found, torch.Tensor) and torch.equal(found, middle + torch.tanh(middle * c))
