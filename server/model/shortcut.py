"""A decoder's forward call as its parts alone, one behind the other.

    ids -> embedding -> layers, given the positions' angles -> rows that are wanted -> norm -> head -> logits

Between them transformers wraps arguments, collects outputs and asks for a mask that nobody needs. That takes a
millisecond of a step, since after a model's weights nothing of Python is left in a processor's caches. Where all of it
comes to nothing, it is left out.

Nothing is believed by name. One forward call is watched, and each part must have been given the very object that the
one before it gave: the layers angles, our context and no mask, the head the wanted rows of what the norm gave; what the
head gave must be the model's logits. Then the parts alone must give the same bits. Not here: layers that are computed
together (fuse_layer.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn

from server.model.attention import CONTEXT_ARGUMENT, PagedBatch
from server.model.fuse import FusedNorm
from server.model.fuse_layer import FusedLayer

if TYPE_CHECKING:
    from server.model.proof import Proof
    from server.model.runner import PagedRunner


_SEED: Final = 23

log = logging.getLogger(__name__)


class Shortcut:
    """The parts of a model, and what is around them: modules that do nothing but call others."""

    def __init__(self, parts: Sequence[nn.Module], around: Sequence[nn.Module]) -> None:
        """`parts` in the order of their calls; `around` from within to the model itself."""
        self._embedding, self._rotary, *self._layers, self._norm, self._head = parts
        self._not_to_be_seen = [*around, self._norm]
        kept = {*parts, *around}
        owners = [module for module in around[-1].modules() if not kept.isdisjoint(module.children())]
        self._held = [(owner, list(owner._modules.values())) for owner in owners]

    def is_good(self) -> bool:
        """Whether the parts are where they were, with nobody who looks at what is around them, or at all rows of the
        norm."""
        for module in self._not_to_be_seen:
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return False
        return all(list(owner._modules.values()) == members for owner, members in self._held)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, context: PagedBatch, wanted: torch.Tensor
    ) -> torch.Tensor:
        """ids and positions [1, T], wanted int64 [W], ascending -> these rows' logits [W, vocabulary]."""
        x = self._embedding(ids)
        given = _named(self._rotary(x, positions), positions, context)
        place = 0
        while place < len(self._layers):
            x = self._layers[place](x, **given)
            place += 1
            ahead = list(context.computed)
            if ahead and ahead == self._layers[place : place + len(ahead)]:
                context.computed = ()  # they would hand on what they are given, and nobody looks at them
                place += len(ahead)
        rows = x if len(wanted) == x.shape[1] else x.index_select(1, wanted)
        logits: torch.Tensor = self._head(self._norm(rows))
        return logits[0]


def _named(angles: Any, positions: torch.Tensor, context: PagedBatch) -> dict[str, Any]:
    """What each layer is given by name."""
    return {
        "attention_mask": None,
        "position_embeddings": angles,
        "position_ids": positions,
        CONTEXT_ARGUMENT: context,
    }


def find_shortcut(runner: PagedRunner, proof: Proof) -> Shortcut | None:
    """Lets a runner take its model by its parts alone, where that is proven; what it takes."""
    try:
        runner.shortcut = _proven(runner, proof)
    except Exception as error:  # whatever it is, the model can be called as it is
        log.info("what was raised while a shortcut was looked for", exc_info=error)
        runner.shortcut = None
    return runner.shortcut


def _proven(runner: PagedRunner, proof: Proof) -> Shortcut | None:
    calls: list[_Call] = []

    def watch(*call: Any) -> Any:
        calls.append(_Call(*call))
        if isinstance(calls[-1].module, FusedNorm):
            calls[-1] = calls[-1]._replace(output=_any_bits(calls[-1].output))
        return calls[-1].output

    with ExitStack() as hooks:
        for module in _outside_layers(runner.model):
            hooks.enter_context(module.register_forward_hook(watch, with_kwargs=True))
        runner.logits(proof.batch)
    found = _found_in(calls)
    if found is None:
        return None
    expected = runner.logits(proof.batch).clone()
    runner.shortcut = found
    return found if torch.equal(runner.logits(proof.batch), expected) else None


class _Call(NamedTuple):
    module: nn.Module
    positional: tuple[Any, ...]
    named: dict[str, Any]
    output: Any

    def got(self, x: object, **named: object) -> bool:
        """Whether it was given x, and by name these very objects and no other tensor."""
        is_x = len(self.positional) == 1 and self.positional[0] is x
        are_named = all(name in self.named and self.named[name] is value for name, value in named.items())
        others = (value for name, value in self.named.items() if name not in named)
        return is_x and are_named and not any(isinstance(value, torch.Tensor) for value in others)


def _any_bits(x: torch.Tensor) -> torch.Tensor:
    """Numbers of all sizes, infinite ones and NaNs: who changes any number changes one of them."""
    bits = torch.randint(256, (x.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(_SEED))
    return bits.view(x.dtype).view(x.shape)


def _outside_layers(model: nn.Module) -> list[nn.Module]:
    """All modules but those within fused layers."""
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    return [module for module in model.modules() if module not in inside]


def _found_in(calls: Sequence[_Call]) -> Shortcut | None:
    """The shortcut of a model whose modules were called like this, in the order in which the calls ended."""
    layers = [call for call in calls if isinstance(call.module, FusedLayer)]
    parts, behind = calls[: len(layers) + 3], calls[len(layers) + 3 :]
    is_in_a_row = [id(call.module) for call in parts[2:-1]] == [id(call.module) for call in layers]
    if not layers or not is_in_a_row or len(behind) < 2:
        return None
    embedding, rotary, *_, norm = parts
    *within, head, model = behind
    if not _is_straight(embedding, rotary, layers, norm, head, model):
        return None
    around = [call.module for call in (*within, model)]
    if not isinstance(norm.module, FusedNorm) or not all(norm.module in module.modules() for module in around):
        return None
    return Shortcut([call.module for call in (*parts, head)], around)


def _is_straight(
    embedding: _Call, rotary: _Call, layers: Sequence[_Call], norm: _Call, head: _Call, model: _Call
) -> bool:
    """Whether each was given what the one before it gave, and the model gave what the head did."""
    ids, positions, context = (model.named[name] for name in ("input_ids", "position_ids", CONTEXT_ARGUMENT))
    given = _named(rotary.output, positions, context)
    wanted = torch.tensor(context.wanted)
    rows = head.positional[0] if head.positional else None
    turned = (*rotary.positional, *rotary.named.values())
    return (
        embedding.got(ids)
        and len(turned) == 2
        and turned[0] is embedding.output
        and turned[1] is positions
        and all(each.got(one.output, **given) for one, each in zip((embedding, *layers), layers, strict=False))
        and norm.got(layers[-1].output)
        and isinstance(rows, torch.Tensor)
        and head.got(rows)
        and torch.equal(rows.view(torch.uint8), norm.output.index_select(1, wanted).view(torch.uint8))
        and model.output.logits is head.output
    )
