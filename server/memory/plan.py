"""What a model will need, before anything is loaded: from config.json and safetensors headers alone.

The plan says bytes by component, how many tokens the KV cache gets, and whether all of it fits the device. It runs as
the first step of every load and behind `halfbyte plan`. It measures nothing: ledger.py does, after loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch
import transformers

from quant import memory as weights
from quant.config import PRESETS, BitsAndBytesConfig, from_spec
from quant.headers import TensorHeader, checkpoint_files, read_checkpoint_headers
from server.errors import ConfigError, DoesNotFitError
from server.memory import machine
from server.memory.ledger import KV_CACHE
from server.records import KV_BLOCK_TOKENS, ModelSpec, Shortage

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_SHARE: Final = 0.25
"""Part of what the weights leave free that the KV cache takes, where `kv_cache.tokens` does not say."""
SMALLEST_CONTEXT: Final = 256
"""Below this many tokens a shorter context is no longer offered as a way to make a model fit."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The needs of one model on one device, in bytes by component, and what follows from them."""

    model: str
    device: str
    quantization: str
    components: dict[str, int]
    kv_tokens: int
    kv_bytes_per_token: int
    max_model_len: int
    loading_bytes: int
    """Held beside the final size while loading: the largest tensor, once as read and once in the making."""
    checkpoint_bytes: int
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def peak_bytes(self) -> int:
        return self.total_bytes + self.loading_bytes


def make_plan(
    spec: ModelSpec, available_bytes: int | None = None, *, promised: Mapping[str, int] | None = None
) -> Plan:
    """The plan of one model as configured; `available_bytes` stands in for what the device has free.

    `promised` are bytes by device that are free, and not for this model.

    Raises DoesNotFitError with the arithmetic and the nearest configurations that would fit; ConfigError for a bad
    value; the errors of `quant` for a checkpoint or a quantization config that is not accepted.
    """
    facts = _read_facts(spec)
    available = available_bytes if available_bytes is not None else free_bytes(facts.device)
    available = max(0, available - (promised or {}).get(facts.device, 0))
    plan = _plan(spec, facts, facts.config, available)
    if plan.peak_bytes > available:
        shortage = Shortage(plan.device, plan.peak_bytes, available)
        raise DoesNotFitError(_refusal(spec, facts, plan), shortage)
    return plan


def model_dtype(spec: ModelSpec, config: transformers.PretrainedConfig) -> torch.dtype:
    """The dtype of what is not quantized: the spec's, or with "auto" the checkpoint's own (float32 if it has none)."""
    if spec.dtype == "auto":
        own = getattr(config, "dtype", None)
        return own if isinstance(own, torch.dtype) else torch.float32
    if spec.dtype not in DTYPES:
        raise ConfigError(f"model {spec.name!r}: dtype is {spec.dtype!r}; accepted are auto, {', '.join(DTYPES)}")
    return DTYPES[spec.dtype]


def effective_quantization(
    spec: ModelSpec, config: transformers.PretrainedConfig, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """The spec's quantization, or the checkpoint's own where the spec has none; a preset computes in `dtype`.

    A checkpoint that is quantized already cannot be quantized again; asking for it is refused.
    """
    own = getattr(config, "quantization_config", None)
    if own is None:
        return from_spec(spec.quantization, compute_dtype=dtype)
    if spec.quantization is not None:
        raise ConfigError(
            f"model {spec.name!r} is quantized in its files already, and quantization is {spec.quantization!r}; "
            "leave quantization out to serve what the files hold"
        )
    fields = own if isinstance(own, dict) else own.to_dict()
    config_in_files: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(fields)
    return config_in_files


def resolve_device(spec: ModelSpec) -> str:
    """auto is the first CUDA device where there is one, else the CPU."""
    if spec.device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if spec.device == "cpu":
        return "cpu"
    if spec.device.partition(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"model {spec.name!r}: device is {spec.device!r}, but no CUDA device is here; use cpu or auto"
            )
        return spec.device if ":" in spec.device else "cuda:0"
    raise ConfigError(f"model {spec.name!r}: device is {spec.device!r}; accepted are auto, cpu, cuda and cuda:N")


def free_bytes(device: str) -> int:
    """Bytes a new model may take: the CUDA device's free memory, or the machine's, or what the control group leaves."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    available = machine.available()
    if available is None:
        raise ConfigError("the memory of this machine is unknown: /proc/meminfo has no MemAvailable")
    return available


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the files say, read once and used for every candidate configuration."""

    device: str
    dtype: torch.dtype
    hf_config: transformers.PretrainedConfig
    config: BitsAndBytesConfig | None
    meta: transformers.PreTrainedModel
    headers: dict[str, TensorHeader]
    checkpoint_bytes: int
    prequantized: bool


def _read_facts(spec: ModelSpec) -> _Facts:
    directory = Path(spec.path)
    hf_config = weights.read_config(directory)
    dtype = model_dtype(spec, hf_config)
    return _Facts(
        device=resolve_device(spec),
        dtype=dtype,
        hf_config=hf_config,
        config=effective_quantization(spec, hf_config, dtype),
        meta=weights.meta_model(hf_config, dtype),
        headers=read_checkpoint_headers(directory),
        checkpoint_bytes=sum(file.stat().st_size for file in checkpoint_files(directory)),
        prequantized=getattr(hf_config, "quantization_config", None) is not None,
    )


def _plan(spec: ModelSpec, facts: _Facts, config: BitsAndBytesConfig | None, available: int) -> Plan:
    components = dict(weights.predict_meta(facts.meta, config, facts.dtype, facts.headers, spec.device_map))
    loading = 2 * max((header.nbytes for header in facts.headers.values()), default=0)
    limit = context_limit(facts.hf_config)
    length = min(spec.max_model_len or limit, limit)
    if spec.max_model_len is not None and spec.max_model_len > limit:
        raise ConfigError(
            f"model {spec.name!r}: max_model_len is {spec.max_model_len}, but the model was made for {limit} positions"
        )
    per_token = kv_bytes_per_token(facts.hf_config, facts.dtype)
    tokens = spec.kv_cache_tokens
    if tokens is None:
        left = max(0, available - sum(components.values()) - loading)
        tokens = min(spec.max_sequences * length, max(length, int(left * KV_SHARE) // per_token))
    elif tokens < length:
        raise ConfigError(
            f"model {spec.name!r}: kv_cache.tokens is {tokens}, too few for one sequence of max_model_len {length}"
        )
    tokens = -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS  # the cache is made of whole blocks
    components[KV_CACHE] = tokens * per_token
    return Plan(
        model=spec.name,
        device=facts.device,
        quantization=describe(config),
        components=components,
        kv_tokens=tokens,
        kv_bytes_per_token=per_token,
        max_model_len=length,
        loading_bytes=loading,
        checkpoint_bytes=facts.checkpoint_bytes,
        available_bytes=available,
    )


def context_limit(config: transformers.PretrainedConfig) -> int:
    """Positions the model was made for; models without a limit of their own (ALiBi) get their `seq_length` or 2048."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def kv_bytes_per_token(config: transformers.PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token over all layers, in bytes."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon; its newer architecture has groups, but caches every head
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * head_dim * dtype.itemsize)


def describe(config: BitsAndBytesConfig | None) -> str:
    """A quantization in a word: the preset's name it equals in format, or "none"."""
    if config is None:
        return "none"
    if config.load_in_8bit:
        return "int8"
    return f"{config.bnb_4bit_quant_type}{'-dq' if config.bnb_4bit_use_double_quant else ''}"


def _refusal(spec: ModelSpec, facts: _Facts, plan: Plan) -> str:
    parts = ", ".join(f"{name} {size:,}" for name, size in plan.components.items())
    sentence = (
        f"model {spec.name!r} needs {plan.peak_bytes:,} bytes on {plan.device} ({parts}, while loading "
        f"{plan.loading_bytes:,}), but {plan.available_bytes:,} are free"
    )
    nearest = _nearest(spec, facts, plan)
    return sentence + (f"; what would fit: {' or '.join(nearest)}" if nearest else "; no other configuration would fit")


def _nearest(spec: ModelSpec, facts: _Facts, plan: Plan) -> list[str]:
    """The smallest steps that would make it fit: a shorter context as configured, else the largest format that fits."""
    shortest = msgspec.structs.replace(spec, max_model_len=SMALLEST_CONTEXT, kv_cache_tokens=SMALLEST_CONTEXT)
    smaller = _plan(shortest, facts, facts.config, plan.available_bytes)
    if smaller.peak_bytes <= plan.available_bytes:
        spare = plan.available_bytes - smaller.peak_bytes
        tokens = SMALLEST_CONTEXT + spare // plan.kv_bytes_per_token
        return [f"max_model_len {min(tokens, plan.max_model_len)}"]
    if facts.prequantized:
        return []
    fits = []
    for name in PRESETS:
        candidate = _plan(shortest, facts, from_spec(name, compute_dtype=facts.dtype), plan.available_bytes)
        if candidate.peak_bytes <= plan.available_bytes:
            fits.append((candidate.peak_bytes, f"quantization {name} with max_model_len {SMALLEST_CONTEXT}"))
    return [max(fits)[1]] if fits else []
