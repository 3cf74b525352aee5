"""Decoder layers in one call: the bits of their parts in calls of their own; what is not known is left alone."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import quant
from quant import BitsAndBytesConfig, Linear4bit, Linear8bit
from quant.chain import Chain, Run
from quant.direct import Workspace
from server.model import fuse_layer, probe
from server.model.attention import ATTENTION_NAME, register
from server.model.batch import Batch, Chunk
from server.model.fuse import fuse
from server.model.fuse_layer import FusedLayer
from server.model.layer_run import LayerRun
from server.model.runner import PagedRunner
from tests.server.test_fuse_attention import DRAW, all_logits, runner_of
from tests.tiny_models import VOCABULARY, tiny_model

LAYERS = {"llama": 2, "mistral": 2, "qwen3": 2, "gemma3_text": 0, "mixtral": 0, "phi3": 0, "gpt2": 0}
BF16 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
CONFIGS = {
    "nf4-dq": BitsAndBytesConfig(**BF16, bnb_4bit_use_double_quant=True),
    "nf4-int8": BitsAndBytesConfig(**BF16, bnb_4bit_activations="int8"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def packed(
    architecture: str, config: BitsAndBytesConfig, dtype: torch.dtype = torch.bfloat16
) -> transformers.PreTrainedModel:
    kind: Any = Linear8bit if config.load_in_8bit else Linear4bit
    model = tiny_model(architecture).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, kind.from_float(module, config))
    return model


def fused_layers(model: nn.Module) -> list[FusedLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


@pytest.fixture(autouse=True)
def _all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last layer that is computed for wanted rows alone has other bits: few rows in bfloat16 go another way
    (test_last_layer.py)."""
    monkeypatch.setattr(probe, "find_last_layer", lambda *_: None)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call: the layers that run in it, and the rows."""
    seen: list[tuple[int, int]] = []
    original = Run.__call__

    def run(self: Run, chains: int | None = None) -> None:
        halves: list[Chain] = self._kept
        seen.append((len(halves) // 2, halves[0].rows))
        original(self, chains)

    monkeypatch.setattr(Run, "__call__", run)
    return seen


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_a_chained_model_gives_the_same_bits(
    architecture: str, config: str, runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(architecture, CONFIGS[config])
    runner = runner_of(model)
    assert len(fused_layers(model)) == LAYERS[architecture]
    count = LAYERS[architecture]
    runs.clear()
    found = all_logits(runner)
    assert runs == [(count, rows) for rows in (4, 9, 2) if count]
    for each in fused_layers(model):
        vars(each).pop("_follower", None)
    runs.clear()
    assert torch.equal(all_logits(runner), found)
    assert runs == [(1, 4)] * count + [(count, rows) for rows in (9, 2) if count], "a step to learn who follows whom"
    monkeypatch.setattr(fuse_layer, "MOST_ROWS", 0)
    assert torch.equal(all_logits(runner), found)
    assert len(runs) == 2 + count or not count


@pytest.mark.parametrize("kv_dtype", ["int8", "float32"])
def test_over_a_cache_of_another_dtype_too(
    kv_dtype: str, runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(packed("qwen3", CONFIGS["nf4-dq"]), kv_dtype)
    runs.clear()
    found = all_logits(runner)
    assert [rows for _, rows in runs] == [4, 9, 2]
    monkeypatch.setattr(fuse_layer, "MOST_ROWS", 0)
    assert torch.equal(all_logits(runner), found)


def test_in_float32_too(runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    runner = runner_of(packed("llama", config, torch.float32))
    runs.clear()
    found = all_logits(runner)
    assert runs
    monkeypatch.setattr(fuse_layer, "MOST_ROWS", 0)
    assert torch.equal(all_logits(runner), found)


def test_batches_of_many_sizes_use_few_chains(runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.fuse_layer._GROUPS_KEPT", 4)
    monkeypatch.setattr(probe, "find_shortcut", lambda *_: None)  # who looks at each layer makes chains of its own
    model = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    prompt = [5, 77, 9, 130, 8, 8, 310, 44, VOCABULARY - 1, 12]
    whole = runner.logits(Batch((Chunk("a", tuple(prompt), 0, (1,), DRAW),)))
    for rows in (1, 2, 3, 4, 5, 6, 1):
        runner.logits(Batch((Chunk("b", tuple(prompt[:rows]), 0, (2,), DRAW),)))
    assert {rows for _, rows in runs} >= {1, 2, 3, 4, 5, 6, 10}
    again = runner.logits(Batch((Chunk("a", tuple(prompt), 0, (3,), DRAW),)))
    assert torch.equal(again, whole)
    first, second = (layer.__dict__["_state"] for layer in fused_layers(model))
    assert [rows for rows, *_ in first.groups] == [5, 6, 1, 10]  # those used last
    gc.collect()
    learnt = {rows for rows, *_ in second.groups}  # whom it follows
    assert {rows for rows, *_ in second.chains} == {5, 6, 1, 10} | learnt, "and no chains beside theirs"
    assert len(learnt) == 1


def step(runner: PagedRunner) -> torch.Tensor:
    return runner.logits(Batch((Chunk("a", (5, 77, 9), 0, (1,), DRAW),)))


def test_what_a_layer_holds_may_change(runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights, norms, settings: the next step is that of the model as it is."""
    model = packed("qwen3", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    layer: Any = fused_layers(model)[0]

    def changed(before: torch.Tensor) -> torch.Tensor:
        runs.clear()
        found = step(runner)
        assert runs
        assert not torch.equal(found, before)
        with monkeypatch.context() as patch:
            patch.setattr(fuse_layer, "MOST_ROWS", 0)
            assert torch.equal(step(runner), found)
        return found

    logits = step(runner)
    layer.mlp.up_proj.quantize(torch.randn(layer.mlp.up_proj.matrix_shape).bfloat16() * 0.3)
    logits = changed(logits)
    layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight * 1.5)
    logits = changed(logits)
    with torch.no_grad():
        layer.post_attention_layernorm.weight.mul_(0.5)
    logits = changed(logits)
    layer.self_attn.o_proj.activations = "int8"
    logits = changed(logits)
    layer.self_attn.q_norm.weight = nn.Parameter(layer.self_attn.q_norm.weight * 2)
    logits = changed(logits)
    model.model.layers[0].mlp.down_proj = Linear8bit.from_float(
        nn.Linear(layer.mlp.down_proj.matrix_shape[1], layer.mlp.down_proj.matrix_shape[0], bias=False).bfloat16(),
        CONFIGS["int8"],
    )
    changed(logits)


def test_batch_invariance_is_heeded_from_step_to_step(runs: list[tuple[int, int]], batch_invariant: Any) -> None:
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))

    def first_row() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(  # type: ignore[return-value]
            runner.logits(Batch(tuple(Chunk(str(i), (5,), 0, (i,), DRAW) for i in range(rows))))[0] for rows in (1, 4)
        )

    step(runner)
    first_row()  # chains that know nothing of it
    quant.set_batch_invariant(True)
    one, four = first_row()
    assert torch.equal(one, four)
    assert runs


@pytest.mark.parametrize("which", ["hook", "linear", "adapter", "forward"])
def test_a_layer_that_does_more_goes_its_own_way(which: str, runs: list[tuple[int, int]]) -> None:
    model = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    layer: Any = fused_layers(model)[0]
    calls: list[str] = []
    if which == "hook":
        layer.mlp.register_forward_hook(lambda *_: calls.append("hook"))
    elif which == "linear":
        N, K = layer.mlp.up_proj.matrix_shape
        layer.mlp.up_proj = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    elif which == "adapter":
        inner = layer.mlp.gate_proj
        layer.mlp.gate_proj = nn.Sequential(inner)
    else:
        forward = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda x: (calls.append("forward"), forward(x))[1]
    runs.clear()
    step(runner)
    assert runs == [(1, 3)], "the other layer"
    assert calls == ([which] if which in ("hook", "forward") else [])


def test_who_looks_between_two_layers_sees_what_is_there(runs: list[tuple[int, int]]) -> None:
    """A hook on a layer parts it from the one before, and sees what it would without chains."""
    model = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    expected = step(runner)
    seen: list[torch.Tensor] = []
    second = fused_layers(model)[1]
    hook = second.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    runs.clear()
    assert torch.equal(step(runner), expected)
    assert runs == [(1, 3), (1, 3)]
    hook.remove()
    first = fused_layers(model)[0]
    hook = first.register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))
    runs.clear()
    assert torch.equal(step(runner), expected)
    assert torch.equal(*seen)
    hook.remove()
    step(runner)
    assert runs[-1] == (2, 3)


def test_structs_are_pointed_anew_only_where_something_moved(
    runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence that grows within its blocks finds all in its place; so does nobody after another run of the layers,
    or beside more sequences, or with wider tables."""
    pointed: list[int] = []
    original = LayerRun._point

    def point(self: LayerRun, *given: Any) -> None:
        pointed.append(len(self.chains))
        original(self, *given)

    monkeypatch.setattr(LayerRun, "_point", point)
    model = packed("llama", CONFIGS["nf4-dq"])
    runner, other = runner_of(model), runner_of(packed("llama", CONFIGS["nf4-dq"]))
    second = fused_layers(model)[1]

    def decode(start: int, *blocks: int) -> None:
        batch = Batch((Chunk("a", (5 + start,), start, blocks, DRAW), Chunk("b", (7,), start, (9,), DRAW)))
        assert torch.equal(runner.logits(batch), other.logits(batch))
        for one, another in zip(runner.kv_tensors, other.kv_tensors, strict=True):
            assert torch.equal(one, another)

    for start in range(4):
        decode(start, 1)
    pointed.clear()
    decode(4, 1)
    decode(5, 1)
    assert not pointed
    decode(6, 1, 2)
    assert pointed == [2, 2], "wider tables, in both runners"
    hook = second.register_forward_hook(lambda *_: None)
    decode(7, 1, 2)
    hook.remove()
    pointed.clear()
    decode(8, 1, 2)
    assert pointed == [2], "the second layer had been run by itself"
    pointed.clear()
    decode(9, 1, 2)
    assert not pointed


def test_layers_whose_chains_are_of_different_times_run_together_again(runs: list[tuple[int, int]]) -> None:
    """A step with more rows than any before replaces the buffers that rows are handed on in."""
    model = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    expected = step(runner)
    second = fused_layers(model)[1]
    hook = second.register_forward_hook(lambda *_: None)
    assert torch.equal(step(runner), expected), "a chain for the second layer alone, which it keeps"
    hook.remove()
    runner.logits(Batch((Chunk("b", tuple(range(60)), 0, (2, 3, 4, 5), DRAW),)))
    for layer in fused_layers(model)[:1]:
        vars(layer).pop("_state")
    runs.clear()
    assert torch.equal(step(runner), expected)
    assert torch.equal(step(runner), expected)
    assert runs[-1] == (2, 3)


def test_a_workspace_that_moved_is_pointed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace()
    monkeypatch.setattr("server.model.layer_run.WORKSPACE", space)
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))
    expected = step(runner)
    for _ in range(3):
        address = space.at_least(2 * space.nbytes)
        filler = torch.full((space.nbytes,), 255, dtype=torch.uint8)  # where it may have been
        assert torch.equal(step(runner), expected)
        assert bool((filler == 255).all())
        assert space.at_least(0) == address


def test_what_wider_tables_left_is_not_read() -> None:
    """The runner's buffer keeps the blocks, offsets and starts of steps before."""
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))
    runner.logits(Batch((Chunk("a", (5, 77, 9), 0, (1,), DRAW), Chunk("b", (8, 3), 0, (2,), DRAW))))
    both = Batch((Chunk("a", (6,), 3, (1,), DRAW), Chunk("b", (7,), 2, (2,), DRAW)))
    expected = runner.logits(both).clone()
    runner.logits(Batch((Chunk("c", tuple(range(60)), 0, (9, 10, 11, 12), DRAW), Chunk("d", (1,), 0, (13,), DRAW))))
    assert torch.equal(runner.logits(both), expected)
    wide = Batch((Chunk("a", (6,), 3, (1,), DRAW), Chunk("c", (61,), 60, (9, 10, 11, 12), DRAW)))
    assert torch.equal(runner.logits(wide)[0], expected[0])


def test_a_model_that_changes_its_ways_between_layers_is_stopped(runs: list[tuple[int, int]]) -> None:
    model = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    layers: Any = fused_layers(model)
    step(runner)
    whole = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[0]])
    with pytest.raises(RuntimeError, match="the model changed what one of its layers gave"):
        step(runner)
    model.model.layers = whole
    step(runner)


def test_layers_are_copied_without_their_pointers() -> None:
    model = packed("llama", CONFIGS["nf4-dq"])
    own = model.config._attn_implementation
    expected = step(runner_of(model))
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(own)
    assert len(fused_layers(twin)) == 2
    assert torch.equal(step(runner_of(twin)), expected)


class Doubled(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states * 2, *args, **kwargs)


class Parallel(LlamaDecoderLayer):
    """Attention and MLP beside each other."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class Forgetful(LlamaDecoderLayer):
    """Which does not hand on the context."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, position_embeddings=kwargs["position_embeddings"])


@pytest.mark.parametrize("kind", [Doubled, Parallel, Forgetful, LlamaDecoderLayer])
def test_only_what_adds_its_parts_is_fused(kind: Any) -> None:
    register()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    config._attn_implementation = ATTENTION_NAME
    layer = kind(config, 0)
    fuse(layer)
    assert isinstance(layer, FusedLayer) == (kind is LlamaDecoderLayer)
    layer = kind(config, 0)
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    fuse(layer)
    assert not isinstance(layer, FusedLayer)
