"""Checkpoint files that stay mapped because a few of a model's tensors still lie in them, and how they are let go.

safetensors maps a file into memory, and what transformers does not convert stays a view of it. The kernel counts every
page that has been read for as long as the mapping is there, against this process and against its container. Where a
model uses the file as it is, those pages are the model. Where the file was read to be packed, most are not, and a norm
that was left in it would hold them all. Not here: how tensors are loaded (transformers), or packed (quant).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

import torch
from torch import nn

from server.memory.machine import Mapping, mapped_files

CHECKPOINT_SUFFIX: Final = ".safetensors"
LEAST_USED: Final = 0.5
"""Part of a file's bytes that a model must use for it to stay mapped."""


def let_go(model: nn.Module) -> int:
    """Copies tensors out of mapped safetensors files of which the model uses a small part; the bytes it copied.

    Parameters and buffers stay the objects that they are. Where there is no /proc, nothing happens.
    """
    lying: dict[Mapping, list[torch.Tensor]] = defaultdict(list)
    mappings = mapped_files(CHECKPOINT_SUFFIX)
    for tensor in _tensors(model):
        place = next((one for one in mappings if one.start <= tensor.data_ptr() < one.end), None)
        if place is not None:
            lying[place].append(tensor)
    copied = 0
    for place, tensors in lying.items():
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        if sum(sizes.values()) < LEAST_USED * (place.end - place.start):
            copied += sum(sizes.values())
            _copy_out(tensors)
    return copied


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer on the CPU, each once; tied ones are one object."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _copy_out(tensors: list[torch.Tensor]) -> None:
    """Tensors that shared their bytes share the copy."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in tensors:
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = tensor.detach().clone()
        tensor.data = copies[key]
