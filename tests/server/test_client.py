"""engine/client.py against a real process that speaks the records: loading, streams, aborts, every way to die."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.engine.client import EngineClient
from server.engine.room import Room
from server.engine.stream import OutputStream
from server.errors import (
    ConfigError,
    DeadlineExceededError,
    DoesNotFitError,
    EngineUnavailableError,
    LoadError,
    RequestError,
    ServerError,
    UnusableCheckpointError,
)
from server.metrics import Metrics, ModelMetrics
from server.records import LoadProgress, ModelSpec, SamplingParams, SequenceOutput, Shortage
from tests.server.scripted_engine import command

PARAMS = SamplingParams(max_tokens=5)


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value("halfbyte_" + name, labels)


@asynccontextmanager
async def engine(metrics: Metrics | None = None, wait: bool = True, **script: Any) -> AsyncIterator[EngineClient]:
    spec = ModelSpec(name="m", path="/nowhere", quantization=script)
    client = EngineClient(spec, ModelMetrics(metrics or Metrics(), "m"), command=command)
    await client.start()
    try:
        if wait:
            await client.wait_loaded()
        yield client
    finally:
        await client.shutdown()
        assert client.process_id is not None
        assert not Path(f"/proc/{client.process_id}").exists()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


async def tokens(stream: OutputStream) -> list[int]:
    with stream:
        return [token async for output in stream for token in output.token_ids]


def test_requests_share_steps_and_each_gets_its_own_tokens() -> None:
    metrics = Metrics()

    async def test() -> None:
        async with engine(metrics, step_seconds=0.05) as client:
            streams = [client.generate(f"r{i}", [10 * i + 1, 10 * i + 2, 10 * i + 3], PARAMS) for i in range(8)]
            assert client.open_requests == 8
            answers = await asyncio.gather(*map(tokens, streams))
            assert answers == [[10 * i + k for k in (1, 2, 3, 1, 2)] for i in range(8)]
            assert client.open_requests == 0

    run(test)
    assert sample(metrics, "requests_total", model="m", finish_reason="length") == 8
    assert sample(metrics, "prompt_tokens_total", model="m") == 24
    assert sample(metrics, "generation_tokens_total", model="m") == 40
    assert sample(metrics, "time_to_first_token_seconds_count", model="m") == 8
    assert sample(metrics, "inter_token_latency_seconds_count", model="m") == 32
    steps = sample(metrics, "engine_forward_passes_total", model="m")
    assert steps is not None
    assert 5 <= steps <= 20, "40 if one followed the other; half of that if this process is held up for a second"


def test_loading_reports_progress_and_refuses_requests() -> None:
    async def test() -> None:
        async with engine(wait=False, load_seconds=2.0) as client:
            while client.progress.bytes_loaded < 300:
                await asyncio.sleep(0.01)
            assert client.state == "loading"
            with pytest.raises(EngineUnavailableError, match=r"still loading \(phase 'weights', \d+ of 1000 bytes\)"):
                client.generate("r", [1], PARAMS)
            loaded = await client.wait_loaded()
            assert loaded.info.max_model_len == 512
            assert client.progress == LoadProgress("ready", 1000, 1000)

    metrics = Metrics()

    async def loaded() -> None:
        async with engine(metrics):
            assert sample(metrics, "model_load_bytes", model="m") == 1000

    run(test)
    run(loaded)


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("config", ConfigError, 2),
        ("checkpoint", UnusableCheckpointError, 1),
        ("does_not_fit", DoesNotFitError, 3),
        ("internal", LoadError, 1),
    ],
)
def test_a_load_failure_is_the_error_of_its_kind(kind: str, error: type[ServerError], code: int) -> None:
    async def test() -> None:
        async with engine(wait=False, fail=[kind, "it is too purple"]) as client:
            with pytest.raises(ServerError, match="it is too purple") as caught:
                await client.wait_loaded()
            assert type(caught.value) is error
            assert caught.value.exit_code == code

    run(test)


def test_an_engine_that_dies_while_loading_is_a_load_error() -> None:
    async def test() -> None:
        async with engine(wait=False, die_while_loading=7) as client:
            with pytest.raises(LoadError, match="the engine of model 'm' ended with exit code 7 while loading"):
                await client.wait_loaded()

    run(test)


def test_a_command_that_does_not_exist_is_a_load_error() -> None:
    async def test() -> None:
        client = EngineClient(
            ModelSpec(name="m", path="/"), ModelMetrics(Metrics(), "m"), command=lambda _: ["/nowhere/python"]
        )
        with pytest.raises(LoadError, match="could not be started"):
            await client.start()

    run(test)


def test_a_killed_engine_ends_every_open_request() -> None:
    metrics = Metrics()

    async def test() -> None:
        async with engine(metrics, step_seconds=0.01) as client:
            streams = [client.generate(f"r{i}", [1, 3], SamplingParams(max_tokens=10**6)) for i in range(3)]
            for stream in streams:
                await anext(stream)
            assert client.process_id is not None
            os.kill(client.process_id, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(EngineUnavailableError, match=r"'m' was killed by signal 9 \(SIGKILL\)"):
                    await tokens(stream)
            assert client.state == "dead"
            with pytest.raises(EngineUnavailableError, match="SIGKILL"):
                client.generate("late", [1], PARAMS)

    run(test)
    assert sample(metrics, "engine_up", model="m") == 0
    assert sample(metrics, "requests_running", model="m") == 0
    assert sample(metrics, "requests_total", model="m", finish_reason="error") == 3


@pytest.mark.parametrize("end", ["shutdown", "killed", "killed while loading", "not started"])
def test_no_temporary_file_outlives_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def test() -> None:
        if end == "not started":
            client = EngineClient(
                ModelSpec(name="m", path="/"), ModelMetrics(Metrics(), "m"), command=lambda _: ["/nowhere/python"]
            )
            with pytest.raises(LoadError):
                await client.start()
            return
        loading = end == "killed while loading"
        async with engine(wait=not loading, load_seconds=10 if loading else 0, litter="left.bin") as client:
            while not (left := list(tmp_path.glob("halfbyte-engine-*/left.bin"))):
                await asyncio.sleep(0.01)
            assert len(left) == 1
            if end != "shutdown":
                client.kill()
                await client.wait_ended()
                assert list(tmp_path.iterdir()) == []

    run(test)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_that_is_no_record_ends_the_engine() -> None:
    async def test() -> None:
        async with engine(garbage_after_steps=1) as client:
            with pytest.raises(EngineUnavailableError, match="a record that can't be read"):
                await tokens(client.generate("r", [1], SamplingParams(max_tokens=100)))

    run(test)


@pytest.mark.parametrize(("what", "status"), [("refuse", 400), ("fault", 500)])
def test_a_request_at_fault_and_an_engine_at_fault_are_told_apart(what: str, status: int) -> None:
    async def test() -> None:
        async with engine(**{what: "too long by 3 tokens"}) as client:
            with pytest.raises(RequestError, match="too long by 3 tokens") as caught:
                await tokens(client.generate("r", [1], PARAMS))
            assert caught.value.status == status

    run(test)


def test_closing_a_stream_aborts_it_and_leaves_the_others() -> None:
    metrics = Metrics()

    async def test() -> None:
        async with engine(metrics, step_seconds=0.005) as client:
            endless = client.generate("endless", [5], SamplingParams(max_tokens=10**6))
            other = client.generate("other", [6], SamplingParams(max_tokens=30))
            await anext(endless)
            endless.close()
            endless.close()
            assert client.open_requests == 1
            assert await tokens(other) == [6] * 30
            deadline = time.monotonic() + 5
            while sample(metrics, "kv_blocks_used", model="m") and time.monotonic() < deadline:
                await tokens(client.generate(f"probe{time.monotonic()}", [7], SamplingParams(max_tokens=1)))
            assert sample(metrics, "kv_blocks_used", model="m") == 0

    run(test)
    assert sample(metrics, "requests_total", model="m", finish_reason="abort") == 1


def test_a_cancelled_consumer_aborts_its_request() -> None:
    async def test() -> None:
        async with engine(step_seconds=0.005) as client:
            task = asyncio.create_task(tokens(client.generate("r", [5], SamplingParams(max_tokens=10**6))))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert client.open_requests == 0

    run(test)


def test_ending_requests_gives_each_the_sentence() -> None:
    async def test() -> None:
        async with engine(step_seconds=0.005) as client:
            stream = client.generate("r", [5], SamplingParams(max_tokens=10**6))
            await anext(stream)
            client.end_requests("enough for today")
            with pytest.raises(EngineUnavailableError, match="enough for today"):
                await tokens(stream)
            assert await tokens(client.generate("next", [8], SamplingParams(max_tokens=2))) == [8, 8]

    run(test)


def test_an_engine_that_hangs_and_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.client.SHUTDOWN_SECONDS", 0.2)
    monkeypatch.setattr("server.engine.client._KILL_SECONDS", 0.2)

    async def test() -> None:
        async with engine(hang_after_steps=1) as client:
            stream = client.generate("r", [5], SamplingParams(max_tokens=100))
            await anext(stream)
            started = time.monotonic()
            await client.shutdown()
            assert time.monotonic() - started < 5, "the server's own patience is longer"
            with pytest.raises(EngineUnavailableError, match="shutting down"):
                await tokens(stream)

    run(test)


def test_a_deadline_holds_for_who_reads_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was generated in time waits for no longer: the request holds a place that others want."""
    monkeypatch.setattr("server.engine.stream.LATE_SECONDS", 0.2)
    closed: list[tuple[str, bool]] = []

    async def read_slowly() -> None:
        deadline = time.monotonic() + 0.1
        metrics = ModelMetrics(Metrics(), "m")
        stream = OutputStream("r", 3, metrics, lambda *ended: closed.append(ended), deadline=deadline)
        for token in range(3):
            stream.deliver(SequenceOutput("r", (token,), finish_reason="length" if token == 2 else None))
        assert (await anext(stream)).token_ids == (0,)
        await asyncio.sleep(0.4)
        with pytest.raises(DeadlineExceededError, match="0.2 seconds ago, not all of its 3 tokens have been read"):
            await anext(stream)

    asyncio.run(read_slowly())
    assert closed == [("r", True)]


def test_a_stream_that_ends_in_time_leaves_no_timer() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        metrics = ModelMetrics(Metrics(), "m")
        with OutputStream("r", 3, metrics, lambda *_: None, deadline=time.monotonic() + 100) as stream:
            stream.deliver(SequenceOutput("r", (1,), finish_reason="length"))
            assert [output.token_ids async for output in stream] == [(1,)]
            assert stream._alarm is not None
            assert stream._alarm.when() > loop.time() + 99
        assert stream._alarm.cancelled()

    asyncio.run(test())


def test_who_reads_late_is_told_whether_the_engine_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the time of reading, not at that of the deadline; and once."""
    monkeypatch.setattr("server.engine.stream.LATE_SECONDS", 0.05)

    async def test(later: int, sentence: str) -> None:
        stream = OutputStream("r", 3, ModelMetrics(Metrics(), "m"), lambda *_: None, deadline=time.monotonic())
        stream.deliver(SequenceOutput("r", (7,)))
        await anext(stream)
        await asyncio.sleep(0.2)
        for token in range(later):
            stream.deliver(SequenceOutput("r", (token,)))
        with pytest.raises(DeadlineExceededError, match=sentence):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(test(0, "with 1 tokens generated, and the engine has not answered since"))
    asyncio.run(test(2, "not all of its 3 tokens have been read"))


def test_a_deadline_holds_though_the_engine_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.stream.LATE_SECONDS", 0.1)
    monkeypatch.setattr("server.engine.client.SHUTDOWN_SECONDS", 0.2)
    monkeypatch.setattr("server.engine.client._KILL_SECONDS", 0.2)

    async def test() -> None:
        async with engine(hang_after_steps=1) as client:
            deadline = time.monotonic() + 0.5
            with client.generate("r", [5], SamplingParams(max_tokens=100), deadline=deadline) as stream:
                await anext(stream)
                with pytest.raises(DeadlineExceededError, match="1 tokens generated, and the engine has not answered"):
                    await anext(stream)
                assert time.monotonic() < deadline + 5
            assert client.open_requests == 0

    run(test)


def test_an_engine_that_lacks_room_gets_an_answer_even_where_making_some_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async def make_room(model: str, shortage: Shortage) -> bool:
            raise RuntimeError("an unload went wrong")

        script = {"plan": {"device": "test:0", "capacity": 5, "peak": 7, "kept": 7}}
        spec = ModelSpec(name="m", path="/nowhere", quantization=script)
        client = EngineClient(spec, ModelMetrics(Metrics(), "m"), command=command, claim=Room(make_room).claim("m"))
        await client.start()
        try:
            with pytest.raises(DoesNotFitError):
                await client.wait_loaded()
        finally:
            await client.shutdown()
        assert "no room could be made for model 'm'" in caplog.text

    run(test)
