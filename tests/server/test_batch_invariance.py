"""A seed's tokens and logprobs, to the last bit: whatever else is in the batch, in whatever chunks, after a preemption.

Whole engines on real models with `batch_invariant`; without it at one batch shape; and on a model whose logits a few
lines make up, always. One request is watched. First it is served alone, in one chunk, without guesses or a cached
beginning; then in company, with everything that may not matter drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant
from server.engine.blocks import KV_BLOCK_TOKENS
from server.model.batch import Batch, Runner, StepResult
from server.model.probe import choose_runner
from server.model.readout import read_logits
from server.records import Abort, Generate, StepReport, ToEngine, TokenLogprobs
from tests.server.engines import Engine, generate
from tests.server.scripted import PagedScriptedRunner
from tests.server.tiny_cases import Case as TinyCase
from tests.tiny_models import VOCABULARY

BLOCKS = 64
FEW_BLOCKS = 8
LENGTH = FEW_BLOCKS * KV_BLOCK_TOKENS
MOST_SEQUENCES = 8
WATCHED = "watched"
ANCHOR = "anchor"
ANCHOR_TOKENS = 60
"""Somebody is always there until everything that is to come has come; drawn at random, so that no guess comes true."""


@dataclass(frozen=True)
class Case(TinyCase):
    examples: int = 6


CASES = {
    "llama": Case("llama"),
    "llama, bfloat16": Case("llama", "bfloat16"),
    "llama, nf4": Case("llama", quantization="nf4-dq"),
    "llama, nf4, bfloat16": Case("llama", "bfloat16", "nf4-dq"),
    "llama, nf4, bfloat16, cache in int8": Case("llama", "bfloat16", "nf4", "int8"),
    "llama, int8, bfloat16": Case("llama", "bfloat16", "int8"),
    "gpt2": Case("gpt2"),
    "gemma3, nf4, bfloat16": Case("gemma3_text", "bfloat16", "nf4"),
    "mixtral, nf4, bfloat16": Case("mixtral", "bfloat16", "nf4"),
    "mixtral": Case("mixtral", examples=3),
    "bloom": Case("bloom", examples=3),
    "bloom, nf4, bfloat16": Case("bloom", "bfloat16", "nf4", examples=3),
    "bloom, cache in int8": Case("bloom", cache="int8", examples=3),
    "t5": Case("t5", examples=3, changes={"initializer_factor": 2.0}),
    "t5, nf4, bfloat16": Case("t5", "bfloat16", "nf4", examples=3, changes={"initializer_factor": 2.0}),
    "gpt_oss": Case("gpt_oss", examples=3),
}
NOT_PAGED = {"mixtral", "gpt_oss", *(name for name in CASES if name.startswith(("bloom", "t5")))}


@contextmanager
def invariance(wanted: bool) -> Iterator[None]:
    quant.set_batch_invariant(wanted)
    try:
        yield
    finally:
        quant.set_batch_invariant(False)


@cache
def runner_for(name: str, *, batch_invariant: bool) -> Runner:
    with invariance(batch_invariant):
        model, spec = CASES[name].load(batch_invariant=batch_invariant)
        return choose_runner(model, spec, blocks=BLOCKS, max_model_len=LENGTH)


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    end: Any


class WatchedEngine(Engine):
    """And who was thrown out on the way."""

    def __init__(self, runner: Runner, **options: Any) -> None:
        self.thrown_out: set[str] = set()
        super().__init__(runner, max_sequences=MOST_SEQUENCES, max_model_len=LENGTH, **options)

    def _take(self, report: StepReport) -> None:
        self.thrown_out |= set(self.scheduler.preempted)
        super()._take(report)

    def answer(self, now: Sequence[Generate], later: dict[int, list[ToEngine]] | None = None) -> Answer:
        """The watched request's."""
        tokens = self.serve(now, later)[WATCHED]
        assert self.reports[-1].kv_blocks_used == 0
        return Answer(tokens, self.logprobs[WATCHED], self.prompt_logprobs[WATCHED], self.ends[WATCHED])


def alone(runner: Runner, request: Generate) -> Answer:
    return WatchedEngine(runner, max_batch_tokens=LENGTH, prefix_caching=False).answer([request])


@dataclass(frozen=True)
class Neighbour:
    shared: int
    """How many of the watched prompt's tokens it begins with."""
    own: int
    count: int
    temperature: float
    arrives: int
    """In the report of which step; 0 for before the first."""
    aborted: int | None


@dataclass(frozen=True)
class Company:
    """Everything that may not matter."""

    neighbours: list[Neighbour]
    arrives: int
    max_batch_tokens: int
    blocks: int
    prefix_caching: bool
    speculative_tokens: int

    def engine(self, runner: Runner) -> WatchedEngine:
        return WatchedEngine(
            runner,
            max_batch_tokens=self.max_batch_tokens,
            blocks=self.blocks,
            prefix_caching=self.prefix_caching,
            speculative_tokens=self.speculative_tokens,
        )

    def arrivals(self, request: Generate) -> dict[int, list[ToEngine]]:
        """By step, neighbours first."""
        found: dict[int, list[ToEngine]] = {
            0: [generate(ANCHOR, [7, 8, 9], ANCHOR_TOKENS, temperature=2.0, seed=1, allowed_token_ids=range(300))]
        }
        for place, one in enumerate(self.neighbours):
            name = f"n{place}"
            prompt = [*request.prompt[: one.shared], *(random.randrange(3, VOCABULARY) for _ in range(one.own))]
            arrival = generate(name, prompt, one.count, temperature=one.temperature, seed=place)
            found.setdefault(one.arrives, []).append(arrival)
            if one.aborted is not None:
                found.setdefault(one.arrives + one.aborted, []).append(Abort(name))
        found.setdefault(self.arrives, []).append(request)
        return found

    def answer(self, engine: WatchedEngine, request: Generate) -> Answer:
        later = self.arrivals(request)
        now = [record for record in later.pop(0) if isinstance(record, Generate)]
        return engine.answer(now, later)


def companies(most: int = 5) -> st.SearchStrategy[Company]:
    neighbours = st.builds(
        Neighbour,
        shared=st.integers(0, 40),
        own=st.integers(1, 25),
        count=st.integers(1, 25),
        temperature=st.sampled_from([0.0, 1.0]),
        arrives=st.integers(0, 12),
        aborted=st.none() | st.integers(1, 20),
    )
    return st.builds(
        Company,
        neighbours=st.lists(neighbours, max_size=most),
        arrives=st.integers(0, 12),
        max_batch_tokens=st.sampled_from([MOST_SEQUENCES, 11, 17, 33, 64, 200]),
        blocks=st.sampled_from([FEW_BLOCKS, BLOCKS]),
        prefix_caching=st.booleans(),
        speculative_tokens=st.sampled_from([0, 4]),
    )


FEW = (11, 12, 13, 14)
"""A model of so few tokens repeats itself, so that guesses come true."""
WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "allowed_token_ids": FEW},
    {"temperature": 1.0, "allowed_token_ids": FEW, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    {"temperature": 0.0},
]


def requests(*, scored: bool) -> st.SearchStrategy[Generate]:
    """The watched one; `scored`: some ask for their prompt's logprobs."""
    return st.builds(
        lambda seed, prompt, repeats, count, way, top: generate(
            WATCHED, (prompt * repeats)[:50], count, seed=seed, logprobs=2, prompt_logprobs=top, **way
        ),
        seed=st.integers(0, 2**64 - 1),
        prompt=st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=50),
        repeats=st.integers(1, 3),
        count=st.integers(1, 20),
        way=st.sampled_from(WAYS),
        top=st.sampled_from([None, None, 1]) if scored else st.none(),
    )


@pytest.mark.parametrize("name", CASES)
def test_nothing_beside_a_request_changes_a_bit(name: str) -> None:
    case, runner = CASES[name], runner_for(name, batch_invariant=True)
    assert runner.batching == ("single" if name in NOT_PAGED else "packed")

    @given(request=requests(scored=not runner.decoder_prompt), company=companies(5 if name not in NOT_PAGED else 3))
    @settings(max_examples=case.examples)
    def check(request: Generate, company: Company) -> None:
        with invariance(True):
            assert company.answer(company.engine(runner), request) == alone(runner, request)

    check()


def crowded(**options: Any) -> Company:
    """A company in which the watched request is thrown out, as the last in rank."""
    return Company([Neighbour(0, 20, 40, 1.0, 0, None)], 0, **{"max_batch_tokens": 33, "blocks": FEW_BLOCKS, **options})


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_request_that_was_thrown_out_goes_on_as_if_nothing_had_happened(name: str, prefix_caching: bool) -> None:
    runner = runner_for(name, batch_invariant=True)
    company = crowded(prefix_caching=prefix_caching, speculative_tokens=0)
    request = generate(WATCHED, range(20, 40), 30, temperature=1.0, seed=6, logprobs=2)
    engine = company.engine(runner)
    with invariance(True):
        assert company.answer(engine, request) == alone(runner, request)
    assert WATCHED in engine.thrown_out


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_PAGED])
def test_guesses_and_cached_beginnings_change_no_bit(name: str) -> None:
    runner = runner_for(name, batch_invariant=True)
    request = generate(WATCHED, [11, 12] * 20, 40, temperature=0.3, seed=3, allowed_token_ids=FEW[:2], logprobs=2)
    with invariance(True):
        expected = alone(runner, request)
        engine = WatchedEngine(runner, max_batch_tokens=33, speculative_tokens=4)
        found = [engine.answer([request]) for _ in range(2)]
    assert found == [expected, expected]
    assert sum(report.accepted_draft_tokens for report in engine.reports) > 0
    assert sum(report.prefix_hit_tokens for report in engine.reports) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5"])
def test_without_the_setting_company_does_change_bits(name: str) -> None:
    """What the tests above compare can differ: torch adds up one row in another order than many."""
    runner = runner_for(name, batch_invariant=False)
    company = Company([Neighbour(0, 20, 25, 1.0, 0, None) for _ in range(6)], 0, 200, BLOCKS, False, 0)
    requests = [generate(WATCHED, range(20, 40), 20, temperature=1.0, seed=seed, logprobs=2) for seed in range(5)]
    assert any(company.answer(company.engine(runner), request) != alone(runner, request) for request in requests)


@pytest.mark.parametrize("name", ["llama", "llama, nf4, bfloat16", "llama, int8, bfloat16", "gpt2", "bloom", "t5"])
def test_without_the_setting_one_shape_gives_one_answer(name: str) -> None:
    """As many neighbours as long, at the same places: what they say does not matter."""
    runner = runner_for(name, batch_invariant=False)
    shape = [(random.randint(1, 30), random.randint(1, 20)) for _ in range(5)]
    request = generate(WATCHED, range(20, 40), 20, temperature=1.0, seed=8, logprobs=2)

    def answer() -> Answer:
        company = [
            generate(f"n{i}", [random.randrange(3, VOCABULARY) for _ in range(own)], count, temperature=1.0)
            for i, (own, count) in enumerate(shape)
        ]
        engine = WatchedEngine(runner, max_batch_tokens=33, prefix_caching=False)
        return engine.answer([*company[:2], request], {3: [*company[2:]]})

    first = answer()
    assert all(answer() == first for _ in range(4))


class MadeUpModel(PagedScriptedRunner):
    """Logits that follow from the sequence's tokens alone, and the real sampler behind them."""

    def step(self, batch: Batch) -> StepResult:
        rows: list[torch.Tensor] = []
        for chunk in batch.chunks:
            tokens = self.read(chunk.blocks, chunk.start, switched=chunk.switched)
            for position, token in enumerate(chunk.tokens, start=chunk.start):
                tokens = (*tokens, token)
                slot = self.slot(chunk.blocks, position)
                self.slots[slot], self.switched[slot] = tokens, chunk.switched
                if position >= chunk.end - chunk.wanted:
                    numbers = torch.Generator().manual_seed(hash(tokens) % 2**63)
                    rows.append(torch.randn(VOCABULARY, generator=numbers))
        result = StepResult()
        read_logits(batch.chunks, torch.stack(rows) if rows else torch.empty(0, VOCABULARY), result)
        return result


@given(request=requests(scored=True), company=companies())
@settings(max_examples=150)
def test_on_a_scripted_model_nothing_beside_a_request_changes_a_bit(request: Generate, company: Company) -> None:
    engine = company.engine(MadeUpModel(KV_BLOCK_TOKENS))
    assert company.answer(engine, request) == alone(MadeUpModel(KV_BLOCK_TOKENS), request)
