"""Whether modules still are what they were: the question before every use of pointers that were taken from them.

Asked in every step, at once for all layers that are computed together, so it is answered by identities, in loops that
Python runs by itself. Not here: what was made of the modules (direct.py, chain.py).
"""

from __future__ import annotations

import operator
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn

_dtype_of = operator.attrgetter("dtype")


class Unchanged:
    """Modules with all below them: the same objects, tensors where they were, settings, and no hooks on any of them.

    Hooks of the modules themselves are run by whoever calls them, and heeded where `are_roots_called` is false.
    """

    def __init__(self, *roots: nn.Module, are_roots_called: bool = True) -> None:
        modules = [module for root in roots for module in root.modules()]
        bare = [module for module in modules if not are_roots_called or module not in roots]
        self._hooks = [hooks for module in bare for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._own = [vars(module) for module in bare]
        self._held: list[dict[str, Any]] = [
            held for module in modules for held in (module._modules, module._parameters, module._buffers)
        ]
        self._members = list(chain.from_iterable(held.values() for held in self._held))
        self._parameters = [parameter for root in roots for parameter in root.parameters()]
        self._dtypes = [parameter.dtype for parameter in self._parameters]
        self._tensors = [*self._parameters, *(buffer for root in roots for buffer in root.buffers())]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        named = [(vars(module), name) for module in bare for name in getattr(module, "direct_options", ())]
        self._option_owners, self._option_names = [own for own, _ in named], [name for _, name in named]
        self._options = [own[name] for own, name in named]

    def __call__(self) -> bool:
        if any(self._hooks) or any(map(operator.contains, self._own, repeat("forward"))):
            return False
        members = chain.from_iterable(map(dict.values, self._held))
        return (
            all(map(operator.is_, members, self._members))
            and all(map(operator.eq, map(torch.Tensor.data_ptr, self._tensors), self._addresses))
            and all(map(operator.is_, map(_dtype_of, self._parameters), self._dtypes))
            and all(map(operator.is_, map(dict.get, self._option_owners, self._option_names), self._options))
        )
