"""What is fused computes what transformers does, keeps its names and tensors; what is not known is left alone."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from quant import BitsAndBytesConfig, Linear4bit
from server.model.fuse import FusedMLP, FusedNorm, fuse
from tests.tiny_models import VOCABULARY, tiny_model

FUSED = {
    "llama": {"FusedLlamaRMSNorm": 5, "FusedLlamaMLP": 2},
    "mistral": {"FusedMistralRMSNorm": 5, "FusedMistralMLP": 2},
    "qwen3": {"FusedQwen3RMSNorm": 9, "FusedQwen3MLP": 2},
    "mixtral": {"FusedMixtralRMSNorm": 5},
    "phi3": {"FusedPhi3RMSNorm": 5},
    "gemma3_text": {},
    "gpt2": {},
    "bloom": {},
}
IDS = torch.tensor([[5, 77, 9, 130, 8, 8, 310, 44, VOCABULARY - 1]])


def fused_types(model: nn.Module) -> dict[str, int]:
    return dict(Counter(type(m).__name__ for m in model.modules() if isinstance(m, (FusedNorm, FusedMLP))))


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits.float()  # type: ignore[no-any-return, operator]


def shaken(architecture: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model whose one-dimensional weights, norms among them, are neither ones nor zeros."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", FUSED)
def test_a_fused_model_is_the_same_model(architecture: str, dtype: torch.dtype) -> None:
    model = shaken(architecture, dtype)
    expected, tensors = logits(model), model.state_dict(keep_vars=True)
    names = [name for name, _ in model.named_modules()]
    assert fuse(model) == sum(FUSED[architecture].values())
    assert fused_types(model) == FUSED[architecture]
    assert fuse(model) == 0, "nothing is fused twice"
    error = ((logits(model) - expected).norm() / expected.norm()).item()
    assert error < {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert [name for name, _ in model.named_modules()] == names
    kept = model.state_dict(keep_vars=True)
    assert list(kept) == list(tensors)
    assert all(kept[name] is tensor for name, tensor in tensors.items())


def test_modules_answer_as_their_originals() -> None:
    """In 16 bits all but always bit for bit; tests/quant/test_rows.py has the shapes and the bounds."""
    config = transformers.LlamaConfig(hidden_size=96, intermediate_size=200)
    for dtype in (torch.float32, torch.bfloat16):
        parts = nn.ModuleList([LlamaRMSNorm(96), LlamaMLP(config)]).to(dtype)
        parts[0].weight.data = torch.randn(96).to(dtype)
        originals = copy.deepcopy(parts)
        assert fuse(parts) == 2
        for x in (torch.randn(1, 1, 96), torch.randn(2, 30, 96), torch.randn(96)):
            for part, original in zip(parts, originals, strict=True):
                with torch.inference_mode():
                    found, expected = part(x.to(dtype)), original(x.to(dtype))
                assert found.dtype == dtype
                tolerance = 2e-6 if dtype == torch.float32 else 2**-6
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 0.1)


def test_packed_layers_stay_the_ones_of_the_mlp() -> None:
    model = tiny_model("llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for mlp in [module for module in model.modules() if isinstance(module, LlamaMLP)]:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(mlp, name, Linear4bit.from_float(getattr(mlp, name), config))
    expected = logits(model)
    assert fuse(model) == 7
    assert isinstance(model.get_submodule("model.layers.0.mlp.gate_proj"), Linear4bit)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_other_calls_are_transformers_own() -> None:
    model = shaken("llama", torch.float32)
    original = copy.deepcopy(model)
    fuse(model)
    for each in (model, original):
        each(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    for found, expected in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)  # type: ignore[arg-type]
    with torch.inference_mode():
        norm = model.get_submodule("model.norm")
        mixed = torch.randn(2, 128, dtype=torch.bfloat16)
        assert torch.equal(norm(mixed), original.get_submodule("model.norm")(mixed)), "a weight of another dtype"


def test_copies_and_moves() -> None:
    model = shaken("llama", torch.float32)
    fuse(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    twin.to(torch.bfloat16)
    assert ((logits(twin) - logits(model)).norm() / logits(model).norm()).item() < 0.03
    twin.to("meta")
    parts = [twin.get_submodule(name) for name in ("model.norm", "model.layers.0.mlp")]
    with torch.inference_mode():
        assert all(part(torch.randn(3, 128, dtype=torch.bfloat16, device="meta")).is_meta for part in parts)


class ShiftedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + hidden_states * 1e-3


class LateRoundingNorm(LlamaRMSNorm):
    """As Llama's, but for the rounding before the weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * x).to(hidden_states.dtype)


class ScaledMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.config.initializer_range  # type: ignore[no-any-return]


class SwappedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # type: ignore[no-any-return]


def unknown() -> list[nn.Module]:
    config = transformers.LlamaConfig(hidden_size=96, intermediate_size=200)
    late = LateRoundingNorm(96).bfloat16()
    late.weight.data = torch.randn(96).bfloat16()
    hooked, hooked_part = LlamaRMSNorm(96), LlamaMLP(config)
    hooked.forward = hooked.forward  # type: ignore[method-assign]
    hooked_part.up_proj.forward = hooked_part.up_proj.forward
    gelu = LlamaMLP(transformers.LlamaConfig(hidden_size=96, intermediate_size=200, hidden_act="gelu"))
    extra = LlamaMLP(config)
    extra.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return [
        *(GemmaRMSNorm(96), ShiftedNorm(96), late, nn.LayerNorm(96), nn.RMSNorm(96), hooked, hooked_part),
        *(ScaledMLP(config), SwappedMLP(config), gelu, extra, LlamaRMSNorm(96).to("meta"), LlamaRMSNorm(96).double()),
    ]


@pytest.mark.parametrize("which", range(13))
def test_whatever_is_not_known_is_left_alone(which: int) -> None:
    module = unknown()[which]
    kind = type(module)
    assert fuse(module) == 0
    assert type(module) is kind


def test_torchs_random_numbers_are_left_alone() -> None:
    model = tiny_model("llama")
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before)


class GatedNorm(LlamaRMSNorm):
    """Llama's norm where there is no gate, as in Mamba's layers."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if gate is None else x * nn.functional.silu(gate))  # type: ignore[no-any-return]


class NeedsItsGate(GatedNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, gate.to(x.dtype))  # type: ignore[union-attr]


class Fails(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AttributeError("it has no such thing")


@pytest.mark.parametrize("kind", [GatedNorm, NeedsItsGate, Fails])
def test_a_norm_that_may_be_given_more_than_rows_is_left_alone(kind: type[LlamaRMSNorm]) -> None:
    module = kind(64)
    assert fuse(module) == 0
    assert type(module) is kind
