"""engine/supervisor.py against real processes without a model: every way to die or to hang, and what follows."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import pytest

from server.engine.stream import OutputStream
from server.engine.supervisor import Backoff, ModelState, Supervision, Supervisor
from server.errors import EngineUnavailableError, UnusableCheckpointError
from server.metrics import Metrics, ModelMetrics
from server.records import ModelSpec, SamplingParams
from tests.server.scripted_engine import command

FAST = Supervision(first_pause=0.05, longest_pause=0.2, restart_limit=3)
SHORT = SamplingParams(max_tokens=2)
ENDLESS = SamplingParams(max_tokens=10**6)


@asynccontextmanager
async def supervised(
    rules: Supervision = FAST, metrics: Metrics | None = None, **script: Any
) -> AsyncIterator[Supervisor]:
    """A model that has been loaded once; afterwards its engine and its tasks must be gone."""
    spec = ModelSpec(name="m", path="/nowhere", quantization=script)
    supervisor = Supervisor(spec, ModelMetrics(metrics or Metrics(), "m"), rules, command=command)
    await supervisor.start()
    try:
        await supervisor.wait_loaded()
        yield supervisor
    finally:
        await supervisor.shutdown()
        assert supervisor.state == "stopping"
        assert supervisor.retry_after() is None
        assert not Path(f"/proc/{supervisor.client.process_id}").exists()
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().endswith(" m")] == []


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        await asyncio.sleep(0.005)


async def tokens(stream: OutputStream) -> list[int]:
    with stream:
        return [token async for output in stream for token in output.token_ids]


async def answers(supervisor: Supervisor) -> bool:
    return await tokens(supervisor.client.generate(f"r{time.monotonic()}", [7], SHORT)) == [7, 7]


def restarts(metrics: Metrics, reason: str) -> float:
    return metrics.registry.get_sample_value("halfbyte_engine_restarts_total", {"model": "m", "reason": reason}) or 0


def states(metrics: Metrics) -> list[str]:
    """The states whose series is 1."""
    values = {
        state: metrics.registry.get_sample_value("halfbyte_engine_state", {"model": "m", "state": state})
        for state in get_args(ModelState)
    }
    return [state for state, value in values.items() if value]


def test_pauses_double_to_the_longest_and_start_over_after_a_life_that_lasted() -> None:
    backoff = Backoff(Supervision(first_pause=1, longest_pause=10, restart_limit=7))
    assert [backoff.next(lived=9.9) for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    assert backoff.next(lived=10.0) == 1
    assert [backoff.next(lived=0) for _ in range(7)] == [2, 4, 8, 10, 10, 10, None]
    assert backoff.next(lived=9) is None
    assert Backoff(Supervision(restart_limit=0)).next(lived=10**6) is None
    huge = Backoff(Supervision(restart_limit=1000))
    assert {huge.next(lived=0) for _ in range(1000)} == {1, 2, 4, 8, 16, 32, 60}


@pytest.mark.parametrize(
    ("script", "reason"),
    [({"die_after_steps": 2}, "signal"), ({"exit_after_steps": 2}, "exit"), ({"garbage_after_steps": 2}, "protocol")],
)
def test_an_engine_that_died_is_started_again(tmp_path: Path, script: dict[str, int], reason: str) -> None:
    metrics = Metrics()

    async def test() -> None:
        async with supervised(metrics=metrics, lives=[str(tmp_path / "lives"), [script, {}]]) as supervisor:
            first = supervisor.client
            assert states(metrics) == ["ready"]
            with pytest.raises(EngineUnavailableError, match="the engine of model 'm'"):
                await tokens(first.generate("r", [1, 3], ENDLESS))
            await until(lambda: supervisor.state == "restarting")
            assert states(metrics) == ["restarting"]
            with pytest.raises(
                EngineUnavailableError, match="the engine of model 'm' .*, and is being started again"
            ) as refused:
                supervisor.require_ready()
            assert refused.value.retry_after is not None
            assert not supervisor.hopeless
            await until(lambda: supervisor.state == "ready")
            assert supervisor.client is not first
            assert supervisor.require_ready().info.max_model_len == 512
            assert await answers(supervisor)
            assert supervisor.restarts == 1

    run(test)
    assert restarts(metrics, reason) == 1


def test_requests_wait_for_what_is_to_be_there_before_them(tmp_path: Path) -> None:
    async def test() -> None:
        async with supervised(lives=[str(tmp_path / "lives"), [{"die_after_steps": 2}, {}]]) as supervisor:
            begun, may_end = asyncio.Event(), asyncio.Event()
            tries = 0

            async def fails_once() -> None:
                nonlocal tries
                tries += 1
                begun.set()
                await may_end.wait()
                if tries == 1:
                    raise UnusableCheckpointError("the tokenizer is half written")

            supervisor.before_serving_again = fails_once
            with pytest.raises(EngineUnavailableError):
                await tokens(supervisor.client.generate("r", [1, 3], ENDLESS))
            await begun.wait()
            assert supervisor.client.state == "ready"
            assert supervisor.state == "restarting"
            with pytest.raises(EngineUnavailableError, match="and is being started again"):
                supervisor.require_ready()
            may_end.set()
            await until(lambda: supervisor.state == "ready")
            assert (tries, supervisor.restarts) == (2, 2)
            assert await answers(supervisor)

    run(test)


def test_one_that_never_lasts_is_given_up() -> None:
    metrics = Metrics()
    rules = Supervision(first_pause=0.02, longest_pause=30, restart_limit=3)

    async def test() -> None:
        async with supervised(rules, metrics, die_after_steps=1) as supervisor:
            while supervisor.state != "dead":
                if supervisor.state == "ready":
                    with pytest.raises(EngineUnavailableError):
                        await answers(supervisor)
                await asyncio.sleep(0.005)
            assert supervisor.hopeless
            assert supervisor.retry_after() is None
            with pytest.raises(EngineUnavailableError, match=r"SIGKILL\), and is not started again") as refused:
                supervisor.require_ready()
            assert refused.value.retry_after is None

    run(test)
    assert restarts(metrics, "signal") == 3


def test_with_no_restarts_the_first_death_is_the_last() -> None:
    async def test() -> None:
        async with supervised(Supervision(restart_limit=0)) as supervisor:
            supervisor.client.kill()
            await until(lambda: supervisor.state == "dead")
            assert supervisor.restarts == 0

    run(test)


def test_a_restart_that_does_not_fit_or_dies_is_tried_again(tmp_path: Path) -> None:
    metrics = Metrics()
    lives = [{}, {"fail": ["does_not_fit", "3 bytes too many"]}, {"die_while_loading": 7}, {}]

    async def test() -> None:
        async with supervised(metrics=metrics, lives=[str(tmp_path / "lives"), lives]) as supervisor:
            supervisor.client.kill()
            await until(lambda: supervisor.restarts == 3 and supervisor.state == "ready")
            assert await answers(supervisor)

    run(test)
    assert restarts(metrics, "signal") == 1
    assert restarts(metrics, "load") == 2


def test_a_restart_whose_configuration_is_refused_is_the_last(tmp_path: Path) -> None:
    lives = [{}, {"fail": ["config", "max_model_len is 5"]}, {}]

    async def test() -> None:
        async with supervised(lives=[str(tmp_path / "lives"), lives]) as supervisor:
            supervisor.client.kill()
            await until(lambda: supervisor.state == "dead")
            with pytest.raises(EngineUnavailableError, match=r"did not load again \(max_model_len is 5\), and is not"):
                supervisor.require_ready()
            assert (tmp_path / "lives").read_text() == ".."

    run(test)


def test_an_engine_that_cannot_be_spawned_again_counts_as_one_that_did_not_load() -> None:
    metrics = Metrics()

    async def test() -> None:
        async with supervised(metrics=metrics) as supervisor:
            supervisor._command = lambda _: ["/nowhere/python"]
            supervisor.client.kill()
            await until(lambda: supervisor.state == "dead")

    # The last life has no process, so the check of /proc looks for one called None.
    run(test)
    assert restarts(metrics, "load") == 2


@pytest.mark.parametrize("moment", ["pause", "loading"])
@pytest.mark.parametrize("how", ["keep_down", "shutdown"])
def test_nothing_is_started_once_it_is_told_to_stay_down(tmp_path: Path, moment: str, how: str) -> None:
    rules = Supervision(first_pause=0.01 if moment == "loading" else 60, longest_pause=60)

    async def test() -> None:
        lives = [str(tmp_path / "lives"), [{}, {"load_seconds": 60}]]
        async with supervised(rules, lives=lives) as supervisor:
            first = supervisor.client
            first.kill()
            await until(lambda: supervisor.state == "restarting")
            if moment == "loading":
                await until(lambda: supervisor.client is not first and supervisor.client.progress.bytes_total)
            if how == "keep_down":
                supervisor.keep_down()
                if moment == "pause":
                    await until(lambda: supervisor.state == "dead")

    run(test)
    assert len((tmp_path / "lives").read_text()) == (1 if moment == "pause" else 2)


STUCK = Supervision(stuck_seconds=0.3, first_pause=0.05, longest_pause=0.2)


def test_a_stuck_engine_is_said_to_be_stuck_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()

    async def test() -> None:
        async with supervised(STUCK, metrics, hang_after_steps=1) as supervisor:
            await asyncio.sleep(2 * STUCK.stuck_seconds)
            assert supervisor.state == "ready", "one that has nothing to do is not stuck"
            stream = supervisor.client.generate("r", [5], ENDLESS)
            await anext(stream)
            await until(lambda: supervisor.state == "stuck")
            assert supervisor.hopeless
            assert states(metrics) == ["stuck"]
            await until(lambda: "has not moved for" in caplog.text)
            stalled = metrics.registry.get_sample_value("halfbyte_engine_stalled_seconds", {"model": "m"})
            assert stalled is not None
            assert stalled > STUCK.stuck_seconds
            supervisor.require_ready()
            stream.close()
            assert supervisor.state == "stuck", "that nobody waits any more does not make it move"

    with caplog.at_level(logging.INFO):
        run(test)
    assert caplog.text.count("has not moved for") == 1
    assert "with 1 requests open" in caplog.text


def test_a_stuck_engine_is_killed_and_started_again_where_that_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    rules = Supervision(stuck_seconds=0.3, first_pause=0.05, longest_pause=0.2, restart_stuck=True)

    async def test() -> None:
        lives = [str(tmp_path / "lives"), [{"hang_after_steps": 1}, {}]]
        async with supervised(rules, metrics, lives=lives) as supervisor:
            with pytest.raises(
                EngineUnavailableError, match=r"was killed because it had not moved for \d+\.\d s with 1"
            ):
                await tokens(supervisor.client.generate("r", [5], ENDLESS))
            await until(lambda: supervisor.state == "ready")
            assert await answers(supervisor)
            await asyncio.sleep(2 * rules.stuck_seconds)

    with caplog.at_level(logging.INFO):
        run(test)
    assert restarts(metrics, "stuck") == 1
    assert "no longer stuck" not in caplog.text


def test_long_steps_are_stuck_while_they_last(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with supervised(STUCK, step_seconds=1.5) as supervisor:
            assert await answers(supervisor)
            await until(lambda: "no longer stuck" in caplog.text)
            assert supervisor.state == "ready"
            assert supervisor.client.death is None

    with caplog.at_level(logging.INFO):
        run(test)
    assert "has not moved" in caplog.text


def test_an_answer_that_nobody_reads_keeps_no_engine_stuck() -> None:
    async def test() -> None:
        async with supervised(STUCK) as supervisor:
            with supervisor.client.generate("r", [5], SHORT):
                await asyncio.sleep(3 * STUCK.stuck_seconds)
                assert supervisor.client.open_requests == 1
                assert supervisor.state == "ready"
                assert supervisor.client.open_work == (0, 0)

    run(test)


def test_killing_says_what_it_cuts_and_keeps_down() -> None:
    async def test() -> None:
        async with supervised(step_seconds=0.01) as supervisor:
            streams = [supervisor.client.generate(f"r{i}", [5], ENDLESS) for i in range(2)]
            for stream in streams:
                await anext(stream)
            cut = supervisor.kill()
            assert cut.requests == 2
            assert cut.tokens >= 2
            await until(lambda: supervisor.state == "dead")
            for stream in streams:
                with pytest.raises(EngineUnavailableError):
                    await tokens(stream)
            assert supervisor.restarts == 0

    run(test)


def test_retry_after_is_the_pause_that_is_left_and_the_time_that_loading_took() -> None:
    rules = Supervision(first_pause=50, longest_pause=60)

    async def test() -> None:
        async with supervised(rules, load_seconds=2.0) as supervisor:
            assert supervisor.client.process_id is not None
            os.kill(supervisor.client.process_id, signal.SIGKILL)
            await until(lambda: supervisor._state == "restarting")  # `state` says so before the pause has begun
            after = supervisor.retry_after()
            assert after is not None
            assert 50 < after <= 50 + supervisor._load_seconds + 1  # type: ignore[operator]

    run(test)


def test_one_that_hangs_again_and_again_is_given_up() -> None:
    """The time for which it hung is not counted as a life that lasted, however long that is."""
    rules = Supervision(stuck_seconds=0.3, first_pause=0.02, longest_pause=0.1, restart_limit=2, restart_stuck=True)

    async def test() -> None:
        async with supervised(rules, hang_after_steps=1) as supervisor:
            while supervisor.state != "dead":
                if supervisor.state == "ready":
                    with pytest.raises(EngineUnavailableError):
                        await tokens(supervisor.client.generate("r", [5], ENDLESS))
                await asyncio.sleep(0.005)
            assert supervisor.restarts == rules.restart_limit

    run(test)


def test_a_start_that_the_system_refuses_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with supervised() as supervisor:
            refused = iter([OSError(24, "Too many open files"), RuntimeError("can't start new thread")])
            real = socket.socketpair

            def socketpair(*args: Any) -> Any:
                error = next(refused, None)
                if error is not None:
                    raise error
                return real(*args)

            monkeypatch.setattr("server.engine.client.socket.socketpair", socketpair)
            supervisor.client.kill()
            await until(lambda: supervisor.restarts == 3 and supervisor.state == "ready")
            assert await answers(supervisor)

    run(test)
