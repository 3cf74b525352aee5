"""Whatever a pointer may depend on is noticed; what it does not depend on is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit
from quant.unchanged import Unchanged

CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Linear4bit.from_float(nn.Linear(64, 32), CONFIG)
        self.inner = nn.Sequential(nn.LayerNorm(32), Linear4bit.from_float(nn.Linear(32, 8, bias=False), CONFIG))
        self.note = 1


def linear(root: Root) -> Any:
    return root.inner[1]


def replace_data(root: Root) -> None:
    root.first.bias.data = root.first.bias.data.clone()


CHANGES: dict[str, Callable[[Root], Any]] = {
    "module": lambda root: root.inner.__setitem__(0, nn.LayerNorm(32)),
    "child": lambda root: setattr(root, "first", Linear4bit.from_float(nn.Linear(64, 32), CONFIG)),
    "weight": lambda root: linear(root).quantize(torch.randn(8, 32)),
    "norm": lambda root: setattr(root.inner[0], "weight", nn.Parameter(torch.ones(32))),
    "buffer": lambda root: setattr(linear(root), "nested_offset", torch.zeros(())),
    "no bias": lambda root: setattr(root.first, "bias", None),
    "data": replace_data,
    "data of a buffer": lambda root: linear(root).absmax.set_(linear(root).absmax.clone()),
    "dtype": lambda root: setattr(root.inner[0].weight, "data", root.inner[0].weight.data.view(torch.float16)),
    "activations": lambda root: setattr(root.first, "activations", "int8"),
    "compute_dtype": lambda root: setattr(linear(root), "compute_dtype", torch.float16),
    "hook": lambda root: linear(root).register_forward_hook(lambda *_: None),
    "pre-hook": lambda root: root.inner.register_forward_pre_hook(lambda *_: None),
    "forward": lambda root: setattr(root.inner[0], "forward", nn.Identity()),
    "one module more": lambda root: root.inner.append(nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    root = Root()
    is_good = Unchanged(root)
    assert is_good()
    CHANGES[change](root)
    assert not is_good()


def test_what_is_already_hooked_is_never_good() -> None:
    root = Root()
    root.first.register_forward_hook(lambda *_: None)
    assert not Unchanged(root)()


def test_values_and_notes_may_change() -> None:
    root = Root()
    is_good = Unchanged(root)
    with torch.no_grad():
        root.inner[0].weight.mul_(2)
    root.note = 2
    root.register_forward_hook(lambda *_: None)  # of the root itself, which whoever calls it runs
    root.eval()
    assert is_good()
