"""The last layer for wanted rows alone: the logits and the cache of all rows; where somebody looks, all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quant import BitsAndBytesConfig
from quant.chain import Run
from server.model import probe
from server.model.batch import Batch, Chunk, Score
from server.model.fuse_layer import FusedLayer
from server.model.last_layer import find_last_layer
from server.model.proof import Proof
from server.model.runner import PagedRunner
from tests.server.test_fuse_attention import DRAW, runner_of
from tests.server.test_fuse_layer import CONFIGS, fused_layers, packed
from tests.tiny_models import VOCABULARY

FP32 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
LONG = tuple((31 * i + 5) % VOCABULARY for i in range(24))


@pytest.fixture
def rows_of_last(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each step: the rows that the last layer's second half is computed for, by itself."""
    seen: list[int] = []
    original = Run.__call__

    def run(self: Run, chains: int | None = None) -> None:
        halves = self._kept
        if chains is not None:
            seen.append(0)
        elif len(halves) == 1:
            seen[-1] = halves[0].rows
        original(self, chains)

    monkeypatch.setattr(Run, "__call__", run)
    return seen


def last_of(runner: PagedRunner) -> list[FusedLayer]:
    return [layer for layer in fused_layers(runner.model) if "_is_last" in vars(layer)]


def steps() -> list[tuple[Chunk, ...]]:
    """A prompt's beginning of which nothing is wanted; its end beside a prompt whose tokens are scored; guesses beside
    another beginning; rows that all draw."""
    table = (3, 0)
    return [
        (Chunk("a", LONG[:9], 0, table, None),),
        (
            Chunk("a", LONG[9:], 9, table, DRAW),
            Chunk("b", LONG[3:10], 0, (5,), DRAW, score=Score(LONG[8:10], 1)),
        ),
        (
            Chunk("a", (11, 90, 7), 24, table, DRAW, drafted=2),
            Chunk("c", LONG[5:14], 0, (6,), None),
            Chunk("b", (12,), 7, (5,), DRAW),
        ),
        (Chunk("a", (40,), 27, table, DRAW), Chunk("b", (41,), 8, (5,), DRAW)),
    ]


def all_logits(runner: PagedRunner) -> torch.Tensor:
    return torch.cat([runner.logits(Batch(chunks)) for chunks in steps()])


def logits_and_cache(runner: PagedRunner) -> tuple[torch.Tensor, list[torch.Tensor]]:
    for tensor in runner.kv_tensors:
        tensor.zero_()
    return all_logits(runner), [tensor.clone() for tensor in runner.kv_tensors]


@pytest.mark.parametrize(
    ("config", "dtype", "kv_dtype"),
    [
        (FP32, torch.float32, "auto"),
        (FP32, torch.float32, "int8"),
        (CONFIGS["nf4-dq"], torch.bfloat16, "auto"),
        (CONFIGS["int8"], torch.bfloat16, "int8"),
    ],
    ids=["fp32", "fp32-int8-cache", "bf16", "int8-int8-cache"],
)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_the_bits_are_those_of_all_rows(
    architecture: str,
    config: BitsAndBytesConfig,
    dtype: torch.dtype,
    kv_dtype: str,
    rows_of_last: list[int],
    batch_invariant: Any,
) -> None:
    """Batch-invariant: a row's bits then do not depend on how many rows there are in bfloat16 either."""
    runner = runner_of(packed(architecture, config, dtype), kv_dtype)
    (last,) = last_of(runner)
    assert last is fused_layers(runner.model)[-1]
    rows_of_last.clear()
    found, cached = logits_and_cache(runner)
    assert rows_of_last == [0, 4, 4], "of 9, 22 and 13 rows; all of a step whose rows all draw"
    vars(last).pop("_is_last")
    rows_of_last.clear()
    expected, cached_then = logits_and_cache(runner)
    assert not rows_of_last
    assert torch.equal(found, expected)
    assert all(map(torch.equal, cached, cached_then))


def test_few_more_than_half_of_the_rows_are_not_worth_it(rows_of_last: list[int]) -> None:
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))
    rows_of_last.clear()
    for wanted, rows in ((1, 2), (2, 3), (2, 4), (3, 4)):
        score = Score(LONG[: wanted - 1], 0)
        runner.logits(Batch((Chunk("a", LONG[:rows], 0, (1, 2), DRAW, score=score),)))
    assert rows_of_last == [1, 2]


@pytest.mark.parametrize("which", ["norm", "head"])
def test_a_model_that_looks_at_other_rows_behind_its_layers_computes_all(which: str) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    proof = Proof.of(model, blocks=16, block_tokens=16, max_model_len=64)
    runner = runner_of(model)
    (last,) = last_of(runner)
    vars(last).pop("_is_last")
    module: nn.Module = model.model.norm if which == "norm" else model.model
    module.register_forward_hook(lambda *call: _mixed(call[-1]))
    assert find_last_layer(runner, proof) is None
    assert not last_of(runner)


def _mixed(output: Any) -> Any:
    """What it is, plus the mean over all rows."""
    if isinstance(output, torch.Tensor):
        return output + output.mean(1, keepdim=True)
    output.last_hidden_state = _mixed(output.last_hidden_state)
    return output


def test_behind_a_layer_of_transformers_own_none_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = packed("llama", CONFIGS["nf4-dq"])
    layer = model.model.layers[-1]
    monkeypatch.setitem(vars(layer), "forward", layer.forward)  # as accelerate's hooks have it
    runner = runner_of(model)
    assert len(fused_layers(model)) == 1
    assert not last_of(runner)


def test_who_looks_at_the_last_layer_sees_all_rows(rows_of_last: list[int]) -> None:
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))
    (last,) = last_of(runner)
    seen: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda *call: seen.append(call[-1]))
    rows_of_last.clear()
    runner.logits(Batch(steps()[0]))
    assert not rows_of_last
    assert seen[0].abs().amax(-1).gt(0).all()
    hook.remove()
    runner.logits(Batch(steps()[0]))
    assert rows_of_last == [0]


def test_new_weights_of_the_last_layer_count(rows_of_last: list[int], batch_invariant: Any) -> None:
    runner = runner_of(packed("llama", CONFIGS["nf4-dq"]))
    (last,) = last_of(runner)
    before = all_logits(runner)
    down: Any = last.mlp.down_proj  # type: ignore[union-attr]
    down.quantize(torch.randn(down.matrix_shape).bfloat16() * 0.3)
    rows_of_last.clear()
    found = all_logits(runner)
    assert rows_of_last
    assert not torch.equal(found, before)
    vars(last).pop("_is_last")
    assert torch.equal(all_logits(runner), found)


def test_the_search_is_part_of_choosing_a_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it finds is served: a runner whose logits are still the model's own."""
    model = packed("llama", FP32, torch.float32)
    proof = Proof.of(model, blocks=16, block_tokens=16, max_model_len=64)
    runner = runner_of(model)
    assert last_of(runner)
    assert proof.difference(runner) < 1e-5
    monkeypatch.setattr(probe, "find_last_layer", lambda *_: None)
    assert not last_of(runner_of(packed("llama", FP32, torch.float32)))
