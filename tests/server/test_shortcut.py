"""A model by its parts alone: the logits of its own forward call. One that does more than call them is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from quant import BitsAndBytesConfig
from quant.unchanged import Unchanged
from server.memory.workspace import PROOF_SEQUENCES, PROOF_TOKENS, workspace_bytes
from server.model import fuse_layer, probe
from server.model.batch import Batch, Chunk, Score
from server.model.fuse_layer import _Group
from server.model.probe import warm_up
from server.model.proof import Proof
from server.model.runner import PagedRunner
from server.model.shortcut import Shortcut, find_shortcut
from server.records import ModelSpec
from tests.server.test_fuse_attention import DRAW, runner_of
from tests.server.test_fuse_layer import CONFIGS, packed, runs  # noqa: F401
from tests.server.test_last_layer import LONG, steps
from tests.tiny_models import tiny_model

FP32 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
FOUND = {"llama": True, "mistral": True, "qwen3": True} | dict.fromkeys(
    ("gemma3_text", "mixtral", "phi3", "gpt2"), False
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of a shortcut."""
    seen: list[int] = []
    original = Shortcut.__call__

    def call(self: Shortcut, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(ids.shape[1])
        return original(self, ids, *rest)

    monkeypatch.setattr(Shortcut, "__call__", call)
    return seen


def all_logits(runner: PagedRunner) -> list[torch.Tensor]:
    return [runner.logits(Batch(chunks)).clone() for chunks in steps()]


def own_logits(runner: PagedRunner) -> list[torch.Tensor]:
    """The same by calls of the model."""
    kept, runner.shortcut = runner.shortcut, None
    try:
        return all_logits(runner)
    finally:
        runner.shortcut = kept


@pytest.mark.parametrize("architecture", FOUND)
def test_it_is_found_where_a_model_is_its_parts(architecture: str, taken: list[int]) -> None:
    runner = runner_of(packed(architecture, CONFIGS["nf4-dq"]))
    assert (runner.shortcut is not None) == FOUND[architecture]
    taken.clear()
    found = all_logits(runner)
    assert taken == ([9, 22, 13, 2] if FOUND[architecture] else [])
    assert all(map(torch.equal, found, own_logits(runner)))


@pytest.mark.parametrize("most_rows", [0, 4, 256])
@pytest.mark.parametrize("config", [*CONFIGS, "fp32", "floats"])
def test_the_bits_are_the_models_own(config: str, most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of steps that have too many rows for layers in one call."""
    dtype = torch.float32 if config in ("fp32", "floats") else torch.bfloat16
    own = FP32 if config == "fp32" else CONFIGS.get(config)
    model: Any = tiny_model("llama") if own is None else packed("llama", own, dtype)
    model.to(dtype)
    runner = runner_of(model)
    assert runner.shortcut is not None
    monkeypatch.setattr(fuse_layer, "MOST_ROWS", most_rows)
    assert all(map(torch.equal, all_logits(runner), own_logits(runner)))


def test_it_gives_what_is_asked_of_batches_that_do_not_depend_on_each_other(batch_invariant: Any) -> None:
    """A row has the same bits alone and beside others, and those of the model's own call."""
    runner = runner_of(packed("qwen3", CONFIGS["nf4-dq"]))
    assert runner.shortcut is not None
    together = runner.logits(Batch((Chunk("a", LONG[:9], 0, (1,), DRAW), Chunk("b", LONG[5:8], 0, (2,), DRAW)))).clone()
    alone = [runner.logits(Batch((Chunk("c", LONG[a:b], 0, (3,), DRAW),))).clone() for a, b in ((0, 9), (5, 8))]
    assert torch.equal(together, torch.cat(alone))


def test_nothing_wanted_gives_no_rows(taken: list[int]) -> None:
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))
    taken.clear()
    assert runner.logits(Batch((Chunk("a", LONG[:9], 0, (1,), None),))).shape[0] == 0
    score = Score(LONG[1:9], 0)
    assert runner.logits(Batch((Chunk("a", LONG[:9], 0, (1,), DRAW, score=score),))).shape[0] == 9
    assert taken == [9, 9]


@pytest.mark.parametrize("which", ["model", "base", "norm"])
def test_who_looks_at_what_is_left_out_sees_it(which: str, taken: list[int]) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    module = {"model": model, "base": model.model, "norm": model.model.norm}[which]
    seen: list[Any] = []
    for hook in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = hook(lambda *call: seen.append(call[1]))
        taken.clear()
        all_logits(runner)
        assert len(seen) == len(steps())
        assert not taken
        handle.remove()
        seen.clear()
    all_logits(runner)
    assert taken


@pytest.mark.parametrize("which", ["embed_tokens", "layers.0", "layers.1", "rotary_emb"])
def test_who_looks_at_a_part_sees_it(which: str, taken: list[int]) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    before = all_logits(runner)
    seen: list[torch.Size] = []
    model.model.get_submodule(which).register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    taken.clear()
    assert all(map(torch.equal, all_logits(runner), before))
    assert [shape[1] for shape in seen] == taken == [9, 22, 13, 2]


def test_a_forward_on_the_object_is_called(monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    """As accelerate's hooks have it."""
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    taken.clear()
    original, calls = model.forward, []

    def forward(*given: Any, **named: Any) -> Any:
        calls.append(named)
        return original(*given, **named)

    monkeypatch.setitem(vars(model), "forward", forward)
    all_logits(runner)
    assert len(calls) == len(steps())
    assert not taken


@pytest.mark.parametrize("which", ["lm_head", "model.norm", "model.embed_tokens"])
def test_parts_that_are_replaced_are_not_called(which: str, taken: list[int]) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    other: Any = copy.deepcopy(model.get_submodule(which))
    for parameter in other.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.3)
    before = all_logits(runner)
    model.set_submodule(which, other)
    taken.clear()
    found = all_logits(runner)
    assert not taken
    assert not torch.equal(found[1], before[1])
    assert all(map(torch.equal, found, own_logits(runner)))


def test_it_is_part_of_choosing_a_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("llama", FP32, torch.float32)
    proof = Proof.of(model, blocks=16, block_tokens=16, max_model_len=64)
    runner = runner_of(model)
    assert runner.shortcut is not None
    assert proof.difference(runner) < 1e-5
    monkeypatch.setattr(probe, "find_shortcut", lambda *_: None)
    assert runner_of(packed("llama", FP32, torch.float32)).shortcut is None


def more(x: torch.Tensor) -> torch.Tensor:
    return x * 1.5


def mostly_nothing(x: torch.Tensor) -> torch.Tensor:
    """What some models do in float16."""
    return x.clamp(-60000, 60000)


def around_embedding(model: Any, detour: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(model.model).forward

    def forward(self: Any, input_ids: torch.Tensor, **named: Any) -> Any:
        return original(self, **named | {"inputs_embeds": detour(self.embed_tokens(input_ids))})

    monkeypatch.setattr(type(model.model), "forward", forward)


def around_layers(model: Any, detour: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    class Layers(nn.ModuleList):
        def __getitem__(self, which: Any) -> Any:
            if isinstance(which, slice):
                return [lambda x, **named: self[1](detour(self[0](x, **named)), **named)]
            return super().__getitem__(which)

    model.model.layers = Layers(model.model.layers)


def before_norm(model: Any, detour: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    class Layers(nn.ModuleList):
        def __getitem__(self, which: Any) -> Any:
            if isinstance(which, slice):
                return [lambda x, **named: detour(self[1](self[0](x, **named), **named))]
            return super().__getitem__(which)

    model.model.layers = Layers(model.model.layers)


def behind_norm(model: Any, detour: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(model.model).forward

    def forward(self: nn.Module, **named: Any) -> Any:
        output = original(self, **named)
        output.last_hidden_state = detour(output.last_hidden_state)
        return output

    monkeypatch.setattr(type(model.model), "forward", forward)


def behind_head(model: Any, detour: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(model).forward

    def forward(self: nn.Module, logits_to_keep: Any = 0, **named: Any) -> Any:
        output = original(self, logits_to_keep=logits_to_keep, **named)
        output.logits = detour(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", forward)


@pytest.mark.parametrize("detour", [more, mostly_nothing], ids=lambda x: x.__name__)
@pytest.mark.parametrize(
    "where", [around_embedding, around_layers, before_norm, behind_norm, behind_head], ids=lambda x: x.__name__
)
def test_a_model_that_does_more_is_called_itself(
    where: Callable[..., None], detour: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, taken: list[int]
) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    where(model, detour, monkeypatch)
    runner = runner_of(model)
    assert runner.shortcut is None
    assert not taken


def test_a_model_whose_parts_alone_give_other_bits_is_called_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    proof = Proof.of(model, blocks=16, block_tokens=16, max_model_len=64)
    runner = runner_of(model)
    assert runner.shortcut is not None
    original = Shortcut.__call__
    monkeypatch.setattr(Shortcut, "__call__", lambda *given: original(*given).mul(1.25))
    runner.shortcut = None
    assert find_shortcut(runner, proof) is None
    assert runner.shortcut is None


def test_a_model_whose_parts_cannot_be_called_alone_is_called_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: Any) -> torch.Tensor:
        raise TypeError("unexpected")

    monkeypatch.setattr(Shortcut, "__call__", call)
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))
    assert runner.shortcut is None
    assert all(logits.isfinite().all() for logits in all_logits(runner))


def test_a_runner_that_is_sealed_asks_no_more(monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    model = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    expected = all_logits(runner)
    asked: list[Unchanged] = []
    original = Unchanged.__call__

    def call(self: Unchanged) -> bool:
        asked.append(self)
        return original(self)

    monkeypatch.setattr(Unchanged, "__call__", call)
    all_logits(runner)
    assert asked
    warm_up(runner)
    all_logits(runner)
    asked.clear()
    taken.clear()
    assert all(map(torch.equal, all_logits(runner), expected))
    assert not asked
    assert len(taken) == len(steps())


@pytest.mark.parametrize("has_shortcut", [True, False])
def test_a_sealed_runner_computes_all_layers_in_one_run(
    has_shortcut: bool,
    runs: list[tuple[int, int]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For every number of rows: also those of the steps in which it was learnt who follows whom, and was watched."""
    monkeypatch.setattr(probe, "find_last_layer", lambda *_: None)
    model = packed("llama", CONFIGS["nf4-dq"])
    if not has_shortcut:
        behind_head(model, more, monkeypatch)
    runner = runner_of(model)
    assert (runner.shortcut is not None) == has_shortcut
    warm_up(runner)
    for _ in range(2):
        runs.clear()
        for rows in range(1, 17):
            runner.logits(Batch((Chunk("a", LONG[:rows], 0, (1,), DRAW),)))
        assert runs == [(2, rows) for rows in range(1, 17)]


def test_what_one_runner_knows_another_asks() -> None:
    """A runner that is sealed speaks for itself."""
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    runner = runner_of(model)
    warm_up(runner)
    batch = Batch((Chunk("a", LONG[:9], 0, (1,), DRAW),))
    before = [runner.logits(batch).clone() for _ in range(3)]
    down = model.model.layers[1].mlp.down_proj
    down.quantize(torch.randn(down.matrix_shape).bfloat16() * 0.3)
    other = PagedRunner(model, runner.cache, max_batch_tokens=64, max_sequences=4, max_model_len=64)
    assert not torch.equal(other.logits(batch), before[0])


def test_layers_before_one_that_has_no_chain_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they take the one behind them for a follower that is missing."""
    config = CONFIGS["nf4-dq"]
    model: Any = packed("llama", config)
    other: Any = tiny_model("llama").to(torch.bfloat16)
    model.model.layers[1].mlp.down_proj = other.model.layers[1].mlp.down_proj
    runner = runner_of(model)
    warm_up(runner)
    expected = [all_logits(runner) for _ in range(3)][-1]
    asked: list[tuple[nn.Module, ...]] = []
    original = _Group.is_good
    monkeypatch.setattr(_Group, "is_good", lambda self: asked.append(tuple(self.layers)) or original(self))
    assert all(map(torch.equal, all_logits(runner), expected))
    assert not asked


@pytest.mark.parametrize("how", ["by name", "two arguments", "a function"])
def test_a_model_that_calls_its_parts_otherwise_is_served(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])

    class Head(nn.Linear):
        def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
            return super().forward(x)

    def forward(self: Any, logits_to_keep: Any = 0, **named: Any) -> Any:
        output = self.model(**named)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = output.last_hidden_state[:, kept]
        if how == "by name":
            output.logits = self.lm_head(x=x)
        elif how == "two arguments":
            output.logits = self.lm_head(x, 1)
        else:
            output.logits = nn.functional.linear(x, self.lm_head.weight)
        return output

    model.lm_head.__class__ = Head
    monkeypatch.setattr(type(model), "forward", forward)
    runner = runner_of(model)
    assert runner.shortcut is None
    assert all(logits.isfinite().all() for logits in all_logits(runner))


@pytest.mark.parametrize("tokens", [1, 8, 13, 64])
def test_one_sequence_in_small_steps_is_proven_and_served(tokens: int) -> None:
    """Its tables and steps are smaller than those of the proof, which has two sequences."""
    spec = ModelSpec("m", "", max_batch_tokens=tokens, max_sequences=1)
    for length in (16, 32, 48, 64):
        model = tiny_model("llama")
        proof = Proof.of(model, blocks=8, block_tokens=16, max_model_len=length)
        assert (len(proof.batch.chunks), proof.batch.tokens) == (PROOF_SEQUENCES, PROOF_TOKENS)
        runner = probe.choose_runner(model, spec, blocks=8, max_model_len=length)
        assert isinstance(runner, PagedRunner)
        assert runner.logits(Batch((Chunk("a", LONG[:1], 0, (1,), DRAW),))).isfinite().all()
        buffers = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in runner.buffers}.values())
        assert buffers == workspace_bytes(tokens, 1, length)
