"""The scheduler's promises as properties, over random sequences of what can happen to it, and in plain examples."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.blocks import BlockPool
from server.engine.lookup import Lookup
from server.engine.scheduler import PRIORITY_SECONDS, Scheduler
from server.errors import ConfigError, RequestError
from server.model.batch import Batch, Chunk, StepResult
from server.records import GUESSED_ROWS, Generate, SamplingParams, SequenceOutput, TokenLogprobs
from tests.server.scripted import PERIOD, REPETITIVE, PagedScriptedRunner, expected_answer, scored

BLOCK = 4


def request(
    name: str,
    prompt: list[int],
    max_tokens: int,
    stop: tuple[int, ...] = (),
    prompt_logprobs: int | None = None,
    logprobs: int | None = None,
    **fields: Any,
) -> Generate:
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=stop, seed=1, prompt_logprobs=prompt_logprobs, logprobs=logprobs
    )
    return Generate(name, tuple(prompt), params, **fields)


class SchedulerMachine(RuleBasedStateMachine):
    """Small pools and budgets, and prompts that go on from others, so that all there is to go wrong is in most runs."""

    @initialize(
        extra_blocks=st.sampled_from([0, 1, 3, 6]),
        budget=st.integers(4, 24),
        sequences=st.sampled_from([4, 3, 1]),
        limit=st.sampled_from([40, 24, 13]),
        caching=st.sampled_from([True, True, True, False]),
        speculative=st.sampled_from([0, 1, 4, 9]),
        switch=st.sampled_from([None, None, 6, 12, 21]),
    )
    def start(
        self,
        extra_blocks: int,
        budget: int,
        sequences: int,
        limit: int,
        caching: bool,
        speculative: int,
        switch: int | None,
    ) -> None:
        self.limit = limit
        self.budget = budget
        self.caching = caching
        pool = BlockPool(-(-limit // BLOCK) + extra_blocks, BLOCK)
        self.scheduler = Scheduler(
            pool,
            max_batch_tokens=budget,
            max_sequences=sequences,
            max_model_len=limit,
            prefix_caching=caching,
            speculative_tokens=speculative,
        )
        self.scheduler.switch_length = switch
        self.runner = PagedScriptedRunner(BLOCK, switch)
        self.now = 0.0
        self.requests: dict[str, Generate] = {}
        self.ranks: dict[str, tuple[float, int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.scores: dict[str, list[TokenLogprobs]] = {}
        self.ends: Counter[str] = Counter()

    @rule(
        data=st.data(),
        fork=st.sampled_from([0, 4, 9, 16, 99]),
        priority=st.sampled_from([0, 0, -2, -1, 1, 2]),
        salt=st.sampled_from(["", "", "", "a"]),
        timeout=st.sampled_from([None, None, None, 0.0, 7.0, 40.0]),
        circle=st.sampled_from([None, PERIOD]),
    )
    def add(
        self, data: st.DataObject, fork: int, priority: int, salt: str, timeout: float | None, circle: int | None
    ) -> None:
        """A prompt that is the common text up to a fork, or that goes on from what another said; or one in circles."""
        name = f"r{len(self.requests)}"
        length = data.draw(st.integers(1, self.limit - 1))
        begun = data.draw(st.sampled_from([None, *self.requests]))
        text = list(range(fork)) if begun is None else [*self.requests[begun].prompt, *self.answers[begun]]
        if circle is not None and begun is None:
            text = [REPETITIVE, *(place % circle for place in range(fork))]
        own = (100 + len(self.requests) + (place % circle if circle else place) for place in range(length))
        prompt = [*text, *own][:length]
        most = data.draw(st.just(self.limit - length) | st.integers(1, self.limit - length))
        ends = data.draw(st.none() | st.sampled_from(expected_answer(prompt, most)))
        self.requests[name] = request(
            name,
            prompt,
            most,
            () if ends is None else (ends,),
            **data.draw(st.sampled_from([{}, {}, {"logprobs": 1}, {"prompt_logprobs": 1}])),
            priority=priority,
            cache_salt=salt,
            deadline=None if timeout is None else self.now + timeout,
        )
        self.ranks[name] = (self.now + PRIORITY_SECONDS * priority, len(self.ranks))
        self.answers[name] = []
        self.scores[name] = []
        self.scheduler.add(self.requests[name], self.now)

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for output in self.scheduler.expire(self.now):
            assert output.finish_reason == "timeout"
            assert output.error is not None
            assert self.is_late(output.request_id)
            self.take(output)
        assert not any(self.is_late(name) for name in self.open())

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        batch = self.schedule()
        if batch is None:
            assert not self.scheduler.has_work
            return
        for output in self.scheduler.apply(batch, self.runner.step(batch)):
            self.take(output)

    @rule(data=st.data())
    def step_with_an_error(self, data: st.DataObject) -> None:
        batch = self.schedule()
        if batch is None:
            return
        bad = data.draw(st.sampled_from([chunk.request_id for chunk in batch.chunks]))
        self.runner.poisoned = {bad}
        outputs = self.scheduler.apply(batch, self.runner.step(batch))
        self.runner.poisoned = set()
        assert [o.request_id for o in outputs if o.finish_reason == "error"] == [bad]
        for output in outputs:
            self.take(output)

    @rule()
    def failed_step(self) -> None:
        batch = self.schedule()
        if batch is not None:
            self.runner.spoil(batch)
            for output in self.scheduler.fail(batch, "the step failed"):
                assert (output.finish_reason, output.error) == ("error", "the step failed")
                self.take(output)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*self.requests, "unknown"]))
        is_open = name in self.open()
        output = self.scheduler.abort(name)
        assert (output is not None) == is_open
        if output is not None:
            assert output.finish_reason == "abort"
            self.take(output)

    def teardown(self) -> None:
        """Whatever has happened: everybody ends."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.pool.used == 0
        assert self.scheduler.schedule() is None

    def open(self) -> list[str]:
        return [name for name in self.requests if self.ends[name] == 0]

    def is_late(self, name: str) -> bool:
        deadline = self.requests[name].deadline
        return deadline is not None and deadline <= self.now

    def schedule(self) -> Batch | None:
        ran = {sequence.request.request_id for sequence in self.scheduler.running}
        without = copy.deepcopy(self.scheduler) if self.scheduler.speculative_tokens else None
        batch = self.scheduler.schedule()
        if batch is not None:
            self.check_batch(batch, ran)
        if without is not None:
            self.check_that_guesses_displace_nothing(batch, without)
        return batch

    def check_that_guesses_displace_nothing(self, batch: Batch | None, without: Scheduler) -> None:
        """The same chunks on the same blocks, the same victims; and behind a draft there is still a token to draw."""
        without.speculative_tokens = 0
        plain = without.schedule()
        assert without.preempted == self.scheduler.preempted
        assert (batch is None) == (plain is None)
        for chunk, other in zip(batch.chunks if batch else (), plain.chunks if plain else (), strict=True):
            known = len(chunk.tokens) - chunk.drafted
            assert (chunk.request_id, chunk.start, chunk.draw is None, chunk.score) == (
                other.request_id, other.start, other.draw is None, other.score,
            )  # fmt: skip
            assert tuple(chunk.tokens[:known]) == tuple(other.tokens)
            assert list(chunk.blocks[: len(other.blocks)]) == list(other.blocks)
            assert len(chunk.blocks) == max(len(other.blocks), -(-chunk.end // BLOCK))
            if chunk.drafted:
                assert chunk.drafted <= self.scheduler.speculative_tokens
                assert chunk.is_decode
                assert chunk.draw is not None
                assert chunk.draw.index + chunk.drafted < chunk.draw.params.max_tokens

    def check_batch(self, batch: Batch, ran: set[str]) -> None:
        assert 1 <= batch.tokens <= self.budget
        names = [chunk.request_id for chunk in batch.chunks]
        assert len(names) == len(set(names))
        running = {sequence.request.request_id: sequence for sequence in self.scheduler.running}
        for chunk in batch.chunks:
            assert len(chunk.tokens) >= 1
            assert len(chunk.blocks) * BLOCK >= chunk.end
            known = len(running[chunk.request_id].tokens)
            assert chunk.end - chunk.drafted <= known
            for length in (known, known + chunk.drafted):
                assert chunk.switched == (self.runner.switch_length is not None and length > self.runner.switch_length)
            self.check_what_is_read(chunk)
            for block in chunk.blocks[chunk.start // BLOCK :]:
                assert self.scheduler.pool.owners(block) == 1, "what is written is read by another"
        admitted = [name for name in running if name not in ran]
        for some in ([name for name in names if name in ran and running[name].remaining > 1], admitted):
            assert some == sorted(some, key=self.ranks.__getitem__)
        waiting = [self.ranks[sequence.request.request_id] for sequence in self.scheduler.waiting]
        if admitted and waiting:
            assert max(self.ranks[name] for name in admitted) < min(waiting), "somebody was passed over"

    def check_what_is_read(self, chunk: Chunk) -> None:
        """The cache model: a block holds the tokens that were written there, and only a tenant's own are read."""
        asked = self.requests[chunk.request_id]
        tokens = [*asked.prompt, *self.answers[chunk.request_id]]
        read = self.runner.read(chunk.blocks, chunk.start, switched=chunk.switched)
        assert list(read) == tokens[: chunk.start]
        for position in range(chunk.start):
            writer = self.runner.writers[self.runner.slot(chunk.blocks, position)]
            assert self.requests[writer].cache_salt == asked.cache_salt
            assert self.caching or writer == chunk.request_id

    def take(self, output: SequenceOutput) -> None:
        name = output.request_id
        assert self.ends[name] == 0, "an answer after the end"
        asked = self.requests[name]
        self.scores[name] += output.prompt_logprobs
        position = len(asked.prompt) + len(self.answers[name])
        wanted = scored(output.token_ids, position) if asked.sampling.logprobs is not None else []
        assert list(output.logprobs) == wanted
        self.answers[name] += output.token_ids
        assert 0 <= output.cached_tokens < len(asked.prompt)
        assert output.cached_tokens == 0 or (output.token_ids and len(self.answers[name]) == 1)
        assert output.cached_tokens == 0 or asked.sampling.prompt_logprobs is None
        prompt_scores = scored(asked.prompt[1:], 1) if asked.sampling.prompt_logprobs is not None else []
        complete = bool(output.token_ids)
        assert self.scores[name] == (prompt_scores if complete else prompt_scores[: len(self.scores[name])])
        if output.finish_reason is None:
            assert output.token_ids or output.prompt_logprobs
            return
        self.ends[name] += 1
        answer = expected_answer(asked.prompt, asked.sampling.max_tokens)
        stops = [place for place, token in enumerate(answer, start=1) if token in asked.sampling.stop_token_ids]
        if output.finish_reason == "length":
            assert self.answers[name] == answer
            assert not stops
        elif output.finish_reason == "stop":
            assert self.answers[name] == answer[: stops[0]]
        else:
            assert self.answers[name] == answer[: len(self.answers[name])]
            assert not stops or len(self.answers[name]) < stops[0]

    @invariant()
    def blocks_have_as_many_owners_as_hold_them(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.pool
        held = Counter(block for sequence in self.scheduler.running for block in sequence.blocks)
        assert [pool.owners(block) for block in range(pool.total)] == [held[block] for block in range(pool.total)]
        assert pool.used == len(held)
        for sequence in self.scheduler.running:
            assert 1 <= len(set(sequence.blocks)) == len(sequence.blocks) <= -(-len(sequence.tokens) // BLOCK)
        assert all(not sequence.blocks for sequence in self.scheduler.waiting)
        assert self.caching or pool.cached == 0

    @invariant()
    def a_name_says_what_the_block_is_full_of(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        names = self.scheduler._names
        for name, block in self.scheduler.pool._by_name.items():
            tokens = self.runner.slots[block, BLOCK - 1]
            assert tokens is not None
            slot = block, BLOCK - 1
            chain = names.start(
                self.requests[self.runner.writers[slot]].cache_salt, switched=self.runner.switched[slot]
            )
            names.extend(chain, list(tokens), len(tokens) // BLOCK)
            assert chain[-1] == name

    @invariant()
    def queues_hold_what_is_open_by_rank(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        queues = [
            [sequence.request.request_id for sequence in queue]
            for queue in (self.scheduler.running, self.scheduler.waiting)
        ]
        assert sorted(queues[0] + queues[1]) == sorted(self.open())
        for queue in queues:
            assert queue == sorted(queue, key=self.ranks.__getitem__)
        assert len(self.scheduler.running) <= self.scheduler.max_sequences


SchedulerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40)
TestSchedulerProperties = SchedulerMachine.TestCase


def make(
    blocks: int = 100, budget: int = 32, sequences: int = 8, limit: int = 64, speculative_tokens: int = 0
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, BLOCK),
        max_batch_tokens=budget,
        max_sequences=sequences,
        max_model_len=limit,
        speculative_tokens=speculative_tokens,
    )


def run_step(scheduler: Scheduler, runner: PagedScriptedRunner) -> tuple[Batch, list[SequenceOutput]]:
    batch = scheduler.schedule()
    assert batch is not None
    return batch, scheduler.apply(batch, runner.step(batch))


def test_a_long_prompt_is_chunked_beside_decodes() -> None:
    scheduler, runner = make(budget=20), PagedScriptedRunner(BLOCK)
    scheduler.add(request("short", [1, 2], 20), 0.0)
    run_step(scheduler, runner)
    scheduler.add(request("long", list(range(25)), 5), 0.0)
    sizes = []
    for _ in range(4):
        batch, outputs = run_step(scheduler, runner)
        sizes.append({chunk.request_id: len(chunk.tokens) for chunk in batch.chunks})
        assert "short" in {output.request_id for output in outputs}, "a decode is never held up by a prefill"
    assert sizes == [{"short": 1, "long": 9}, {"short": 1, "long": 9}, {"short": 1, "long": 7}, {"short": 1, "long": 1}]


@pytest.mark.parametrize(("decoding", "tokens"), [(0, 40), (1, 20), (3, 20), (4, 24), (6, 36), (7, 40)])
def test_the_more_wait_for_a_step_in_the_middle_of_an_answer_the_smaller_its_chunks(decoding: int, tokens: int) -> None:
    """Half of the budget beside somebody, or six tokens for each of many; all of it where nobody waits."""
    scheduler, runner = make(blocks=60, budget=40, limit=100), PagedScriptedRunner(BLOCK)
    for which in range(decoding):
        scheduler.add(request(f"short{which}", [which], 20), 0.0)
    if decoding:
        run_step(scheduler, runner)
    scheduler.add(request("long", list(range(90)), 5), 0.0)
    batch, _ = run_step(scheduler, runner)
    assert batch.tokens == tokens
    assert [len(chunk.tokens) for chunk in batch.chunks] == [1] * decoding + [tokens - decoding]


def test_a_newcomer_joins_between_steps() -> None:
    scheduler, runner = make(), PagedScriptedRunner(BLOCK)
    scheduler.add(request("a", [5], 4), 0.0)
    run_step(scheduler, runner)
    scheduler.add(request("b", [6, 7], 4), 0.0)
    batch, _ = run_step(scheduler, runner)
    assert [chunk.request_id for chunk in batch.chunks] == ["a", "b"]


def test_the_youngest_is_preempted_and_still_answers_right() -> None:
    scheduler, runner = make(blocks=6, limit=24), PagedScriptedRunner(BLOCK)
    scheduler.add(request("old", [1, 2, 3, 4], 20), 0.0)
    scheduler.add(request("young", [9, 8, 7, 6], 12), 0.0)
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
    scheduler, runner = make(blocks=9, budget=10, limit=36), PagedScriptedRunner(BLOCK)
    scheduler.add(request("old", [1, 2, 3, 4], 32), 0.0)
    scheduler.add(request("young", list(range(25)), 8, prompt_logprobs=0), 0.0)
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
    scheduler, runner = make(blocks=6, limit=24), PagedScriptedRunner(BLOCK)
    scheduler.add(request("old", [1, 2, 3, 4], 20), 0.0)
    penalised = SamplingParams(max_tokens=12, frequency_penalty=0.5)
    scheduler.add(Generate("young", (9, 8, 7, 6), penalised), 0.0)
    generated: list[int] = []
    preempted = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        preempted += len(scheduler.preempted)
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
    scheduler, runner = make(), PagedScriptedRunner(BLOCK)
    answer = expected_answer([3, 4], 5)
    scheduler.add(request("a", [3, 4], 50, stop=(answer[2],)), 0.0)
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
        scheduler.add(request("a", prompt, max_tokens), 0.0)
    assert not scheduler.has_work


def test_an_open_id_is_refused_and_an_ended_one_may_return() -> None:
    scheduler = make()
    scheduler.add(request("a", [1], 1), 0.0)
    with pytest.raises(RequestError, match="in use"):
        scheduler.add(request("a", [1], 1), 0.0)
    scheduler.abort("a")
    scheduler.add(request("a", [1], 1), 0.0)


def test_contradicting_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_sequences is 64 and max_batch_tokens 32"):
        make(sequences=64)
    with pytest.raises(ConfigError, match="needs 16 KV blocks, and the cache has 3"):
        make(blocks=3)


def first_chunks(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [chunk.request_id for chunk in batch.chunks]


def test_who_has_the_lower_priority_value_is_served_first() -> None:
    scheduler = make(sequences=1)
    for name, priority in (("late", 5), ("usual", 0), ("early", -3), ("usual too", 0)):
        scheduler.add(request(name, [1], 1, priority=priority), 0.0)
    runner, order = PagedScriptedRunner(BLOCK), []
    while scheduler.has_work:
        order += first_chunks(run_step(scheduler, runner)[0])
    assert order == ["early", "usual", "usual too", "late"]


def test_nobody_starves_behind_a_stream_of_the_privileged() -> None:
    """One request fits at a time, and each second brings one that is three steps more urgent."""
    scheduler, runner = make(sequences=1), PagedScriptedRunner(BLOCK)
    scheduler.add(request("patient", [1], 1, priority=1), 0.0)
    for second in range(1000):
        scheduler.add(request(f"urgent{second}", [1], 1, priority=-2), float(second))
        scheduler.add(request(f"more{second}", [1], 1, priority=-2), float(second))
        if "patient" in first_chunks(run_step(scheduler, runner)[0]):
            break
    assert 3 * PRIORITY_SECONDS < second + 1 <= 2 * (3 * PRIORITY_SECONDS + 1) + 1, (
        "its turn is after those it must let pass"
    )


def test_an_urgent_newcomer_goes_before_a_long_prompt_that_is_being_computed() -> None:
    scheduler, runner = make(budget=10), PagedScriptedRunner(BLOCK)
    scheduler.add(request("long", list(range(40)), 5), 0.0)
    run_step(scheduler, runner)
    scheduler.add(request("urgent", [7, 7, 7], 5, priority=-1), 1.0)
    scheduler.add(request("usual", [8, 8, 8], 5), 1.0)
    batch, _ = run_step(scheduler, runner)
    assert [(chunk.request_id, len(chunk.tokens)) for chunk in batch.chunks] == [("urgent", 3), ("long", 7)]


def test_the_last_in_rank_is_preempted_though_it_came_first() -> None:
    scheduler, runner = make(blocks=6, limit=24), PagedScriptedRunner(BLOCK)
    scheduler.add(request("first", [1, 2, 3, 4], 20, priority=1), 0.0)
    scheduler.add(request("urgent", [9, 8, 7, 6], 12), 0.0)
    preempted = []
    while scheduler.has_work:
        run_step(scheduler, runner)
        preempted += scheduler.preempted
    assert set(preempted) == {"first"}


def test_a_deadline_ends_who_waits_and_who_runs() -> None:
    scheduler, runner = make(sequences=1), PagedScriptedRunner(BLOCK)
    scheduler.add(request("runs", [1, 2], 50, deadline=5.0), 1.0)
    scheduler.add(request("waits", [1], 50, deadline=4.0), 2.0)
    scheduler.add(request("stays", [1], 2), 3.0)
    for _ in range(3):
        run_step(scheduler, runner)
    assert scheduler.expire(3.9) == []
    (waited,) = scheduler.expire(4.0)
    assert (waited.request_id, waited.finish_reason) == ("waits", "timeout")
    assert waited.error == (
        "the request's time was up, 2 seconds after it had reached the engine, with 0 of at most 50 tokens generated"
    )
    (ran,) = scheduler.expire(6.0)
    assert (ran.request_id, ran.finish_reason) == ("runs", "timeout")
    assert "5 seconds" in str(ran.error)
    assert "3 of at most 50 tokens" in str(ran.error)
    assert scheduler.expire(100.0) == []
    assert scheduler.pool.used == 0
    assert first_chunks(run_step(scheduler, runner)[0]) == ["stays"]


def answer_all(scheduler: Scheduler, runner: PagedScriptedRunner) -> dict[str, SequenceOutput]:
    """Runs dry; each request's first output."""
    first: dict[str, SequenceOutput] = {}
    while scheduler.has_work:
        for output in run_step(scheduler, runner)[1]:
            first.setdefault(output.request_id, output)
    return first


def test_a_shared_beginning_is_computed_once() -> None:
    """What the time to the second request's first token depends on: at most a tenth of its prompt is computed."""
    scheduler = Scheduler(BlockPool(200), max_batch_tokens=512, max_sequences=4, max_model_len=1200)
    runner = PagedScriptedRunner(scheduler.pool.block_tokens)
    system = [7 * place % 997 for place in range(1000)]
    scheduler.add(request("first", [*system, *range(40)], 5), 0.0)
    assert answer_all(scheduler, runner)["first"].cached_tokens == 0
    computed = runner.computed_tokens
    scheduler.add(request("second", [*system, *range(500, 540)], 1), 1.0)
    batch = scheduler.schedule()
    assert batch is not None
    assert (scheduler.queried_tokens, scheduler.hit_tokens) == (1040, 992)
    (output,) = scheduler.apply(batch, runner.step(batch))
    assert output.cached_tokens == 992
    assert runner.computed_tokens - computed == 1040 - 992 <= 1040 / 10
    scheduler.schedule()
    assert (scheduler.queried_tokens, scheduler.hit_tokens) == (0, 0)


def test_beginnings_are_shared_while_both_run_and_in_a_next_turn() -> None:
    scheduler, runner = make(), PagedScriptedRunner(BLOCK)
    prompt = list(range(12))
    scheduler.add(request("a", prompt, 20), 0.0)
    run_step(scheduler, runner)
    scheduler.add(request("b", prompt, 20), 0.0)
    run_step(scheduler, runner)
    a, b = scheduler.running
    assert a.blocks[:2] == b.blocks[:2], "eight tokens are shared; the last four hold the one that draws"
    assert a.blocks[2] != b.blocks[2]
    answer_all(scheduler, runner)
    turn = [*prompt, *expected_answer(prompt, 20), 5, 6]
    scheduler.add(request("next turn", turn, 3), 0.0)
    assert answer_all(scheduler, runner)["next turn"].cached_tokens == 28, "the last token was never computed"


def test_all_of_a_prompt_is_never_taken_from_the_cache() -> None:
    scheduler, runner = make(), PagedScriptedRunner(BLOCK)
    for name in ("a", "b"):
        scheduler.add(request(name, list(range(16)), 1), 0.0)
        assert answer_all(scheduler, runner)[name].cached_tokens == (12 if name == "b" else 0)


@pytest.mark.parametrize(("salts", "cached"), [(("", ""), 12), (("x", "x"), 12), (("x", "y"), 0), (("", "x"), 0)])
def test_tenants_find_only_their_own(salts: tuple[str, str], cached: int) -> None:
    scheduler, runner = make(), PagedScriptedRunner(BLOCK)
    for name, salt in zip("ab", salts, strict=True):
        scheduler.add(request(name, list(range(14)), 2, cache_salt=salt), 0.0)
        output = answer_all(scheduler, runner)[name]
    assert output.cached_tokens == cached


def test_nothing_is_found_where_caching_is_off() -> None:
    scheduler = make()
    scheduler.prefix_caching = False
    runner = PagedScriptedRunner(BLOCK)
    for name in "ab":
        scheduler.add(request(name, list(range(14)), 2), 0.0)
        assert answer_all(scheduler, runner)[name].cached_tokens == 0
    assert scheduler.pool.cached == scheduler.queried_tokens == 0


def test_who_is_preempted_finds_its_own_blocks_again() -> None:
    scheduler, runner = make(blocks=8, limit=32), PagedScriptedRunner(BLOCK)
    scheduler.add(request("old", list(range(12)), 8), 0.0)
    scheduler.add(request("young", list(range(100, 112)), 12), 0.0)
    preempted: list[str] = []
    while scheduler.has_work:
        run_step(scheduler, runner)
        preempted += scheduler.preempted
    assert preempted == ["young"]
    once = 12 + 7 + 12 + 11
    assert runner.computed_tokens == once + BLOCK, "of its four full blocks only the one was lost that the old one took"


@pytest.mark.parametrize("whole_step", [True, False])
def test_what_an_error_leaves_is_not_found_again(whole_step: bool) -> None:
    """Nor what the request had computed before: who knows since when it was wrong."""
    scheduler, runner = make(budget=10), PagedScriptedRunner(BLOCK)
    scheduler.add(request("bad", list(range(20)), 5), 0.0)
    run_step(scheduler, runner)
    if whole_step:
        batch = scheduler.schedule()
        assert batch is not None
        runner.spoil(batch)
        scheduler.fail(batch, "the step failed")
    else:
        runner.poisoned = {"bad"}
        run_step(scheduler, runner)
        runner.poisoned = set()
    assert scheduler.pool.cached == scheduler.pool.used == 0
    scheduler.add(request("good", list(range(20)), 5), 0.0)
    assert answer_all(scheduler, runner)["good"].cached_tokens == 0


def test_a_request_that_asks_for_the_impossible_leaves_what_it_shares() -> None:
    """Its own words are to blame; what others share with it was computed as ever."""
    scheduler, runner = make(), PagedScriptedRunner(BLOCK)
    prompt = list(range(20))
    scheduler.add(request("first", prompt, 5), 0.0)
    answer_all(scheduler, runner)
    scheduler.add(request("asks", prompt, 5), 0.0)
    batch = scheduler.schedule()
    assert batch is not None
    result = StepResult(errors={"asks": "no token is left to draw"}, refused={"asks"})
    (output,) = scheduler.apply(batch, result)
    assert output.refused
    assert batch.chunks[0].start == 16
    scheduler.add(request("next", prompt, 5), 0.0)
    assert answer_all(scheduler, runner)["next"].cached_tokens == 16


def test_an_aborted_prompt_leaves_what_was_computed_of_it() -> None:
    scheduler, runner = make(budget=10), PagedScriptedRunner(BLOCK)
    scheduler.add(request("gone", list(range(20)), 5), 0.0)
    run_step(scheduler, runner)
    scheduler.abort("gone")
    assert (scheduler.pool.used, scheduler.pool.cached) == (0, 2)
    scheduler.add(request("next", list(range(20)), 5), 0.0)
    assert answer_all(scheduler, runner)["next"].cached_tokens == 8


CIRCLES = [REPETITIVE, *(place % PERIOD for place in range(14))]


def drafted(batch: Batch) -> dict[str, int]:
    return {chunk.request_id: chunk.drafted for chunk in batch.chunks}


def test_a_text_in_circles_takes_fewer_steps_and_says_the_same() -> None:
    scheduler, runner = make(speculative_tokens=4), PagedScriptedRunner(BLOCK)
    scheduler.add(request("a", CIRCLES, 40, logprobs=0), 0.0)
    answer: list[int] = []
    guesses = accepted = steps = 0
    while scheduler.has_work:
        batch, (output,) = run_step(scheduler, runner)
        steps += 1
        assert scheduler.accepted_tokens <= batch.drafted_tokens <= 4
        assert len(output.token_ids) == 1 + scheduler.accepted_tokens
        answer += output.token_ids
        guesses += batch.drafted_tokens
        accepted += scheduler.accepted_tokens
        assert list(output.logprobs) == scored(output.token_ids, len(CIRCLES) + len(answer) - len(output.token_ids))
    assert answer == expected_answer(CIRCLES, 40)
    assert steps == 40 - accepted
    assert steps <= 25
    assert accepted < guesses, "the circles are broken now and then"
    assert runner.computed_tokens == len(CIRCLES) + steps - 1 + guesses
    assert (scheduler.pool.used, scheduler.pool.cached) == (0, (len(CIRCLES) + 39) // BLOCK)


def run_text(scheduler: Scheduler, text: list[int]) -> tuple[Batch, list[SequenceOutput]]:
    """A step of a model that says this text, whatever it is given."""
    batch = scheduler.schedule()
    assert batch is not None
    result = StepResult()
    for chunk in batch.chunks:
        if chunk.draw is not None:
            result.tokens[chunk.request_id] = chunk.kept(text[chunk.end - chunk.drafted : chunk.end + 1])
    return batch, scheduler.apply(batch, result)


def test_guesses_stop_where_they_are_wrong_and_begin_again_where_they_would_be_right() -> None:
    wrong = [token for place in range(40) for token in (1, 2, 3, 100 + place)]
    right = [11, 12, 13, 14, 15] * 40
    text = wrong + right
    scheduler = make(blocks=200, limit=400, speculative_tokens=4)
    scheduler.add(request("a", text[:8], len(text) - 8), 0.0)
    drafts: list[tuple[int, int]] = []
    while scheduler.has_work:
        at = len((scheduler.running or scheduler.waiting)[0].tokens)
        batch, _ = run_text(scheduler, text)
        drafts.append((at, batch.drafted_tokens))
    # What comes after 1, 2, 3 is another token each time, and alone in a step a rate of 0.5 * (7 / 8)^7 doesn't pay.
    assert [at for at, count in drafts if count and at < len(wrong)] == list(range(11, 36, 4))
    later = [count for at, count in drafts if at > len(wrong) + 30]
    assert later[:-2] == [4] * (len(later) - 2), (
        "a guess that nobody checks is compared with what was drawn all the same"
    )
    assert sum(later) + len(later) == len(right) - 30 - drafts[-len(later)][0] + len(wrong) + 30
    assert scheduler.pool.used == 0


def test_guesses_fill_what_prefills_leave_of_the_budget() -> None:
    text = [1, 2, 3, 4, 5] * 40
    scheduler = make(budget=24, limit=200, speculative_tokens=4)
    scheduler.add(request("circles", text[:12], 100), 0.0)
    while not (scheduler.running and scheduler.running[0].generated > 20):
        run_text(scheduler, text)
    scheduler.running[0].lookup.rate = 1.0  # so that it pays at any size
    scheduler.add(request("long", list(range(11 + 9)), 5), 0.0)
    batches = [run_text(scheduler, text)[0] for _ in range(3)]
    assert [[(len(chunk.tokens), chunk.drafted) for chunk in batch.chunks] for batch in batches] == [
        [(1, 0), (11, 0)],
        [(3, 2), (9, 0)],
        [(5, 4), (1, 0)],
    ]
    assert [batch.decode_tokens for batch in batches] == [1, 1, 2]
    assert [batch.drafted_tokens for batch in batches] == [0, 2, 4]


def test_guesses_take_free_blocks_only_and_give_back_what_did_not_come_true() -> None:
    text = [1, 2, 3, 4] * 12
    scheduler = make(blocks=6, limit=24, speculative_tokens=9)
    scheduler.add(request("a", text[:7], 17), 0.0)
    run_text(scheduler, text)
    (sequence,) = scheduler.running
    sequence.lookup.rate = 1.0
    held = scheduler.pool.take(3)
    batch, _ = run_text(scheduler, [*text[:8], 9, *text[8:]])
    assert (batch.drafted_tokens, scheduler.accepted_tokens) == (4, 0), "its own two blocks, and the last free one"
    assert (len(sequence.tokens), len(sequence.blocks), scheduler.pool.free) == (9, 3, 0)
    scheduler.pool.give_back(held)
    sequence.tokens[-1] = 1
    sequence.lookup = Lookup()
    sequence.lookup.rate = 1.0
    batch, _ = run_text(scheduler, [*text[:10], 9, *text[9:]])
    assert (batch.drafted_tokens, scheduler.accepted_tokens) == (9, 1)
    assert (len(sequence.tokens), len(sequence.blocks), scheduler.pool.free) == (11, 3, 3)


@pytest.mark.parametrize(
    ("limit", "stop", "reason"), [(20, (8, 9), "stop"), (20, (5, 8), "stop"), (9, (), "length"), (9, (8,), "stop")]
)
def test_a_text_ends_among_guesses_that_came_true(limit: int, stop: tuple[int, ...], reason: str) -> None:
    text = [*range(20), *range(20), 0]
    scheduler = make(speculative_tokens=9)
    scheduler.add(request("a", text[:20], limit, stop=stop, logprobs=0), 0.0)
    answer: list[int] = []
    while scheduler.has_work:
        for sequence in scheduler.running:
            sequence.lookup.rate = 1.0
        batch, (output,) = run_text(scheduler, text)
        answer += output.token_ids
    assert answer == list(range(min([*stop, limit - 1]) + 1))
    assert output.finish_reason == reason
    if limit > 9:
        assert batch.drafted_tokens > scheduler.accepted_tokens == len(output.token_ids) > 1
    assert (scheduler.pool.used, scheduler.pool.cached) == (0, (20 + len(answer) - 1) // BLOCK)


def test_what_a_step_accepted_is_said_once() -> None:
    text = [1, 2, 3, 4, 5] * 10
    scheduler = make(speculative_tokens=4)
    scheduler.add(request("a", text[:12], 30), 0.0)
    while not scheduler.accepted_tokens:
        run_text(scheduler, text)
    scheduler.abort("a")
    assert scheduler.schedule() is None
    assert scheduler.accepted_tokens == 0


def test_steps_with_guesses_have_so_many_rows_at_most() -> None:
    text = [1, 2, 3, 4, 5] * 20
    scheduler = make(blocks=400, budget=400, sequences=30, limit=100, speculative_tokens=9)
    for number in range(30):
        scheduler.add(request(f"r{number}", text[:12], 60), 0.0)
    run_text(scheduler, text)
    for sequence in scheduler.running:
        sequence.lookup.rate = 1.0
    batches = [run_text(scheduler, text)[0] for _ in range(3)]
    assert [batch.tokens for batch in batches] == [GUESSED_ROWS] * 3


def test_a_scored_prompt_is_not_looked_for_and_does_not_count_as_such() -> None:
    scheduler = make()
    scheduler.add(request("a", [1] * 9, 2), 0.0)
    run_step(scheduler, PagedScriptedRunner(BLOCK))
    assert scheduler.queried_tokens == 9
    scheduler.add(request("b", [1] * 9, 2, prompt_logprobs=0), 0.0)
    batch = scheduler.schedule()
    assert batch is not None
    assert [chunk.request_id for chunk in batch.chunks] == ["a", "b"]
    assert scheduler.queried_tokens == 0
