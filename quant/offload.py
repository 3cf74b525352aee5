"""Modules that a device map puts beside the main device: which they are, and that they stay and compute in float32.

accelerate brings the weights of such a module to the main device for each forward pass and moves inputs, but casts
nothing. So each module with weights of its own gets two hooks: one widens its inputs to float32, the other narrows its
outputs to the model's dtype, and what lies between two modules (caches, masks) has the dtype that it has without
offloading. Not here: which of the other modules are quantized (hf.py), moving tensors (accelerate).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def offloaded_modules(device_map: object) -> list[str]:
    """The entries of a device map that lie beside the main device: disk, and the CPU where there is an accelerator."""
    if not isinstance(device_map, Mapping):
        return []
    places = {name: _place(device) for name, device in device_map.items()}
    away = {"disk"} if set(places.values()) <= {"cpu", "disk"} else {"cpu", "disk"}
    return [name for name, place in places.items() if place in away]


def is_offloaded(device_map: object) -> Callable[[str], bool]:
    """Whether a module or tensor of this name lies beside the main device: the map's longest matching entry decides."""
    away = set(offloaded_modules(device_map))
    if not away:
        return lambda name: False
    entry_of = entry_for(device_map)
    return lambda name: entry_of(name) in away


def device_of(device_map: object, main: str) -> Callable[[str], str]:
    """Where a module or tensor of this name lies, as torch spells it ("cpu", "cuda:1") or "disk".

    `main` is where everything lies without a map, and what the map does not name.
    """
    if not isinstance(device_map, Mapping):
        return lambda name: main
    entry_of = entry_for(device_map)
    places = {entry: spelled(device) for entry, device in device_map.items()}

    def place(name: str) -> str:
        entry = entry_of(name)
        return main if entry is None else places[entry]

    return place


def spelled(device: object) -> str:
    """A device of a map as torch spells it: 1 and "cuda" are "cuda:1" and "cuda:0"."""
    place = f"cuda:{device}" if isinstance(device, int) else _place(device)
    return "cuda:0" if place == "cuda" else place


def entry_for(device_map: object) -> Callable[[str], str | None]:
    """The entry of a map that decides for a name; None where there is none."""
    entries = sorted(device_map, key=len, reverse=True) if isinstance(device_map, Mapping) else []
    return lambda name: next((entry for entry in entries if entry == "" or f"{name}.".startswith(f"{entry}.")), None)


def keep_in_float32(model: nn.Module, device_map: object, is_float32: Callable[[str], bool]) -> None:
    """Makes every offloaded module of a model on meta float32, and lets it take and give the model's dtype.

    A weight that is tied to one on the main device keeps the model's dtype: the two are one tensor. Around what
    transformers loads in float32 anyway (`is_float32` by name) the model's own code casts, and nothing else does.
    """
    lies_away = is_offloaded(device_map)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: list[tuple[nn.Module, torch.dtype, bool]] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            own = names[id(parameter)]
            if parameter.dtype in (torch.float16, torch.bfloat16) and all(map(lies_away, own)):
                found.append((module, parameter.dtype, any(map(is_float32, own))))
                break
    for module, dtype, is_cast_around in found:
        module._apply(_widened, recurse=False)  # type: ignore[no-untyped-call]
        if not is_cast_around:
            boundary = _Boundary(dtype)
            module.register_forward_pre_hook(boundary.widen, with_kwargs=True)
            module.register_forward_hook(boundary.narrow)


class _Boundary:
    """The hooks of one float32 module in a model of another dtype; an object, so that models can be pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def widen(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, self.dtype, torch.float32), _cast(kwargs, self.dtype, torch.float32)

    def narrow(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, torch.float32, self.dtype)


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """Every tensor of dtype `source` in nested tuples, lists and dictionaries as `target`; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, dict):  # with it transformers' outputs, which are dictionaries with attributes
        changed = copy.copy(value)
        for key, entry in value.items():
            changed[key] = _cast(entry, source, target)
        return changed
    if isinstance(value, list | tuple):
        entries = [_cast(entry, source, target) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _place(device: object) -> str:
    return device.type if isinstance(device, torch.device) else str(device)
