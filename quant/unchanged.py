"""Whether a module still is what it was: the question before every use of pointers that were taken from it.

Asked once per layer and step, so it is answered in a few microseconds, by identities. Not here: what was made of the
module (direct.py, chain.py).
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from torch import nn


class Unchanged:
    """A module with all below it: the same objects, tensors where they were, settings, and no hooks on any of them."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        below = modules[1:]  # hooks of the root are run by whoever calls it
        self._hooks = [hooks for module in below for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._own = [vars(module) for module in below]
        self._held: list[dict[str, Any]] = [
            held for module in modules for held in (module._modules, module._parameters, module._buffers)
        ]
        self._members = list(chain.from_iterable(held.values() for held in self._held))
        self._parameters = list(root.parameters())
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        named = [(vars(module), name) for module in below for name in getattr(module, "direct_options", ())]
        self._option_owners, self._option_names = [own for own, _ in named], [name for _, name in named]
        self._options = [own[name] for own, name in named]

    def __call__(self) -> bool:
        if any(self._hooks) or any("forward" in own for own in self._own):
            return False
        members = chain.from_iterable(map(dict.values, self._held))
        return (
            all(map(operator.is_, members, self._members))
            and all(map(operator.eq, map(torch.Tensor.data_ptr, self._parameters), self._addresses))
            and all(map(operator.is_, map(dict.get, self._option_owners, self._option_names), self._options))
        )
