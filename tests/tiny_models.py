"""Tiny randomly initialised models, built from transformers configs: what tests load instead of downloads.

Not a test. Weights are seeded and in float32 unless told otherwise; every linear layer's input is a multiple of 64.
"""

from __future__ import annotations

from pathlib import Path

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
}


def tiny_config(architecture: str, **changes: object) -> transformers.PretrainedConfig:
    """The transformers config of a two-layer model of this architecture."""
    common: dict[str, object] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if architecture in ("llama", "mistral", "qwen3"):
        common |= {"num_hidden_layers": 2, "max_position_embeddings": 512}
    return transformers.AutoConfig.for_model(architecture, **(common | CONFIGS[architecture] | changes))


def tiny_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> transformers.PreTrainedModel:
    """A randomly initialised model in eval mode; weights are scaled up so that logits are far from ties."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
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
