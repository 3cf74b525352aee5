"""Bytes of keys and values per token: the one place that derives them from a config.

What is predicted here is what server/model/attention.py allocates by shapes that a probe forward saw. Transformers'
cache classes, which serve architectures that never call our attention, hold the same per cached token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
import transformers
from torch import nn

from quant.kv import DTYPES, head_bytes
from quant.memory import refused
from server.errors import ConfigError
from server.records import ModelSpec

KEYS_AND_VALUES: Final = frozenset({"full_attention", "sliding_attention"})
"""What a config calls layers that keep keys and values and nothing else."""


def other_layers(text: Any) -> list[str]:
    """The types of a text config's layers that keep anything else: a state, a window of inputs."""
    return sorted(set(getattr(text, "layer_types", None) or ()) - KEYS_AND_VALUES)


def kv_dtype(spec: ModelSpec, computed: torch.dtype) -> torch.dtype:
    """What the cache keeps keys and values in: the spec's, or with "auto" the dtype they are computed in."""
    if spec.kv_cache_dtype == "auto":
        return computed
    if spec.kv_cache_dtype not in DTYPES:
        raise ConfigError(
            f"model {spec.name!r}: kv_cache.dtype is {spec.kv_cache_dtype!r}; accepted are auto, {', '.join(DTYPES)}"
        )
    return DTYPES[spec.kv_cache_dtype]


def layer_bytes_per_token(config: transformers.PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in one layer of a cache of this dtype, the scales of int8 included.

    In an encoder-decoder a token has them in one of two places of a decoder layer: those it is generated as in its
    self-attention, those it is read as in its attention to the encoder. So the figure holds for prompt and answer.
    """
    with _asking(config):
        text = config.get_text_config(decoder=True)
        heads = kv_heads(text)
        key, value = _head_sizes(text)
    return heads * (head_bytes(key, dtype) + head_bytes(value, dtype))


def kv_layers(config: transformers.PretrainedConfig) -> int:
    """Layers that keep keys and values."""
    with _asking(config):
        text = config.get_text_config(decoder=True)
        return int(getattr(text, "num_decoder_layers", None) or text.num_hidden_layers)


def _asking(config: transformers.PretrainedConfig) -> AbstractContextManager[None]:
    """A model without attention has no such sizes (Mamba), and one may have another in each layer (Gemma 4)."""
    return refused(
        f"architecture {config.model_type!r} cannot be served; accepted are models whose layers keep keys and values "
        "of one size, and its config names none"
    )


def kv_bytes_per_token(config: transformers.PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token over all layers."""
    return kv_layers(config) * layer_bytes_per_token(config, dtype)


def texts_per_sequence(config: transformers.PretrainedConfig) -> int:
    """How many texts of at most max_model_len tokens a sequence caches: an encoder-decoder's prompt and its answer."""
    return 2 if config.is_encoder_decoder else 1


def layer_devices(model: nn.Module, layers: int, device_of: Callable[[str], str]) -> list[str]:
    """Where each layer keeps its keys and values: with its weights, by the first list of modules of that length."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and "encoder" not in name.split("."):
            return [device_of(f"{name}.{index}") for index in range(layers)]
    return [device_of("")] * layers


def kv_heads(text: Any) -> int:
    """Heads of keys and values that are cached: as many as of queries unless the config says otherwise."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1  # Falcon; its newer architecture has groups, but caches every head
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _head_sizes(text: Any) -> tuple[int, int]:
    """Numbers in one head's key and value. Latent attention (DeepSeek) is cached expanded, as it is computed."""
    if getattr(text, "kv_lora_rank", None):
        return int(text.qk_nope_head_dim + text.qk_rope_head_dim), int(text.v_head_dim)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(size), int(size)
