"""Fused attention modules: the bits of transformers' own, in every batch; what is not known is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from quant import BitsAndBytesConfig, Linear4bit
from server.model import fuse_attention
from server.model.attention import ATTENTION_NAME, register
from server.model.batch import Batch, Chunk, Draw
from server.model.fuse import fuse
from server.model.fuse_attention import FusedAttention
from server.model.probe import choose_runner
from server.model.runner import PagedRunner
from server.records import ModelSpec, SamplingParams
from tests.tiny_models import VOCABULARY, tiny_model

FUSED = {"llama": 2, "mistral": 2, "qwen3": 2, "gemma3_text": 2, "mixtral": 2, "phi3": 0, "gpt_neox": 0, "gpt2": 0}
DRAW = Draw(SamplingParams(max_tokens=8, temperature=0.0), seed=0, index=0)
CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def attention_modules(model: nn.Module) -> list[FusedAttention]:
    return [module for module in model.modules() if isinstance(module, FusedAttention)]


def packed(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, Linear4bit.from_float(module, CONFIG))
    return model


def runner_of(model: transformers.PreTrainedModel, kv_dtype: str = "auto") -> PagedRunner:
    spec = ModelSpec("m", "", max_batch_tokens=64, max_sequences=4, kv_cache_dtype=kv_dtype)
    runner = choose_runner(model, spec, blocks=16, max_model_len=64)
    assert isinstance(runner, PagedRunner)
    return runner


def all_logits(runner: PagedRunner) -> torch.Tensor:
    """Two prompts, one of them in chunks, then a token of each."""
    prompts = [[5, 77, 9, 130, 8, 8, 310, 44, VOCABULARY - 1, 12], [90, 3, 7]]
    steps = [
        (Chunk("a", tuple(prompts[0][:4]), 0, (3, 0), DRAW),),
        (Chunk("a", tuple(prompts[0][4:]), 4, (3, 0), DRAW), Chunk("b", tuple(prompts[1]), 0, (7,), DRAW)),
        (Chunk("a", (11,), 10, (3, 0), DRAW), Chunk("b", (12,), 3, (7,), DRAW)),
    ]
    return torch.cat([runner.logits(Batch(chunks)) for chunks in steps])


@pytest.mark.parametrize(
    ("dtype", "is_packed"), [(torch.float32, False), (torch.float16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("architecture", FUSED)
def test_a_fused_model_gives_the_same_bits(
    architecture: str, dtype: torch.dtype, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture).to(dtype)
    runner = runner_of(packed(model) if is_packed else model)
    assert len(attention_modules(model)) == FUSED[architecture]
    found = all_logits(runner)
    monkeypatch.setattr(fuse_attention, "_is_packed_row", lambda *_: False)
    assert torch.equal(all_logits(runner), found)


def test_queries_that_are_scaled_from_a_far_position_on_are_left_alone() -> None:
    """Before that position such a module hands on what Llama's does."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 16384}
    config = transformers.Ministral3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=32768,
        rope_parameters={**yarn, "llama_4_scaling_beta": 0.1},
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    runner_of(model)
    assert not attention_modules(model)


def test_heads_that_are_turned_in_part_are_left_alone() -> None:
    """Their angles are narrower than a head, in the model; on their own they turn whole heads as Llama's do."""
    config = transformers.Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[90, 3, 7]]), use_cache=False).logits[0, -1]
    found = all_logits(runner_of(model))[2]
    assert not attention_modules(model)
    torch.testing.assert_close(found, expected)


def test_calls_without_our_context_are_transformers_own() -> None:
    model = tiny_model("llama")
    own = model.config._attn_implementation
    original = copy.deepcopy(model)
    runner_of(model)
    assert attention_modules(model)
    model.set_attn_implementation(own)
    for each in (model, original):
        each(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).logits.square().sum().backward()
    for found, expected in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


class Scaled(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states * 1.01, *args, **kwargs)


class Positioned(LlamaAttention):
    """Whose result depends on positions beyond the angles, as Llama 4's temperature does."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        factor = 1 + 0.01 * (kwargs["position_ids"] > 1000).to(hidden_states.dtype)[..., None]
        output, weights = super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return output * factor, weights


class Unturned(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return super().forward(hidden_states, position_embeddings=(torch.ones_like(cos), sin), **kwargs)


class Crossed(LlamaAttention):
    """Keys and values exchanged."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.k_proj, self.v_proj = self.v_proj, self.k_proj


@pytest.fixture
def config() -> transformers.LlamaConfig:
    register()
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    config._attn_implementation = ATTENTION_NAME
    return config


@pytest.mark.parametrize("kind", [Scaled, Positioned, Unturned])
def test_what_computes_something_else_is_left_alone(kind: Any, config: transformers.LlamaConfig) -> None:
    module = kind(config, 0)
    assert fuse(module) == 0
    assert type(module) is kind


def test_what_is_the_same_under_another_name_is_fused(config: transformers.LlamaConfig) -> None:
    for kind in (LlamaAttention, Crossed):  # exchanged layers are that module's own affair: names say what is what
        assert fuse(kind(config, 0)) == 1
    hooked, with_parameter = LlamaAttention(config, 0), LlamaAttention(config, 0)
    hooked.q_proj.forward = hooked.q_proj.forward
    with_parameter.register_parameter("sinks", nn.Parameter(torch.ones(4)))
    for module in (hooked, with_parameter, LlamaAttention(config, 0).to("meta")):
        assert fuse(module) == 0
    config._attn_implementation = "eager"
    assert fuse(LlamaAttention(config, 0)) == 0, "attention that is not ours"


def test_a_dropout_of_training_is_no_reason(config: transformers.LlamaConfig) -> None:
    config.attention_dropout = 0.5
    module = LlamaAttention(config, 0).train()
    assert fuse(module) == 1
    assert module.training
