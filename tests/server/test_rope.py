"""Rotary frequencies that hang on a sequence's length: each sequence has its own, whatever it shares a call with."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

from server.errors import LoadError
from server.model.batch import Runner
from server.model.cache_runner import CacheRunner
from server.model.probe import choose_cache_runner, choose_runner
from server.model.proof import Proof
from server.model.rope import RopeSwitch, rope_switch
from server.model.runner import PagedRunner
from server.model.single_runner import SingleRunner
from server.records import KV_BLOCK_TOKENS, ModelSpec
from tests.server.engines import Engine, generate
from tests.server.greedy import expected, prompt_of, same_up_to_a_tie
from tests.tiny_models import tiny_model

SHORT = 32
BLOCKS = 64
LENGTH = 256
ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": LENGTH / SHORT,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + place for place in range(16)],
}
"""The two sets are so far apart that an answer with the wrong one is another answer."""
RUNNERS = ("paged", "cached", "single")


def tiny(short: int = SHORT) -> transformers.PreTrainedModel:
    return tiny_model(
        "phi3",
        rope_parameters=ROPE | {"original_max_position_embeddings": short},
        original_max_position_embeddings=short,
        max_position_embeddings=LENGTH,
    )


@cache
def original() -> transformers.PreTrainedModel:
    return tiny()


@cache
def runner_of(kind: str) -> Runner:
    model, spec = tiny(), ModelSpec("m", "")
    if kind == "single":
        return SingleRunner(model)
    if kind == "paged":
        runner = choose_runner(model, spec, blocks=BLOCKS, max_model_len=LENGTH)
        assert isinstance(runner, PagedRunner)
        return runner
    proof = Proof.of(model, blocks=BLOCKS, block_tokens=KV_BLOCK_TOKENS, max_model_len=LENGTH)
    cached = choose_cache_runner(model, spec, proof, blocks=BLOCKS)
    assert isinstance(cached, CacheRunner)
    return cached


@pytest.mark.parametrize("kind", RUNNERS)
def test_short_and_long_ones_and_one_that_grows_are_generates_in_one_batch(kind: str) -> None:
    """In chunks of 24 tokens, of which no call shows the long prompt's end together with its beginning."""
    lengths = {"short": 10, "long": 70, "grows": SHORT - 4, "at the edge": SHORT, "just beyond": SHORT + 1}
    prompts = {name: prompt_of(length) for name, length in lengths.items()}
    engine = Engine(runner_of(kind), max_batch_tokens=24, speculative_tokens=4)
    found = engine.serve([generate(name, prompt, 14) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        same_up_to_a_tie(original(), prompt, found[name], expected(original(), prompt, 14))
    assert engine.reports[-1].kv_blocks_used == 0
    assert sum(report.preemptions for report in engine.reports) == 0, "nobody was short of blocks"


def test_a_beginning_is_shared_with_who_is_as_long() -> None:
    """And with nobody else: a short one's keys are turned otherwise."""
    beginning = prompt_of(2 * KV_BLOCK_TOKENS - 5)
    prompts = {length: beginning + prompt_of(length - len(beginning)) for length in (SHORT, 60, 61)}
    engine, cached = Engine(runner_of("paged")), {}
    for length, prompt in prompts.items():
        before = len(engine.reports)
        found = engine.serve([generate("r", prompt, 1)])["r"]
        same_up_to_a_tie(original(), prompt, found, expected(original(), prompt, 1))
        cached[length] = sum(report.prefix_hit_tokens for report in engine.reports[before:])
    assert cached == {SHORT: 0, 60: 0, 61: KV_BLOCK_TOKENS}


def test_who_grows_beyond_finds_what_longer_ones_left() -> None:
    prompt = prompt_of(SHORT - 1)
    answer = expected(original(), prompt, 8)
    engine = Engine(runner_of("paged"))
    engine.serve([generate("long", [*prompt, *answer], 1)])
    before = len(engine.reports)
    same_up_to_a_tie(original(), prompt, engine.serve([generate("r", prompt, 8)])["r"], answer)
    again = sum(report.prefill_tokens for report in engine.reports[before:]) - len(prompt)
    assert again == 0, "all but the last of its tokens are in two full blocks, and a single token counts as a decode"


def test_company_and_chunks_change_no_bit_of_a_batch_invariant_model() -> None:
    """Some of a step's rows are then turned by both sets and chosen from, where alone there was one."""
    runner = choose_runner(tiny(), ModelSpec("m", "", batch_invariant=True), blocks=BLOCKS, max_model_len=LENGTH)
    assert isinstance(runner, PagedRunner)
    requests = [
        generate(f"r{length}", prompt_of(length), 12, temperature=1.0, seed=length, logprobs=3)
        for length in (10, SHORT - 4, 70)
    ]
    together = Engine(runner, max_batch_tokens=24)
    answers = together.serve(requests)
    for request in requests:
        alone = Engine(runner, max_batch_tokens=128)
        assert alone.serve([request])[request.request_id] == answers[request.request_id]
        assert alone.logprobs[request.request_id] == together.logprobs[request.request_id]


def test_angles_are_the_models_own_of_either_length_row_by_row() -> None:
    model = tiny()
    rotary: Any = model.model.rotary_emb
    x = torch.zeros(1, 1, dtype=torch.float32)
    positions = torch.tensor([[0, 5, 31, 0, 5, 31, 40]])
    long = [False, False, False, True, True, True, True]
    short = rotary(x, positions.clamp(max=SHORT - 1))
    longer = rotary(x, positions)
    switch = rope_switch(model)
    assert switch.length == SHORT
    assert rope_switch(model) is switch
    with switch.told(long, (1, 7), x.device):
        found = rotary(x, positions)
    for each, one, other in zip(found, short, longer, strict=True):
        assert torch.equal(each[:, :3], one[:, :3])
        assert torch.equal(each[:, 3:], other[:, 3:])
        assert not torch.equal(each[:, 1], each[:, 4])
    with switch.told([True], (1, 1), x.device):
        assert torch.equal(rotary(x, positions[:, :2])[0], longer[0][:, :2])
    assert torch.equal(rotary(x, positions)[0], longer[0]), "outside a runner's call it is transformers' own"


def test_other_models_have_no_such_length() -> None:
    assert rope_switch(tiny_model("llama")).length is None
    assert RopeSwitch(None).rows is None


def test_layers_that_switch_at_different_lengths_are_refused() -> None:
    model = tiny()
    other: Any = tiny(short=16)
    model.add_module("other", other.model.rotary_emb)
    with pytest.raises(
        LoadError, match=r"Phi3ForCausalLM cannot be served: .* beyond 16 and 32 tokens; accepted is one"
    ):
        rope_switch(model)
