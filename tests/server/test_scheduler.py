"""The scheduler's promises as properties, over random sequences of add, step, abort and failure."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler
from server.errors import ConfigError, RequestError
from server.model.batch import Batch
from server.records import Generate, SamplingParams, SequenceOutput, TokenLogprobs
from tests.server.scripted import ScriptedRunner, expected_answer, scored

BLOCK = 4


def request(
    name: str,
    prompt: list[int],
    max_tokens: int,
    stop: tuple[int, ...] = (),
    prompt_logprobs: int | None = None,
    logprobs: int | None = None,
) -> Generate:
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=stop, seed=1, prompt_logprobs=prompt_logprobs, logprobs=logprobs
    )
    return Generate(name, tuple(prompt), params)


class SchedulerMachine(RuleBasedStateMachine):
    """Small pools and budgets, so that chunking, waiting and preemption happen in most runs."""

    @initialize(
        extra_blocks=st.integers(0, 6), budget=st.integers(4, 24), sequences=st.integers(1, 4), limit=st.integers(4, 40)
    )
    def start(self, extra_blocks: int, budget: int, sequences: int, limit: int) -> None:
        self.limit = limit
        self.budget = budget
        pool = BlockPool(-(-limit // BLOCK) + extra_blocks, BLOCK)
        self.scheduler = Scheduler(pool, max_batch_tokens=budget, max_sequences=sequences, max_model_len=limit)
        self.runner = ScriptedRunner()
        self.requests: dict[str, Generate] = {}
        self.answers: dict[str, list[int]] = {}
        self.scores: dict[str, list[TokenLogprobs]] = {}
        self.ends: Counter[str] = Counter()

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        name = f"r{len(self.requests)}"
        length = data.draw(st.integers(1, self.limit - 1))
        prompt = data.draw(st.lists(st.integers(0, 999), min_size=length, max_size=length))
        max_tokens = data.draw(st.integers(1, self.limit - length))
        asked = {name: data.draw(st.sampled_from([None, 1])) for name in ("prompt_logprobs", "logprobs")}
        self.requests[name] = request(name, prompt, max_tokens, **asked)
        self.answers[name] = []
        self.scores[name] = []
        self.scheduler.add(self.requests[name])

    @rule()
    def step(self) -> None:
        batch = self.scheduler.schedule()
        for name in self.scheduler.preempted:
            self.runner.release(name)
        if batch is None:
            assert not self.scheduler.has_work
            return
        self.check_batch(batch)
        for output in self.scheduler.apply(batch, self.runner.step(batch)):
            self.take(output)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*self.requests, "unknown"]))
        output = self.scheduler.abort(name)
        is_open = name in self.requests and self.ends[name] == 0
        assert (output is not None) == is_open
        if output is not None:
            assert output.finish_reason == "abort"
            self.take(output)

    @rule()
    def failed_step(self) -> None:
        batch = self.scheduler.schedule()
        for name in self.scheduler.preempted:
            self.runner.release(name)
        if batch is not None:
            for output in self.scheduler.fail(batch, "the step failed"):
                assert (output.finish_reason, output.error) == ("error", "the step failed")
                self.take(output)

    @precondition(lambda self: self.scheduler.has_work)
    @rule()
    def run_dry(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.pool.used == 0
        assert self.scheduler.schedule() is None

    def check_batch(self, batch: Batch) -> None:
        assert 1 <= batch.tokens <= self.budget
        names = [chunk.request_id for chunk in batch.chunks]
        assert len(names) == len(set(names))
        for chunk in batch.chunks:
            assert len(chunk.blocks) * BLOCK >= chunk.end

    def take(self, output: SequenceOutput) -> None:
        name = output.request_id
        assert self.ends[name] == 0, "an answer after the end"
        asked = self.requests[name]
        self.scores[name] += output.prompt_logprobs
        position = len(asked.prompt) + len(self.answers[name])
        wanted = scored(output.token_ids, position) if asked.sampling.logprobs is not None else []
        assert list(output.logprobs) == wanted
        self.answers[name] += output.token_ids
        prompt_scores = scored(asked.prompt[1:], 1) if asked.sampling.prompt_logprobs is not None else []
        complete = bool(output.token_ids)
        assert self.scores[name] == (prompt_scores if complete else prompt_scores[: len(self.scores[name])])
        if output.finish_reason is None:
            assert output.token_ids or output.prompt_logprobs
            return
        self.ends[name] += 1
        self.runner.release(name)
        if output.finish_reason == "length":
            assert self.answers[name] == expected_answer(asked.prompt, asked.sampling.max_tokens)
        else:
            assert self.answers[name] == expected_answer(asked.prompt, len(self.answers[name]))

    @invariant()
    def blocks_are_owned_once(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        held = [block for sequence in self.scheduler.running for block in sequence.blocks]
        assert len(held) == len(set(held)) == self.scheduler.pool.used
        assert all(not sequence.blocks for sequence in self.scheduler.waiting)

    @invariant()
    def queues_hold_what_is_open_in_order_of_arrival(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        queued = [sequence.request.request_id for sequence in (*self.scheduler.running, *self.scheduler.waiting)]
        assert queued == [name for name in self.requests if self.ends[name] == 0]
        assert len(self.scheduler.running) <= self.scheduler.max_sequences


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSchedulerProperties = SchedulerMachine.TestCase


def make(blocks: int = 100, budget: int = 32, sequences: int = 8, limit: int = 64) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK), max_batch_tokens=budget, max_sequences=sequences, max_model_len=limit)


def run_step(scheduler: Scheduler, runner: ScriptedRunner) -> tuple[Batch, list[SequenceOutput]]:
    batch = scheduler.schedule()
    assert batch is not None
    for name in scheduler.preempted:
        runner.release(name)
    return batch, scheduler.apply(batch, runner.step(batch))


def test_a_long_prompt_is_chunked_beside_decodes() -> None:
    scheduler, runner = make(budget=10), ScriptedRunner()
    scheduler.add(request("short", [1, 2], 20))
    run_step(scheduler, runner)
    scheduler.add(request("long", list(range(25)), 5))
    sizes = []
    for _ in range(4):
        batch, outputs = run_step(scheduler, runner)
        sizes.append({chunk.request_id: len(chunk.tokens) for chunk in batch.chunks})
        assert "short" in {output.request_id for output in outputs}, "a decode is never held up by a prefill"
    assert sizes == [{"short": 1, "long": 9}, {"short": 1, "long": 9}, {"short": 1, "long": 7}, {"short": 1, "long": 1}]


def test_a_newcomer_joins_between_steps() -> None:
    scheduler, runner = make(), ScriptedRunner()
    scheduler.add(request("a", [5], 4))
    run_step(scheduler, runner)
    scheduler.add(request("b", [6, 7], 4))
    batch, _ = run_step(scheduler, runner)
    assert [chunk.request_id for chunk in batch.chunks] == ["a", "b"]


def test_the_youngest_is_preempted_and_still_answers_right() -> None:
    scheduler, runner = make(blocks=6, limit=24), ScriptedRunner()
    scheduler.add(request("old", [1, 2, 3, 4], 20))
    scheduler.add(request("young", [9, 8, 7, 6], 12))
    answers: dict[str, list[int]] = {"old": [], "young": []}
    preempted: list[str] = []
    while scheduler.has_work:
        _, outputs = run_step(scheduler, runner)
        preempted += scheduler.preempted
        for output in outputs:
            answers[output.request_id] += output.token_ids
    assert preempted == ["young"]
    assert answers["old"] == expected_answer([1, 2, 3, 4], 20)
    assert answers["young"] == expected_answer([9, 8, 7, 6], 12)


def test_a_long_prompt_is_scored_chunk_by_chunk_and_only_once() -> None:
    scheduler, runner = make(blocks=9, budget=10, limit=36), ScriptedRunner()
    scheduler.add(request("old", [1, 2, 3, 4], 32))
    scheduler.add(request("young", list(range(25)), 8, prompt_logprobs=0))
    found: list[TokenLogprobs] = []
    preempted: list[str] = []
    while scheduler.has_work:
        _, outputs = run_step(scheduler, runner)
        preempted += scheduler.preempted
        for output in outputs:
            found += output.prompt_logprobs
            if output.request_id == "young" and not output.token_ids:
                assert 1 <= len(output.prompt_logprobs) <= 9
    assert "young" in preempted
    assert found == scored(range(1, 25), 1)


def test_a_history_grows_with_its_sequence_and_outlives_a_preemption() -> None:
    scheduler, runner = make(blocks=6, limit=24), ScriptedRunner()
    scheduler.add(request("old", [1, 2, 3, 4], 20))
    penalised = SamplingParams(max_tokens=12, frequency_penalty=0.5)
    scheduler.add(Generate("young", (9, 8, 7, 6), penalised))
    generated: list[int] = []
    preempted = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        preempted += len(scheduler.preempted)
        for name in scheduler.preempted:
            runner.release(name)
        for chunk in batch.chunks:
            history = chunk.draw.history if chunk.draw is not None else None
            assert (history is not None) == (chunk.request_id == "young" and chunk.draw is not None)
            if history is not None and history.counts is not None:
                assert history.counts.tokens.tolist() == list(dict.fromkeys([9, 8, 7, 6, *generated]))
                assert int(history.counts.generated.sum()) == len(generated)
        for output in scheduler.apply(batch, runner.step(batch)):
            generated += output.token_ids if output.request_id == "young" else ()
    assert preempted == 1
    assert len(generated) == 12


def test_stop_token_is_reported_and_ends() -> None:
    scheduler, runner = make(), ScriptedRunner()
    answer = expected_answer([3, 4], 5)
    scheduler.add(request("a", [3, 4], 50, stop=(answer[2],)))
    outputs = [output for _ in range(3) for output in run_step(scheduler, runner)[1]]
    assert [token for output in outputs for token in output.token_ids] == answer[:3]
    assert outputs[-1].finish_reason == "stop"
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [([], 4, "prompt has 0"), ([1], 0, "max_tokens is 0"), ([1] * 60, 5, "together they may be 64")],
    ids=["empty prompt", "no tokens", "too long"],
)
def test_what_can_never_run_is_refused(prompt: list[int], max_tokens: int, words: str) -> None:
    scheduler = make()
    with pytest.raises(RequestError, match=words):
        scheduler.add(request("a", prompt, max_tokens))
    assert not scheduler.has_work


def test_an_open_id_is_refused_and_an_ended_one_may_return() -> None:
    scheduler = make()
    scheduler.add(request("a", [1], 1))
    with pytest.raises(RequestError, match="in use"):
        scheduler.add(request("a", [1], 1))
    scheduler.abort("a")
    scheduler.add(request("a", [1], 1))


def test_contradicting_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_sequences is 64 and max_batch_tokens 32"):
        make(sequences=64)
    with pytest.raises(ConfigError, match="needs 16 KV blocks, and the cache has 3"):
        make(blocks=3)
