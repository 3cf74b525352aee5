"""Well-known models by the facts of their config.json, and figures that were worked out from those by hand.

Not a test. `linear` counts the numbers in layers that are quantized, matrix by matrix; `others` those that are not
(T5's `wo` is among them). Parameter counts are the published ones. Nothing here is computed by the code that it is
compared with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Known:
    """One model; sizes in numbers, not bytes."""

    config: dict[str, Any]
    parameters: int
    linear: int
    others: int
    kv_per_token: int
    """Keys and values of one token over all layers."""
    context: int
    tied_in_config: int = 0
    """Numbers that are a tensor of their own in the files only: by its config, transformers ties T5's."""


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int) -> Any:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }


CATALOGUE: dict[str, Known] = {
    "Llama-2-7B": Known(
        config=_llama(4096, 11008, 32, 32, 32, 32000, 4096),
        parameters=6_738_415_616,
        linear=32 * (4 * 4096 * 4096 + 3 * 4096 * 11008),
        others=2 * 32000 * 4096 + 65 * 4096,
        kv_per_token=32 * 2 * 32 * 128,
        context=4096,
    ),
    "Llama-3.1-8B": Known(
        config=_llama(4096, 14336, 32, 32, 8, 128256, 131072),
        parameters=8_030_261_248,
        linear=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        others=2 * 128256 * 4096 + 65 * 4096,
        kv_per_token=32 * 2 * 8 * 128,
        context=131072,
    ),
    "Llama-3.1-70B": Known(
        config=_llama(8192, 28672, 80, 64, 8, 128256, 131072),
        parameters=70_553_706_496,
        linear=80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672),
        others=2 * 128256 * 8192 + 161 * 8192,
        kv_per_token=80 * 2 * 8 * 128,
        context=131072,
    ),
    "Llama-3.1-405B": Known(
        config=_llama(16384, 53248, 126, 128, 8, 128256, 131072),
        parameters=405_853_388_800,
        linear=126 * (2 * 16384 * 16384 + 2 * 16384 * 1024 + 3 * 16384 * 53248),
        others=2 * 128256 * 16384 + 253 * 16384,
        kv_per_token=126 * 2 * 8 * 128,
        context=131072,
    ),
    "Mistral-7B": Known(
        config=_llama(4096, 14336, 32, 32, 8, 32000, 32768) | {"model_type": "mistral", "sliding_window": 4096},
        parameters=7_241_732_096,
        linear=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        others=2 * 32000 * 4096 + 65 * 4096,
        kv_per_token=32 * 2 * 8 * 128,
        context=32768,
    ),
    "BLOOM-7B1": Known(
        config={
            "model_type": "bloom",
            "hidden_size": 4096,
            "n_layer": 30,
            "n_head": 32,
            "vocab_size": 250880,
            "seq_length": 2048,
        },
        parameters=7_069_016_064,
        linear=30 * (3 * 4096 * 4096 + 4096 * 4096 + 2 * 4096 * 16384),
        others=250880 * 4096 + 2 * 4096 + 30 * (4 * 4096 + 3 * 4096 + 4096 + 16384 + 4096) + 2 * 4096,
        kv_per_token=30 * 2 * 32 * 128,
        context=2048,
    ),
    "GPT-J-6B": Known(
        config={
            "model_type": "gptj",
            "n_embd": 4096,
            "n_layer": 28,
            "n_head": 16,
            "rotary_dim": 64,
            "n_positions": 2048,
            "vocab_size": 50400,
            "tie_word_embeddings": False,
        },
        parameters=6_050_882_784,
        linear=28 * (4 * 4096 * 4096 + 2 * 4096 * 16384),
        others=2 * 50400 * 4096 + 50400 + 28 * (2 * 4096 + 16384 + 4096) + 2 * 4096,
        kv_per_token=28 * 2 * 16 * 256,
        context=2048,
    ),
    "Flan-T5-XXL": Known(
        config={
            "model_type": "t5",
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        parameters=11_135_332_352,
        linear=24 * (3 * 4 * 4096 * 4096 + 2 * 2 * 4096 * 10240),
        others=2 * 32128 * 4096 + 2 * 24 * 10240 * 4096 + 2 * 32 * 64 + (24 * 2 + 24 * 3 + 2) * 4096,
        tied_in_config=32128 * 4096,
        kv_per_token=24 * 2 * 64 * 64,
        context=2048,
    ),
    "Mixtral-8x7B": Known(
        config=_llama(4096, 14336, 32, 32, 8, 32000, 32768)
        | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
        parameters=46_702_792_704,
        linear=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 3 * 4096 * 14336),
        others=2 * 32000 * 4096 + 65 * 4096 + 32 * 8 * 4096,
        kv_per_token=32 * 2 * 8 * 128,
        context=32768,
    ),
    "Qwen3-30B-A3B": Known(
        config=_llama(2048, 6144, 48, 32, 4, 151936, 40960)
        | {
            "model_type": "qwen3_moe",
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        parameters=30_532_122_624,
        linear=48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 3 * 2048 * 768),
        others=2 * 151936 * 2048 + 97 * 2048 + 48 * (2 * 128 + 128 * 2048),
        kv_per_token=48 * 2 * 4 * 128,
        context=40960,
    ),
    "GPT-OSS-20B": Known(
        config=_llama(2880, 2880, 24, 64, 8, 201088, 131072)
        | {
            "model_type": "gpt_oss",
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        parameters=20_914_757_184,
        linear=24 * (2 * 2880 * 4096 + 2 * 2880 * 512 + 32 * 3 * 2880 * 2880),
        others=2 * 201088 * 2880
        + 49 * 2880
        + 24 * (4096 + 2 * 512 + 2880 + 64 + 32 * 2880 + 32 + 32 * (2 * 2880 + 2880)),
        kv_per_token=24 * 2 * 8 * 64,
        context=131072,
    ),
}


def write_config(name: str, directory: Path) -> Path:
    """The model's directory as a download without weights would leave it: one config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CATALOGUE[name].config | {"dtype": "bfloat16"}))
    return directory
