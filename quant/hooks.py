"""What accelerate's hooks must know of packed modules: their tensors have other names in a state_dict than in a module.

accelerate offloads a state_dict and asks it for a module's tensors by the names that they have in the module. Ours hold
`absmax`, and the file format says `weight.absmax`; a stack of experts is a tensor per expert there. So a module of ours
puts a translation between the hook that it is given and the offloaded tensors. Not here: casting (offload.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Offloadable(nn.Module):
    """A module that accelerate's hooks can bring back, buffers included."""

    @abstractmethod
    def tensor_in_files(self, name: str, files: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The module's tensor `name` from those of its state_dict; KeyError where there is no such tensor."""

    @property
    def _hf_hook(self) -> Any:
        """accelerate's name for the hook of a module."""
        if "_hf_hook" not in self.__dict__:
            raise AttributeError("_hf_hook")
        return self.__dict__["_hf_hook"]

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        for one in getattr(hook, "hooks", (hook,)):
            files = getattr(one, "weights_map", None)
            if files is not None and not isinstance(files, _Translated):
                one.weights_map = _Translated(self, files)
        self.__dict__["_hf_hook"] = hook

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__["_hf_hook"]


class _Translated(Mapping[str, torch.Tensor]):
    """Offloaded tensors by their names in the state_dict, and by those in the module."""

    def __init__(self, module: Offloadable, files: Mapping[str, torch.Tensor]) -> None:
        self.module = module
        self.files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self.files[name]
        except KeyError:
            return self.module.tensor_in_files(name, self.files)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
