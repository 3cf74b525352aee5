"""The engine's loop over a scripted runner: sharing steps, joining between them, and what an error costs whom."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable

import pytest

from server.engine.blocks import BlockPool
from server.engine.loop import EngineLoop
from server.engine.scheduler import Scheduler
from server.model.batch import StepError
from server.records import (
    KV_BLOCK_TOKENS,
    Abort,
    Generate,
    Record,
    SamplingParams,
    SequenceOutput,
    Shutdown,
    StepReport,
)
from tests.server.scripted import PERIOD, REPETITIVE, VOCABULARY, PagedScriptedRunner, ScriptedRunner, expected_answer


class Bench:
    """A loop whose inbox is fed by the test, before it starts and from inside the reports it sends."""

    def __init__(
        self, *, blocks: int = 200, budget: int = 64, sequences: int = 16, runner: PagedScriptedRunner | None = None
    ) -> None:
        self.runner = ScriptedRunner()
        pool = BlockPool(blocks)
        self.scheduler = Scheduler(
            pool, max_batch_tokens=budget, max_sequences=sequences, max_model_len=200, speculative_tokens=4
        )
        self.inbox: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self.reports: list[StepReport] = []
        self.after_step: Callable[[StepReport], None] = lambda report: None
        self.loop = EngineLoop(self.scheduler, runner or self.runner, self.inbox, self.report, vocab_size=VOCABULARY)

    def report(self, report: StepReport) -> None:
        self.reports.append(report)
        self.after_step(report)
        if not self.scheduler.has_work and self.inbox.empty():
            self.inbox.put(Shutdown())

    def generate(self, name: str, prompt: list[int], max_tokens: int = 8) -> None:
        self.inbox.put(Generate(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0)))

    def outputs(self, name: str) -> list[SequenceOutput]:
        return [output for report in self.reports for output in report.outputs if output.request_id == name]

    def answer(self, name: str) -> list[int]:
        return [token for output in self.outputs(name) for token in output.token_ids]

    def end(self, name: str) -> SequenceOutput:
        ends = [output for output in self.outputs(name) if output.finish_reason is not None]
        assert len(ends) == 1, f"{name} ended {len(ends)} times"
        return ends[0]


def test_eight_requests_share_steps() -> None:
    bench = Bench()
    prompts = {f"r{i}": [random.randrange(VOCABULARY) for _ in range(random.randint(1, 7))] for i in range(8)}
    for name, prompt in prompts.items():
        bench.generate(name, prompt, 10)
    bench.loop.run()
    assert sum(report.forward_passes for report in bench.reports) == len(bench.runner.batches) == 10
    for name, prompt in prompts.items():
        assert bench.answer(name) == expected_answer(prompt, 10)
        assert bench.end(name).finish_reason == "length"
    assert bench.reports[0].prefill_tokens == sum(map(len, prompts.values()))
    assert [report.decode_tokens for report in bench.reports] == [0] + [8] * 9
    assert bench.reports[-1].kv_blocks_used == 0


def test_newcomers_join_between_steps() -> None:
    bench = Bench()
    bench.generate("first", [1, 2, 3], 12)
    bench.after_step = lambda report: (
        bench.generate(f"late{report.step}", [report.step], 3) if report.step < 5 else None
    )
    bench.loop.run()
    assert len(bench.runner.batches) == 12, "the first request's own steps carried all the others"
    for step in range(1, 5):
        assert bench.answer(f"late{step}") == expected_answer([step], 3)
    assert bench.answer("first") == expected_answer([1, 2, 3], 12)


def test_an_abort_ends_once_and_frees_its_blocks() -> None:
    bench = Bench()
    bench.generate("a", [1] * 40, 100)
    bench.generate("b", [2] * 40, 20)
    bench.generate("gone", [3], 5)
    bench.inbox.put(Abort("gone"))
    bench.after_step = lambda report: bench.inbox.put(Abort("a")) if report.step == 5 else None
    bench.loop.run()
    assert bench.end("a").finish_reason == bench.end("gone").finish_reason == "abort"
    assert bench.answer("gone") == []
    assert bench.answer("a") == expected_answer([1] * 40, len(bench.answer("a")))
    assert bench.answer("b") == expected_answer([2] * 40, 20)
    assert bench.runner.cached == {}
    assert bench.reports[-1].kv_blocks_used == 0


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (StepError("the device ran out of memory"), "the device ran out of memory"),
        (RuntimeError("/srv/kernel said no\nwith a second line"), "(RuntimeError); the engine's log has the details"),
    ],
    ids=["step error", "anything else"],
)
def test_a_failed_step_ends_its_requests_and_the_loop_goes_on(failure: Exception, sentence: str) -> None:
    bench = Bench(sequences=2)
    for name in ("a", "b", "waits"):
        bench.generate(name, [7, 8], 6)

    def spoil(report: StepReport) -> None:
        if report.step == 3:
            bench.runner.fail_next = failure

    bench.after_step = spoil
    bench.loop.run()
    for name in ("a", "b"):
        assert bench.end(name).finish_reason == "error"
        error = bench.end(name).error
        assert error is not None
        assert sentence in error
        assert "kernel" not in error
        assert bench.answer(name) == expected_answer([7, 8], 3)
    assert bench.answer("waits") == expected_answer([7, 8], 6)
    assert bench.runner.cached == {}


def test_an_error_of_one_request_harms_no_other() -> None:
    bench = Bench()
    bench.runner.poisoned = {"bad"}
    for name in ("good", "bad", "fine"):
        bench.generate(name, [4, 5], 6)
    bench.loop.run()
    assert bench.end("bad").error == "a scripted error"
    for name in ("good", "fine"):
        assert bench.answer(name) == expected_answer([4, 5], 6)


def test_what_cannot_be_served_is_answered_with_a_sentence() -> None:
    bench = Bench()
    bench.generate("long", [1] * 150, 100)
    bench.generate("wild", [1, VOCABULARY], 5)
    bench.generate("negative", [-1], 5)
    bench.generate("good", [1], 2)
    bench.loop.run()
    assert "together they may be 200" in (bench.end("long").error or "")
    assert f"token id {VOCABULARY}; accepted are 0 to {VOCABULARY - 1}" in (bench.end("wild").error or "")
    assert "token id -1" in (bench.end("negative").error or "")
    assert bench.answer("good") == expected_answer([1], 2)


def test_a_second_request_of_an_open_id_leaves_the_first_alone() -> None:
    bench = Bench()
    bench.generate("a", [1], 3)
    bench.generate("a", [2], 3)
    bench.loop.run()
    assert bench.answer("a") == expected_answer([1], 3)


def test_a_deadline_ends_a_request_once_and_in_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves with each report alone."""
    bench = Bench(sequences=2)
    monkeypatch.setattr("server.engine.loop.time.monotonic", lambda: float(len(bench.reports)))
    params = SamplingParams(max_tokens=20, temperature=0.0)
    bench.generate("stays", [1, 2], 8)
    bench.inbox.put(Generate("runs", (3, 4), params, deadline=5.0))
    bench.inbox.put(Generate("waits", (5, 6), params, deadline=2.0))
    bench.inbox.put(Generate("came too late", (7, 8), params, deadline=-1.0))
    bench.loop.run()
    assert bench.end("waits").finish_reason == bench.end("runs").finish_reason == "timeout"
    assert "0 of at most 20 tokens" in str(bench.end("waits").error)
    assert "5 of at most 20 tokens" in str(bench.end("runs").error)
    assert bench.answer("runs") == expected_answer([3, 4], 5)
    assert bench.answer("came too late") == bench.answer("waits") == []
    assert bench.answer("stays") == expected_answer([1, 2], 8)
    assert [len(report.queue_seconds) for report in bench.reports] == [2, *[0] * 7]
    assert bench.runner.cached == {}


def test_all_that_are_late_are_told_though_no_step_is_left() -> None:
    bench = Bench()
    bench.inbox.put(Generate("late", (1, 2), SamplingParams(max_tokens=5), deadline=0.0))
    bench.loop.run()
    assert bench.end("late").finish_reason == "timeout"
    assert bench.runner.batches == []
    assert [report.forward_passes for report in bench.reports] == [0]


def test_reports_count_what_was_found_in_the_cache() -> None:
    bench = Bench(runner=PagedScriptedRunner(KV_BLOCK_TOKENS))
    prompt = list(range(40))
    bench.generate("a", prompt, 3)
    bench.after_step = lambda report: bench.generate("b", prompt, 3) if report.step == 2 else None
    bench.loop.run()
    found = [(report.prefix_query_tokens, report.prefix_hit_tokens) for report in bench.reports]
    assert found == [(40, 0), (0, 0), (40, 32), (0, 0), (0, 0)]
    assert [report.kv_blocks_cached for report in bench.reports] == [0, 0, 0, 0, 2]
    assert [output.cached_tokens for output in bench.outputs("b")] == [32, 0, 0]
    assert bench.answer("b") == expected_answer(prompt, 3)


def test_a_runner_that_shares_no_blocks_is_never_asked_to() -> None:
    bench = Bench()
    prompt = list(range(40))
    for name in "ab":
        bench.generate(name, prompt, 3)
    bench.loop.run()
    assert not bench.scheduler.prefix_caching
    assert sum(report.prefix_query_tokens for report in bench.reports) == 0
    assert bench.answer("a") == bench.answer("b") == expected_answer(prompt, 3)


def test_each_request_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves with each report alone: steps take less time here than a busy machine may pause."""
    bench = Bench(sequences=2)
    monkeypatch.setattr("server.engine.loop.time.perf_counter", lambda: float(len(bench.reports)))
    for name in "abc":
        bench.generate(name, [1], 3)
    bench.generate("refused", [-1], 3)
    bench.loop.run()
    assert [report.queue_seconds for report in bench.reports] == [(0.0, 0.0), (), (), (3.0,), (), ()]


def test_shutdown_stops_an_idle_loop_and_a_stray_abort_makes_no_step() -> None:
    bench = Bench()
    bench.inbox.put(Abort("nobody"))
    bench.inbox.put(Shutdown())
    bench.loop.run()
    assert bench.reports == []


@pytest.mark.parametrize(("blocks", "crowded"), [(200, False), (13, True)])
def test_reports_count_who_gave_up_blocks(blocks: int, crowded: bool) -> None:
    bench = Bench(blocks=blocks)
    for number in range(4):
        bench.generate(f"r{number}", [number + 1] * 30, 60)
    bench.loop.run()
    preemptions = sum(report.preemptions for report in bench.reports)
    # Whoever is preempted takes part for the first time once more, as the prefix cache is asked again.
    asked = sum(report.prefix_query_tokens > 0 for report in bench.reports)
    assert (preemptions > 0) == crowded
    assert asked <= 4 + preemptions
    assert all(len(bench.answer(f"r{number}")) == 60 for number in range(4))


def test_an_answer_that_does_not_continue_its_prompt_has_a_beginning_of_its_own() -> None:
    bench = Bench()
    bench.runner.decoder_prompt = (7, 8)
    bench.generate("a", [1, 2, 3], 4)
    scored = SamplingParams(max_tokens=4, prompt_logprobs=0)
    bench.inbox.put(Generate("b", (1, 2), scored))
    bench.loop.run()
    first, second, *_ = [batch.chunks[0] for batch in bench.runner.batches]
    assert (list(first.tokens), first.encoder_tokens) == ([1, 2, 3, 7, 8], 3)
    assert (len(second.tokens), second.start, second.encoder_tokens) == (1, 5, 3)
    assert bench.answer("a") == expected_answer([1, 2, 3, 7, 8], 4)
    assert bench.end("b").refused
    assert "logprobs of its prompt" in str(bench.end("b").error)


def test_reports_count_guesses_and_a_runner_that_checks_none_gets_none() -> None:
    prompt = [REPETITIVE, *(place % PERIOD for place in range(20))]
    found: list[tuple[int, int, int, int]] = []
    for runner in (PagedScriptedRunner(KV_BLOCK_TOKENS), None):
        bench = Bench(runner=runner)
        bench.generate("circles", prompt, 40)
        bench.generate("plain", [5, 6], 10)
        bench.loop.run()
        assert bench.answer("circles") == expected_answer(prompt, 40)
        assert bench.answer("plain") == expected_answer([5, 6], 10)
        guesses = sum(report.draft_tokens for report in bench.reports)
        accepted = sum(report.accepted_draft_tokens for report in bench.reports)
        assert sum(report.prefill_tokens for report in bench.reports) == len(prompt) + 2
        assert sum(report.decode_tokens for report in bench.reports) == 39 + 9 - accepted
        found.append((len(bench.reports), guesses, accepted, bench.scheduler.speculative_tokens))
    assert found[1] == (40, 0, 0, 0)
    steps, guesses, accepted, _ = found[0]
    assert steps == 40 - accepted
    assert guesses > accepted > 10
