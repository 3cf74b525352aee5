"""Tiny randomly initialised models, built from transformers configs: what tests load instead of downloads.

Not a test. Weights are seeded and in float32 unless told otherwise; every linear layer's input is a multiple of 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320

CONFIGS: dict[str, dict[str, object]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "bloom": {"hidden_size": 128, "n_head": 4, "n_layer": 2},
    "gptj": {"n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16, "n_positions": 256},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "t5": {
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 192,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 1,
        "initializer_factor": 0.5,  # its own start is wide already
        "feed_forward_proj": "gated-gelu",  # as Flan-T5 has it
        "tie_word_embeddings": False,
    },
}
"""The architectures that most tests go over."""

_LLAMA_LIKE = CONFIGS["llama"]
_TOKENS: dict[str, object] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TWO_LAYERS: dict[str, object] = {"num_hidden_layers": 2, "max_position_embeddings": 512}
IMAGE_TOKEN = VOCABULARY - 1
IMAGE_TOKENS = 4
"""How many positions one image of the vision-language model takes."""

MORE_CONFIGS: dict[str, dict[str, object]] = {
    "phi3": _TWO_LAYERS | _LLAMA_LIKE,
    "gemma3_text": _TWO_LAYERS
    | _LLAMA_LIKE
    | {"head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": _TWO_LAYERS | {"hidden_size": 128, "ffn_dim": 192, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "gpt_neox": _TWO_LAYERS | {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4},
    "falcon": _TWO_LAYERS | {"hidden_size": 128, "num_attention_heads": 4},
    "mpt": {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "bart": {
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 192,
        "decoder_ffn_dim": 192,
        "max_position_embeddings": 256,
        "decoder_start_token_id": 2,
        "forced_bos_token_id": 5,
        "forced_eos_token_id": None,
    },
    "mixtral": _TWO_LAYERS | _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _TWO_LAYERS
    | _LLAMA_LIKE
    | {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _TWO_LAYERS
    | _LLAMA_LIKE
    | {
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llava": {
        "text_config": {"model_type": "llama"} | _TOKENS | _TWO_LAYERS | _LLAMA_LIKE,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 64,
        },
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": IMAGE_TOKENS,
    },
}
"""The others: mixtures of experts, another encoder-decoder, a vision-language model, and relatives of the first."""


def tiny_config(architecture: str, **changes: object) -> transformers.PretrainedConfig:
    """The transformers config of a two-layer model of this architecture."""
    common = dict(_TOKENS)
    if architecture in ("llama", "mistral", "qwen3"):
        common |= _TWO_LAYERS
    return transformers.AutoConfig.for_model(
        architecture, **(common | (CONFIGS | MORE_CONFIGS)[architecture] | changes)
    )


def auto_class(architecture: str) -> Any:
    """The transformers class that builds and loads a model of this architecture with its head."""
    return {
        "t5": transformers.AutoModelForSeq2SeqLM,
        "bart": transformers.AutoModelForSeq2SeqLM,
        "llava": transformers.AutoModelForImageTextToText,
    }.get(architecture, transformers.AutoModelForCausalLM)


def tiny_inputs(architecture: str, rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Random arguments of forward and generate: tokens [rows, length], and an image per row where the model sees.

    Encoder-decoders take tokens of an answer beside them: `answered`.
    """
    tokens = torch.randint(3, 259, (rows, length))
    if architecture != "llava":
        return {"input_ids": tokens}
    tokens[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
    return {"input_ids": tokens, "pixel_values": torch.randn(rows, 3, 28, 28)}


def answered(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random arguments of a forward call alone: what an encoder-decoder's decoder reads, [rows, 5]; else nothing."""
    return {"decoder_input_ids": tokens.roll(1)[:, :5]} if model.config.is_encoder_decoder else {}


def tiny_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> transformers.PreTrainedModel:
    """A randomly initialised model in eval mode; weights are scaled up so that logits are far from ties."""
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = auto_class(architecture).from_config(tiny_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def save_tiny(
    architecture: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """Writes a tiny model with a byte-level tokenizer as a transformers checkpoint; returns the path."""
    model = tiny_model(architecture, seed=seed, dtype=dtype, **changes)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, ids 3..258, after <pad>, <s> and </s>."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return fast
