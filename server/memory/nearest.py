"""Where a model does not fit: the nearest configurations that would, each planned and found to fit.

First with less room for requests (a smaller cache or shorter context, then smaller steps, then fewer sequences), and
with a cache in 8 bits where that leaves more room; then in a smaller format: the largest that fits with all else as
asked, or failing that the largest that fits with less room.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import torch

from quant.config import BitsAndBytesConfig, from_spec
from quant.errors import QuantConfigError
from server.memory.facts import Facts, describe
from server.memory.kv import kv_dtype, layer_bytes_per_token, other_layers
from server.memory.needs import Supply, Weights, plan_for, weights_by_device, whole_blocks
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
SMALLEST_CACHE: Final = "int8"
"""The kv_cache.dtype that takes least."""


def nearest(spec: ModelSpec, facts: Facts, weights: Weights, supply: Supply) -> tuple[Alternative, ...]:
    """What would fit; empty where nothing of the kind does."""
    found = list(_with_either_cache(spec, facts, weights, supply, {}))
    if facts.prequantized:
        return tuple(found)
    smaller: list[Alternative] = []
    for name, other in _smaller_formats(facts, weights):
        if (fitting := _fitting(spec, facts, other, supply, {"quantization": name})) is not None:
            return (*found, fitting)
        smaller += _with_either_cache(spec, facts, other, supply, {"quantization": name})
    return (*found, *smaller[:1])


def in_words(alternative: Alternative) -> str:
    """ "quantization nf4-dq with max_model_len 8192 and max_sequences 4"."""
    changes = dict(alternative.changes)
    parts = []
    if "quantization" in changes:
        parts.append(f"quantization {_format_in_words(changes.pop('quantization'))}")
    changes |= {f"kv_cache.{key}": value for key, value in changes.pop("kv_cache", {}).items()}
    parts += [f"{key} {value}" for key, value in changes.items()]
    return parts[0] + (f" with {' and '.join(parts[1:])}" if parts[1:] else "")


def _format_in_words(quantization: str | dict[str, Any]) -> str:
    if isinstance(quantization, str):
        return quantization
    return f"{describe(BitsAndBytesConfig(**quantization))} and its quantize_embeddings true"


def _with_either_cache(
    spec: ModelSpec, facts: Facts, weights: Weights, supply: Supply, changes: dict[str, Any]
) -> Iterator[Alternative]:
    """With less room for requests, in a cache as asked; and in the smallest one, if less must then be given up."""
    as_asked = _with_less(spec, facts, weights, supply, changes)
    if as_asked is not None:
        yield as_asked
    if not _has_smaller_cache(spec, facts):
        return
    in_smallest = _with_less(spec, facts, weights, supply, changes | {"kv_cache": {"dtype": SMALLEST_CACHE}})
    if in_smallest is not None and (as_asked is None or _apart_from_dtype(in_smallest) != as_asked.changes):
        yield in_smallest


def _has_smaller_cache(spec: ModelSpec, facts: Facts) -> bool:
    """Whether the model's cache can be kept in less; one of anything but keys and values can't."""
    asked = layer_bytes_per_token(facts.hf_config, kv_dtype(spec, facts.dtype))
    smallest = layer_bytes_per_token(facts.hf_config, torch.int8)
    return smallest < asked and not other_layers(facts.hf_config.get_text_config(decoder=True))


def _apart_from_dtype(alternative: Alternative) -> dict[str, Any]:
    cache = {key: value for key, value in alternative.changes["kv_cache"].items() if key != "dtype"}
    others = {key: value for key, value in alternative.changes.items() if key != "kv_cache"}
    return others | ({"kv_cache": cache} if cache else {})


def _with_less(
    spec: ModelSpec, facts: Facts, weights: Weights, supply: Supply, changes: dict[str, Any]
) -> Alternative | None:
    """The first of ever smaller steps beside which a cache fits, with the largest such cache."""
    asked = {"max_batch_tokens": facts.batch_tokens(spec), "max_sequences": spec.max_sequences}
    smaller = {"max_batch_tokens": min(asked["max_batch_tokens"], max(SMALLEST_STEP, spec.max_sequences))}
    smallest = {"max_batch_tokens": SMALLEST_STEP, "max_sequences": FEWEST_SEQUENCES}
    for less in ({}, smaller, {key: min(most, asked[key]) for key, most in smallest.items()}):
        own = {key: value for key, value in less.items() if value != asked[key]}
        shrunk = _changed(spec, changes | own)
        plan = plan_for(msgspec.structs.replace(shrunk, kv_cache_tokens=None), facts, weights, supply)
        shortest = min(SMALLEST_CONTEXT, plan.max_model_len)
        for context in (plan.longest_context, shortest):  # a short one leaves a little more room, having smaller tables
            length, tokens = _cache(spec, plan, max(context, shortest))
            cache = changes.get("kv_cache", {}) | tokens
            candidate = changes | own | length | ({"kv_cache": cache} if cache else {})
            if (fitting := _fitting(spec, facts, weights, supply, candidate)) is not None:
                return fitting
    return None


def _cache(spec: ModelSpec, plan: Plan, context: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What changes of the model, and of its cache, for sequences of `context` tokens, as many as there is room for."""
    context = min(plan.max_model_len, context)
    length = {} if context == plan.max_model_len else {"max_model_len": context}
    if spec.kv_cache_tokens is None:
        return length, {}
    sequence = plan.sequence_tokens // plan.max_model_len * context
    tokens = min(spec.kv_cache_tokens, sequence if length else max(1, plan.most_sequences) * whole_blocks(sequence))
    return length, {} if tokens == spec.kv_cache_tokens else {"tokens": tokens}


def _fitting(
    spec: ModelSpec, facts: Facts, weights: Weights, supply: Supply, changes: dict[str, Any]
) -> Alternative | None:
    """A configuration as an alternative, if it fits."""
    plan = plan_for(_changed(spec, changes), facts, weights, supply)
    return Alternative(changes, plan.devices[0].peak_bytes) if plan.fits else None


def _changed(spec: ModelSpec, changes: dict[str, Any]) -> ModelSpec:
    """A spec with what an alternative changes, but for the quantization: `Weights` are of one already."""
    fields = {key: value for key, value in changes.items() if key not in ("quantization", "kv_cache")}
    fields |= {f"kv_cache_{key}": value for key, value in changes.get("kv_cache", {}).items()}
    return msgspec.structs.replace(spec, **fields)


def _smaller_formats(facts: Facts, weights: Weights) -> Iterator[tuple[str | dict[str, Any], Weights]]:
    """Formats that make the main device's weights smaller than they are, from large to small."""
    size = weights.bytes_on(facts.device)
    for name in FORMATS:
        try:
            other = weights_by_device(facts, from_spec(name, compute_dtype=facts.dtype))
        except QuantConfigError:  # such a model has no such format: an embedding of a kind that cannot be packed
            continue
        if other.bytes_on(facts.device) < size:
            yield name, other
