"""LongRoPE (Ding et al., 2024), as the Phi models have it: angles that hang on how long a sequence is.

Sequences of up to `original_max_position_embeddings` tokens are turned by one set of frequencies, longer ones by
another, all of their tokens. transformers looks at the largest position of a forward call. That is right for a call
that holds one sequence and all of it; here a call holds chunks of many, and one long sequence would turn the
others' keys. So a model's rotary modules are told, row by row, which set is meant.

The scheduler sees to it that a sequence which grows beyond that length is computed anew, as `generate` does, and that
nobody shares what was computed with the other set. What transformers calls "dynamic" changes nothing up to
`max_position_embeddings`, beyond which no model is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from server.errors import LoadError
from server.model.transfer import on_device

_KIND: Final = "longrope"
Angles = tuple[torch.Tensor, torch.Tensor]


class RopeSwitch:
    """What a model's rotary modules are told of the forward call that runs."""

    def __init__(self, length: int | None) -> None:
        self.length = length
        """Tokens up to which a sequence has the frequencies of short ones; None where there is one set for all."""
        self.rows: torch.Tensor | bool | None = None
        """Whether rows are of longer sequences, bool, of a shape that broadcasts to the position ids'; one bool where
        they all agree, None outside a runner's call."""

    @contextmanager
    def told(self, switched: Iterable[bool], shape: tuple[int, int], device: torch.device) -> Iterator[None]:
        """While this is open, rows are of sequences longer than `length` or not; `switched`, reshaped, says which.

        It is not looked at where there is no such length.
        """
        if self.length is None:
            yield
            return
        flags = list(switched)
        agree = all(flags) or not any(flags)
        self.rows = flags[0] if agree else on_device(flags, device, torch.bool).view(shape)
        try:
            yield
        finally:
            self.rows = None


def rope_switch(model: nn.Module) -> RopeSwitch:
    """The switch of a model's rotary modules, made at the first call.

    Raises LoadError where its layers switch at different lengths.
    """
    found = {module: own for module in model.modules() if (own := _lengths(module))}
    lengths = sorted(set().union(*found.values()))
    if len(lengths) > 1:
        raise LoadError(
            f"{type(model).__name__} cannot be served: its layers have other rotary frequencies beyond "
            f"{' and '.join(map(str, lengths))} tokens; accepted is one length"
        )
    for module in found:
        present = vars(module).get("forward")
        if isinstance(present, _ByLength):
            return present.switch
    switch = RopeSwitch(lengths[0] if lengths else None)
    for module in found:
        module.forward = _ByLength(module.forward, switch)
    return switch


def _lengths(module: nn.Module) -> set[int]:
    """Where a module's frequencies change, one for each kind of layer that it serves; none for any other module."""
    kinds: Any = getattr(module, "rope_type", None)
    config: Any = getattr(module, "config", None)
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, dict):
        return set()
    own = [settings] if kinds == _KIND else []
    if isinstance(kinds, dict):
        own = [settings[layer] for layer, kind in kinds.items() if kind == _KIND]
    return {int(one["original_max_position_embeddings"]) for one in own}


class _ByLength:
    """A rotary module's forward that chooses row by row. transformers chooses by the largest position it is shown."""

    def __init__(self, forward: Callable[..., Angles], switch: RopeSwitch) -> None:
        self._forward = forward
        self.switch = switch

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, *others: Any, **named: Any) -> Angles:
        """x for its dtype and device, position_ids [rows, T] -> cosines and sines [rows, T, D]."""
        length, rows = self.switch.length, self.switch.rows
        if rows is None or rows is False or length is None:
            return self._forward(x, position_ids, *others, **named)
        beyond = position_ids.new_full((len(position_ids), 1), length)
        long = self._forward(x, torch.cat((position_ids, beyond), dim=1), *others, **named)
        cos, sin = (angles[:, :-1] for angles in long)
        if rows is True:
            return cos.contiguous(), sin.contiguous()
        short = self._forward(x, position_ids.clamp(max=length - 1), *others, **named)
        chosen = rows.to(cos.device)[..., None]
        return torch.where(chosen, cos, short[0]), torch.where(chosen, sin, short[1])
