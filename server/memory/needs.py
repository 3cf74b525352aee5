"""The arithmetic of a plan: from what the files say and one configuration to bytes by device and component.

It decides nothing: what follows where it does not fit is nearest.py's, what is free host and driver say (plan.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import transformers

from quant.config import BitsAndBytesConfig
from quant.memory import Portion, by_component, predict_tensors
from quant.offload import device_of
from server.errors import ConfigError
from server.memory.activations import activation_bytes, logits_bytes, recorded_bytes
from server.memory.components import ACTIVATIONS, KV_CACHE, MAPPED_FILES, RUNTIME_CONTEXT, WORKSPACE
from server.memory.facts import Facts, describe
from server.memory.kv import kv_dtype, kv_layers, layer_bytes_per_token, layer_devices, texts_per_sequence
from server.memory.machine import Share
from server.memory.workspace import workspace_bytes
from server.records import CPU, DISK, GUESSED_ROWS, KV_BLOCK_TOKENS, SCORED_ROWS, DevicePlan, ModelSpec, Plan

KV_SHARE: Final = 0.25
"""Part of what everything else leaves free that the KV cache takes, where `kv_cache.tokens` does not say."""
UNBOUNDED_CONTEXT: Final = 2048
"""Longest sequence of a model without positions of its own (ALiBi) and without a `seq_length`."""


@dataclass(frozen=True, slots=True)
class Supply:
    """What there is to fill, in bytes by device; a device that is not named has nothing."""

    free: Mapping[str, int]
    promised: Mapping[str, int]
    """Of what is free: what others are going to take."""
    runtime: Share
    """Of the engine's process before loading, on the CPU."""

    def available(self, device: str) -> int:
        return max(0, self.free.get(device, 0) - self.promised.get(device, 0))


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's tensors under one quantization, by device."""

    quantization: BitsAndBytesConfig | None
    components: Mapping[str, Mapping[str, int]]
    """Main device first."""
    largest: Mapping[str, int]
    """The bytes of the largest tensor as it arrives."""

    @property
    def devices(self) -> list[str]:
        return list(self.components)

    def bytes_on(self, device: str) -> int:
        return sum(self.components[device].values())


def weights_by_device(facts: Facts, quantization: BitsAndBytesConfig | None) -> Weights:
    """Where every tensor of the model goes, main device first. Buffers always go to the main device."""
    place = device_of(facts.device_map, facts.device)
    portions: dict[str, list[Portion]] = {facts.device: []}
    for portion in predict_tensors(facts.meta, quantization, facts.dtype, facts.headers, facts.device_map):
        device = facts.device if portion.is_buffer else place(portion.name)
        portions.setdefault(device, []).append(portion)
    portions.setdefault(CPU, [])  # wherever a model computes, its process lives here
    largest = {device: max((each.arriving_bytes for each in here), default=0) for device, here in portions.items()}
    largest[facts.device] = max(largest[facts.device], *(header.nbytes for header in facts.headers.values()), 0)
    return Weights(quantization, {device: by_component(here) for device, here in portions.items()}, largest)


def plan_for(spec: ModelSpec, facts: Facts, weights: Weights, supply: Supply) -> Plan:
    """The needs of one configuration. Raises ConfigError where its numbers contradict each other or the model."""
    limit = context_limit(facts.hf_config)
    length = _length(spec, limit)
    kv_per_token = _kv_per_token(spec, facts, weights)
    fixed = {device: _without_cache(spec, facts, weights, device, length, supply) for device in weights.devices}
    kv_room = _kv_room(fixed, kv_per_token, supply)
    texts = texts_per_sequence(facts.hf_config)
    tokens = _kv_tokens(spec, length, texts * length, kv_room)
    devices = []
    for device, components in fixed.items():
        if kv_per_token[device]:
            components = components | {KV_CACHE: tokens * kv_per_token[device]}
        devices.append(_device_plan(device, components, weights, supply))
    return Plan(
        model=spec.name,
        architecture=type(facts.meta).__name__,
        parameters=facts.parameters,
        quantization=describe(weights.quantization),
        dtype=str(facts.dtype).removeprefix("torch."),
        devices=tuple(devices),
        checkpoint_bytes=facts.checkpoint_bytes,
        max_model_len=length,
        sequence_tokens=texts * length,
        max_sequences=spec.max_sequences,
        max_batch_tokens=facts.batch_tokens(spec),
        kv_tokens=tokens,
        kv_bytes_per_token=sum(kv_per_token.values()),
        longest_context=min(limit, kv_room // texts),
        most_sequences=kv_room // whole_blocks(texts * length),
    )


def context_limit(config: transformers.PretrainedConfig) -> int:
    """Positions the model was made for."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNBOUNDED_CONTEXT


def whole_blocks(tokens: int) -> int:
    """Tokens of the blocks that hold so many."""
    return -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def _length(spec: ModelSpec, limit: int) -> int:
    if spec.max_model_len is not None and spec.max_model_len > limit:
        raise ConfigError(
            f"model {spec.name!r}: max_model_len is {spec.max_model_len}, but the model was made for {limit} positions"
        )
    return spec.max_model_len or limit


def _kv_per_token(spec: ModelSpec, facts: Facts, weights: Weights) -> Counter[str]:
    """Bytes of one token by device. Layers whose weights are brought for each pass keep their cache where they run."""
    place = device_of(facts.device_map, facts.device)
    homes = layer_devices(facts.meta, kv_layers(facts.hf_config), place)
    is_offload = facts.device != CPU
    per_layer = layer_bytes_per_token(facts.hf_config, kv_dtype(spec, facts.dtype))
    found = Counter(dict.fromkeys(weights.devices, 0))
    for home in homes:
        found[facts.device if home == DISK or (home == CPU and is_offload) else home] += per_layer
    return found


def _without_cache(
    spec: ModelSpec, facts: Facts, weights: Weights, device: str, length: int, supply: Supply
) -> dict[str, int]:
    components = dict(weights.components[device])
    if device == DISK:
        return components
    if device == CPU:
        components |= {RUNTIME_CONTEXT: supply.runtime.anonymous, MAPPED_FILES: supply.runtime.file}
    if device == facts.device or device not in (CPU, DISK):
        step = facts.batch_tokens(spec)
        tokens = min(step, spec.max_sequences * length)
        if facts.hf_config.is_encoder_decoder:
            tokens += length  # a prompt that came in chunks is computed at once
        rows = min(spec.max_sequences, tokens)
        guesses = min(rows * spec.speculative_tokens, max(0, GUESSED_ROWS - rows), tokens - rows)
        scored = 0 if facts.hf_config.is_encoder_decoder else min(SCORED_ROWS, step)
        components[WORKSPACE] = workspace_bytes(step, spec.max_sequences, length)
        components[ACTIVATIONS] = activation_bytes(
            facts.hf_config, facts.widths, facts.dtype, tokens, rows + guesses, scored
        )
        if spec.cuda_graphs and _may_be_recorded(facts, weights):
            components[WORKSPACE] += logits_bytes(facts.hf_config, facts.dtype, rows)
            components[ACTIVATIONS] += recorded_bytes(facts.hf_config, facts.widths, facts.dtype, rows)
    return components


def _may_be_recorded(facts: Facts, weights: Weights) -> bool:
    """Whether one GPU has all of the model, whose steps may be recorded then (server/model/graphs.py)."""
    if facts.hf_config.is_encoder_decoder:
        return False
    return facts.device != CPU and not any(weights.bytes_on(each) for each in weights.devices if each != facts.device)


def _kv_room(fixed: Mapping[str, Mapping[str, int]], kv_per_token: Mapping[str, int], supply: Supply) -> int:
    """Tokens, in whole blocks, of the largest cache that fits beside everything else on every device."""
    fitting = [
        max(0, supply.available(device) - sum(components.values())) // kv_per_token[device]
        for device, components in fixed.items()
        if kv_per_token[device]
    ]
    return min(fitting, default=0) // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS


def _kv_tokens(spec: ModelSpec, length: int, sequence: int, kv_room: int) -> int:
    """As configured, or a share of the room: one full-length sequence at least, no more than can ever be in use."""
    tokens = spec.kv_cache_tokens
    if tokens is None:
        tokens = min(spec.max_sequences * sequence, max(sequence, int(kv_room * KV_SHARE)))
    elif tokens < sequence:
        raise ConfigError(
            f"model {spec.name!r}: kv_cache.tokens is {tokens}, too few for one sequence of max_model_len {length}, "
            f"which caches up to {sequence}"
        )
    return whole_blocks(tokens)


def _device_plan(device: str, components: dict[str, int], weights: Weights, supply: Supply) -> DevicePlan:
    loading = 0 if device == DISK else 2 * weights.largest[device]  # once as read and once in the making
    before_cache = weights.bytes_on(device) + components.get(RUNTIME_CONTEXT, 0) + components.get(MAPPED_FILES, 0)
    return DevicePlan(
        device=device,
        components=components,
        loading_bytes=loading,
        peak_bytes=max(before_cache + loading, sum(components.values())),
        free_bytes=supply.free.get(device, 0),
        promised_bytes=supply.promised.get(device, 0),
    )
