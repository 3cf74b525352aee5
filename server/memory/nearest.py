"""Where a model does not fit: the nearest configurations that would, each planned and found to fit.

First with less room for requests (a smaller cache or shorter context, then smaller steps, then fewer sequences), then
in a smaller format: the largest that fits with all else as asked, or failing that the largest that fits with less room.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from quant.config import BitsAndBytesConfig, from_spec
from server.memory.facts import Facts, describe
from server.memory.needs import Room, Weights, plan_for, weights_by_device, whole_blocks
from server.records import Alternative, ModelSpec, Plan

SMALLEST_CONTEXT: Final = 256
"""Below this many tokens a shorter context is no longer offered as a way to make a model fit."""
SMALLEST_STEP: Final = 256
"""The same for max_batch_tokens."""
FEWEST_SEQUENCES: Final = 4
"""The same for max_sequences."""
FORMATS: Final[tuple[str | dict[str, Any], ...]] = (
    "int8",
    "nf4",
    "nf4-dq",
    {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "quantize_embeddings": True,
    },
)
"""From large to small."""


def nearest(spec: ModelSpec, facts: Facts, weights: Weights, room: Room) -> tuple[Alternative, ...]:
    """What would fit; empty where nothing of the kind does."""
    found = list(_with_less(spec, facts, weights, room, {}))
    if facts.prequantized:
        return tuple(found)
    smaller = []
    for name, other in _smaller_formats(facts, weights):
        if (fitting := _fitting(spec, facts, other, room, {"quantization": name})) is not None:
            return (*found, fitting)
        smaller += list(_with_less(spec, facts, other, room, {"quantization": name}))
    return (*found, *smaller[:1])


def in_words(alternative: Alternative) -> str:
    """ "quantization nf4-dq with max_model_len 8192 and max_sequences 4"."""
    changes = dict(alternative.changes)
    parts = []
    if "quantization" in changes:
        parts.append(f"quantization {_format_in_words(changes.pop('quantization'))}")
    if "kv_cache" in changes:
        changes["kv_cache.tokens"] = changes.pop("kv_cache")["tokens"]
    parts += [f"{key} {value}" for key, value in changes.items()]
    return parts[0] + (f" with {' and '.join(parts[1:])}" if parts[1:] else "")


def _format_in_words(quantization: str | dict[str, Any]) -> str:
    if isinstance(quantization, str):
        return quantization
    return f"{describe(BitsAndBytesConfig(**quantization))} and its quantize_embeddings true"


def _with_less(
    spec: ModelSpec, facts: Facts, weights: Weights, room: Room, changes: dict[str, Any]
) -> Iterator[Alternative]:
    """The first of ever smaller steps beside which a cache fits, with the largest such cache; at most one."""
    step, sequences = min(spec.max_batch_tokens, SMALLEST_STEP), min(spec.max_sequences, FEWEST_SEQUENCES)
    for less in ({}, {"max_batch_tokens": step}, {"max_batch_tokens": step, "max_sequences": sequences}):
        own = {key: value for key, value in less.items() if value != getattr(spec, key)}
        shrunk = msgspec.structs.replace(spec, **own)
        plan = plan_for(msgspec.structs.replace(shrunk, kv_cache_tokens=None), facts, weights, room)
        shortest = min(SMALLEST_CONTEXT, plan.max_model_len)
        for context in (plan.longest_context, shortest):  # a short one leaves a little more room, having smaller tables
            cache = _cache(spec, plan, max(context, shortest))
            if (fitting := _fitting(shrunk, facts, weights, room, changes | own | cache)) is not None:
                yield fitting
                return


def _cache(spec: ModelSpec, plan: Plan, context: int) -> dict[str, Any]:
    """Keys for sequences of `context` tokens, as far as they are not as planned, and as many as there is room for."""
    context = min(plan.max_model_len, context)
    changes: dict[str, Any] = {} if context == plan.max_model_len else {"max_model_len": context}
    if spec.kv_cache_tokens is not None:
        sequence = plan.sequence_tokens // plan.max_model_len * context
        tokens = sequence if changes else max(1, plan.most_sequences) * whole_blocks(sequence)
        changes["kv_cache"] = {"tokens": min(spec.kv_cache_tokens, tokens)}
    return changes


def _fitting(
    spec: ModelSpec, facts: Facts, weights: Weights, room: Room, changes: dict[str, Any]
) -> Alternative | None:
    """A configuration as an alternative, if it fits."""
    fields = {key: value for key, value in changes.items() if key not in ("quantization", "kv_cache")}
    if "kv_cache" in changes:
        fields["kv_cache_tokens"] = changes["kv_cache"]["tokens"]
    plan = plan_for(msgspec.structs.replace(spec, **fields), facts, weights, room)
    return Alternative(changes, plan.devices[0].peak_bytes) if plan.fits else None


def _smaller_formats(facts: Facts, weights: Weights) -> Iterator[tuple[str | dict[str, Any], Weights]]:
    """Formats that make the main device's weights smaller than they are, from large to small."""
    size = _size(facts, weights)
    for name in FORMATS:
        other = weights_by_device(facts, from_spec(name, compute_dtype=facts.dtype))
        if _size(facts, other) < size:
            yield name, other


def _size(facts: Facts, weights: Weights) -> int:
    return sum(portion.nbytes for portion in weights.portions[facts.device])
