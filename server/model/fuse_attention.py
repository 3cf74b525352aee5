"""Attention modules of transformers' models in four calls: projections, rotary embedding, attention, output projection.

transformers spends some twenty operators between a layer's projections and its attention. A fused module keeps its
object, parameters and names, and takes the short way where a batch of our own runner reaches it; every other call is
transformers' own.

Nothing is believed by name: a module is fused where, on random rows, angles and positions, it hands our attention the
same query, key, value and options as the short way does, bit for bit, and makes the same of the answer. Not here: the
small modules (fuse.py), what attention computes (attention.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from quant import direct_rows, formats
from quant.direct import is_direct
from quant.siblings import multiplied_together
from server.model.attention import ATTENTION_NAME, CONTEXT_ARGUMENT, Call, Context

_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS: Final = ("q_norm", "k_norm")
_CACHES: Final = ("cache", "past_key_values")
_POSITIONS: Final = (3, 4, 70, 901, 5000, 1 << 30)
"""The last one is behind any context: some models scale queries by their positions, from a large one on."""
_SEED: Final = 21


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    """What a module's calls of attention have in common."""

    scale: float
    window: int | None
    softcap: float | None


class FusedAttention(nn.Module):
    """Llama's attention under any name, norms of query and key included; comes before the class of transformers."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context: Context | None = others.get(CONTEXT_ARGUMENT)
        is_plain = attention_mask is None and not any(map(others.get, _CACHES))
        if context is None or not is_plain or not _is_packed_row(hidden_states, position_embeddings):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **others,
            )
        return _attended(self, self.__dict__["_options"], hidden_states, position_embeddings, context), None


def _is_packed_row(hidden_states: torch.Tensor, position_embeddings: Any) -> bool:
    if hidden_states.dim() != 3 or hidden_states.shape[0] != 1 or not is_direct(hidden_states):
        return False
    cos = position_embeddings[0] if isinstance(position_embeddings, tuple) else None
    return isinstance(cos, torch.Tensor) and cos.dtype is hidden_states.dtype and cos.shape[0] == 1


def _attended(
    module: nn.Module, options: _Options, hidden_states: torch.Tensor, position_embeddings: Any, context: Context
) -> torch.Tensor:
    """A packed row [1, T, hidden] -> the same."""
    parts: Any = module._modules
    projections = (parts["q_proj"], parts["k_proj"], parts["v_proj"])
    query, key, value = multiplied_together(module, projections, hidden_states)
    cos, sin = position_embeddings
    T, D = cos.shape[1:]
    query, key = query.view(T, -1, D), key.view(T, -1, D)
    if "q_norm" in parts:
        query, key = parts["q_norm"](query), parts["k_norm"](key)
    direct_rows.rotate(query, key, cos[0], sin[0])
    value = value.view(T, key.shape[1], -1)
    call = Call(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        options.scale,
        options.window,
        options.softcap,
        None,
    )
    return parts["o_proj"](context.attend(call).view(1, T, -1))  # type: ignore[no-any-return]


def is_attention(module: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether a module of a model of this dtype is what FusedAttention computes; leaves in it what its calls share."""
    names = set(module._modules)
    if not names.issuperset(_PROJECTIONS) or names - set(_PROJECTIONS) not in (set(), set(_NORMS)):
        return False
    config, head_dim = getattr(module, "config", None), getattr(module, "head_dim", None)
    if getattr(config, "_attn_implementation", None) != ATTENTION_NAME or not isinstance(head_dim, int):
        return False
    if dtype not in formats.VALUE_DTYPES or module._parameters:
        return False
    try:
        options = _proven_options(module, dtype, head_dim)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        return False
    if options is None:
        return False
    module.__dict__["_options"] = options
    return True


def _proven_options(module: nn.Module, dtype: torch.dtype, head_dim: int) -> _Options | None:
    """None where the module does something else."""
    generator = torch.Generator().manual_seed(_SEED)
    count = len(_POSITIONS)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    hidden_states = random(1, count, module.q_proj.in_features)  # type: ignore[union-attr, arg-type]
    angles = (random(1, count, head_dim), random(1, count, head_dim))
    theirs, ours = _Recorder(), _Recorder()
    expected = _asked(module, hidden_states, angles, theirs)
    if _turns_parts(module, hidden_states, angles):
        return None
    if len(theirs.calls) != 1 or theirs.calls[0].sinks is not None:
        return None
    call = theirs.calls[0]
    options = _Options(call.scale, call.window, call.softcap)
    found = _attended(module, options, hidden_states, angles, ours)
    same = all(torch.equal(getattr(call, name), getattr(ours.calls[0], name)) for name in ("query", "key", "value"))
    return options if same and torch.equal(found, expected) else None


def _asked(
    module: nn.Module, hidden_states: torch.Tensor, angles: tuple[torch.Tensor, ...], context: Context
) -> torch.Tensor:
    """What transformers' own forward makes of a packed row."""
    with _recorded_as(module):
        found: torch.Tensor
        found, _ = module(
            hidden_states,
            position_embeddings=angles,
            attention_mask=None,
            position_ids=torch.tensor([_POSITIONS]),
            **{CONTEXT_ARGUMENT: context},
        )
    return found


def _turns_parts(module: nn.Module, hidden_states: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> bool:
    """Whether it takes angles for a part of each head, as GLM-4.5's does: such are then what it gets from its model."""
    narrow = tuple(angle[..., : angle.shape[-1] // 2].contiguous() for angle in angles)
    try:
        _asked(module, hidden_states, narrow, _Recorder())
    except RuntimeError:
        return False
    return True


@contextmanager
def _recorded_as(module: nn.Module) -> Iterator[None]:
    """In evaluation, where dropout is off, whatever the module is in."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class _Recorder:
    """A context that notes the calls and answers something that depends on what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def attend(self, call: Call) -> torch.Tensor:
        self.calls.append(call)
        groups = call.query.shape[0] // call.value.shape[0]
        return call.value.repeat_interleave(groups, 0).transpose(0, 1).contiguous()
