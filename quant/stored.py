"""What a packed checkpoint holds of each module of a model: its weight packed, or as values.

A file's names need not be the model's: transformers renames tensors while it loads, and is asked here for the same
names. Not here: what follows for the modules (conversion.py), the headers themselves (headers.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from quant.errors import CheckpointError
from quant.experts import find_experts
from quant.headers import TensorHeader
from quant.state import NAMES_4BIT, NAMES_8BIT

_PART: Final = re.compile(rf"(.*)\.({'|'.join(map(re.escape, dict.fromkeys(NAMES_4BIT + NAMES_8BIT)))})")
"""A tensor of a packed weight: its module, and which one it is."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Both map modules by the model's names to the file's; a stack of experts counts as its matrices, by their names
    in files, and unquantized as the tensor that it is.
    """

    packed: Mapping[str, str]
    values: Mapping[str, str]
    """With a weight in floating point, of the shape that the model has for it, and no statistics."""

    def are_values(self, names: Iterable[str]) -> bool:
        """Whether the file holds something of these modules, and none of them packed."""
        names = list(names)
        return any(name in self.values for name in names) and not any(name in self.packed for name in names)


def _in_order(names: Iterable[str]) -> list[str]:
    """As some of transformers' renamings expect them. Raises CheckpointError for a name with a number that is none."""
    try:
        return sorted(names, key=dot_natural_key)
    except ValueError as error:
        raise CheckpointError(f"the name of a tensor cannot be read: {error}") from error


def stored_modules(model: transformers.PreTrainedModel, headers: Mapping[str, TensorHeader]) -> Stored:
    """What files with these headers, by plain_name, hold for a model on meta whose modules are still transformers'."""
    shapes: dict[str, torch.Size | None] = {
        name: tensor.shape for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    stacks: set[str] = set()
    for module, projections in find_experts(model).items():
        stacks |= {f"{module}.{projection.leaf}" for projection in projections}
        matrices = (name for projection in projections for name in projection.file_names())
        shapes |= dict.fromkeys((f"{module}.{name}.weight" for name in matrices), None)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    known = dict.fromkeys(shapes, True)

    @functools.cache
    def renamed(name: str) -> str:
        found, _ = rename_source_key(name, renamings, [], model.base_model_prefix, known)
        if found not in known and name in known:  # as transformers does: what is right already stays
            found, _ = rename_source_key(name, [], [], model.base_model_prefix, known)
        return found

    packed: dict[str, str] = {}
    values: dict[str, str] = {}
    for name in _in_order(headers):
        part = _PART.fullmatch(name)
        own = renamed(name if part is None else f"{part[1]}.weight")
        if own in stacks:
            values[own] = name
        elif own not in known or part is None:
            continue
        elif part[2] != "weight":
            packed[own.removesuffix(".weight")] = part[1]
        elif headers[name].is_floating_point and shapes[own] in (None, headers[name].shape):
            values[own.removesuffix(".weight")] = part[1]
    return Stored(packed, {name: file for name, file in values.items() if name not in packed})
