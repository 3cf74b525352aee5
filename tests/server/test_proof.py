"""How near to a model's own logits a runner must be, and what becomes of architectures that ignore positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit
from server.model.probe import choose_runner
from server.model.proof import LARGEST_DIFFERENCE, allowed_difference
from server.model.runner import PagedRunner
from server.records import ModelSpec
from tests.server.engines import Engine, generate
from tests.tiny_models import VOCABULARY


def model_with(linear: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 64), linear).to(dtype)


def packed(compute_dtype: torch.dtype, **options: Any) -> nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, **options)
    return Linear4bit.from_float(nn.Linear(64, 64), config)


INT8 = Linear8bit.from_float(nn.Linear(64, 64), BitsAndBytesConfig(load_in_8bit=True))
EXACT, ROUNDED = 1e-3, 0.03


@pytest.mark.parametrize(
    ("model", "cache", "allowed"),
    [
        (model_with(nn.Linear(64, 64)), "auto", EXACT),
        (model_with(nn.Linear(64, 64)), "float32", EXACT),
        (model_with(packed(torch.float32)), "auto", EXACT),
        (model_with(nn.Linear(64, 64)), "bfloat16", ROUNDED),
        (model_with(nn.Linear(64, 64), torch.float16), "auto", ROUNDED),
        (model_with(packed(torch.bfloat16)), "auto", ROUNDED),
        (model_with(nn.Linear(64, 64)), "int8", LARGEST_DIFFERENCE),
        (model_with(INT8), "auto", LARGEST_DIFFERENCE),
        (model_with(packed(torch.float32, bnb_4bit_activations="int8")), "auto", LARGEST_DIFFERENCE),
    ],
)
def test_what_is_allowed_depends_on_what_is_rounded(model: nn.Module, cache: str, allowed: float) -> None:
    assert allowed_difference(model, cache) == allowed


def test_positions_that_a_model_ignores_are_seen_in_float32() -> None:
    """Blenderbot-small's decoder counts positions itself: packed, it gives logits that are hardly other ones."""
    config = transformers.BlenderbotSmallConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
        max_position_embeddings=128,
        is_decoder=True,
    )
    torch.manual_seed(3)
    model: Any = transformers.BlenderbotSmallForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(10)
    prompt = torch.randint(3, VOCABULARY, (12,)).tolist()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, **options)[0, len(prompt) :].tolist()
    runner = choose_runner(model, ModelSpec("m", "", max_batch_tokens=64), blocks=32, max_model_len=64)
    assert not isinstance(runner, PagedRunner)
    engine = Engine(runner, max_batch_tokens=64)
    engine.serve([generate("a", prompt, 12), generate("b", prompt[:5], 12)])
    assert list(engine.answers["a"]) == expected
