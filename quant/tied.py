"""Weights that a config ties and a checkpoint does not: found out before loading, as transformers will while it loads.

A config may say that the output head is the input embedding, and the files hold both, with different values (Flan-T5
does). transformers then loads both. Headers say that both are there; whether they differ, a look at the first of their
numbers says, which no trained table shares with another one by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import transformers
from torch import nn

from quant.headers import TensorHeader

COMPARED_BYTES: Final = 1 << 16


def untie_what_differs(model: transformers.PreTrainedModel, headers: Mapping[str, TensorHeader]) -> None:
    """Gives a model on meta tensors of their own where the files hold two that the config ties.

    What is tied by `all_tied_weights_keys` stays there: it is how layers to quantize are chosen before loading.
    """
    for target, source in model.all_tied_weights_keys.items():
        if target in headers and source in headers and _differ(headers[target], headers[source]):
            parent, _, leaf = target.rpartition(".")
            own = nn.Parameter(model.get_parameter(source).detach().clone(), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, own)


def _differ(one: TensorHeader, other: TensorHeader) -> bool:
    return (one.dtype, one.shape) != (other.dtype, other.shape) or _beginning(one) != _beginning(other)


def _beginning(header: TensorHeader) -> bytes:
    with header.file.open("rb") as file:
        file.seek(header.offset)
        return file.read(min(header.nbytes, COMPARED_BYTES))
