"""Layers of one model that multiply the same activations, computed in one call where they may be.

A model's query, key and value projections, and the gate and the other half of its MLP, read the same x. Together they
cost one call, one conversion of x and one start of the threads. Not here: which modules of a model these are
(server/model/fuse.py), the call (direct.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quant.direct import Direct, DirectGroup, is_direct
from quant.packed import PackedModule


class Siblings:
    """Some linear layers, of whatever kind, called with one x."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self._directs: list[Direct | None] = []
        self._group: DirectGroup | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: pointers stay behind."""
        return {"layers": self.layers, "_directs": [], "_group": None}

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each layer gives for x, bit for bit."""
        if is_direct(x):
            directs = [direct_of(layer, x) for layer in self.layers]
            if directs != self._directs:  # by identity: a layer makes a new one where its tensors changed
                self._directs = directs
                self._group = _group_of(directs)
            if self._group is not None:
                return self._group(x)
        return [layer(x) for layer in self.layers]


def multiplied_together(owner: nn.Module, layers: tuple[nn.Module, ...], x: torch.Tensor) -> list[torch.Tensor]:
    """What some layers of `owner`, which remembers how, give for x; as fast as they are the same ones as last time."""
    siblings: Siblings | None = owner.__dict__.get("_siblings")
    if siblings is None or siblings.layers != layers:
        owner.__dict__["_siblings"] = siblings = Siblings(layers)
    return siblings(x)


def direct_of(layer: nn.Module, x: torch.Tensor) -> Direct | None:
    """The layer's own call; None where it has none, or would do more than call it."""
    if not isinstance(layer, PackedModule) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if "forward" in vars(layer):  # accelerate's hooks put one on the object
        return None
    return layer.direct_for(x)


def _group_of(directs: Sequence[Direct | None]) -> DirectGroup | None:
    parts = [direct for direct in directs if direct is not None]
    if len(parts) < len(directs) or not DirectGroup.may_be_grouped(parts):
        return None
    return DirectGroup(parts)
