"""Models that come and go while the server runs, in front of scripted engines; real ones are in end_to_end."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from server.api.fleet import Fleet
from server.config import ModelConfig, ServerConfig
from server.errors import EngineUnavailableError, ModelExistsError
from server.memory import machine
from server.metrics import Metrics
from tests.server.conftest import RunningApp, ServeScript, wait_for
from tests.server.scripted_engine import command

ADMIN = {"Authorization": "Bearer secret-admin-key"}
SETTINGS: dict[str, Any] = {"admin_key": SecretStr("secret-admin-key")}
ENDLESS = {"model": "second", "prompt": "abc", "max_tokens": 90_000}


@contextmanager
def admin_of(running: RunningApp) -> Iterator[httpx.Client]:
    with running.client(headers=ADMIN) as client:
        yield client


@pytest.fixture
def running(serve_scripts: ServeScript) -> Iterator[RunningApp]:
    with serve_scripts({"first": {}}, drain_seconds=30.0, **SETTINGS) as running:
        yield running


def entry(path: Path, /, name: str = "second", **script: Any) -> dict[str, Any]:
    return {"name": name, "path": str(path), "quantization": script}


def load(running: RunningApp, body: object) -> httpx.Response:
    """The body in ASCII: httpx's own JSON can't hold half a character, which an escape can."""
    with admin_of(running) as client:
        return client.post("/admin/models", content=json.dumps(body), headers={"Content-Type": "application/json"})


def unload(running: RunningApp, name: str, **query: Any) -> httpx.Response:
    with admin_of(running) as client:
        return client.delete(f"/admin/models/{name}", params=query)


def complete(running: RunningApp, **fields: Any) -> httpx.Response:
    with running.client() as client:
        return client.post("/v1/completions", json={"model": "second", "prompt": "abc", "max_tokens": 3} | fields)


def served(running: RunningApp) -> dict[str, str]:
    """States by name, as /v1/models has them."""
    with running.client() as client:
        return {model["id"]: model["state"] for model in client.get("/v1/models").json()["data"]}


def series_of(running: RunningApp, model: str) -> list[str]:
    with running.client() as client:
        page = client.get("/metrics").text
    families = text_string_to_metric_families(page)
    return [sample.name for family in families for sample in family.samples if sample.labels.get("model") == model]


@contextmanager
def in_background(work: Any, *arguments: Any, **options: Any) -> Iterator[Future[httpx.Response]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work, *arguments, **options)


def test_no_object_of_a_model_outlives_it(model_path: Path) -> None:
    """Its tokenizer, which may be large, goes with the last reference; what is small may wait for the collector."""

    async def live() -> tuple[weakref.ref[object], list[weakref.ref[object]]]:
        fleet = Fleet(ServerConfig(models=()), Metrics(), command)
        model, _ = await fleet.load(ModelConfig(name="m", path=model_path, quantization={}))
        tokenizer, *rest = map(weakref.ref, (model.tokenizer, model, model.engine, model.client, model.metrics))
        await fleet.unload("m", 0)
        with pytest.raises(EngineUnavailableError, match="model 'm' is being unloaded"):
            _ = model.tokenizer
        await fleet.shutdown()
        return tokenizer, rest

    gc.disable()
    try:
        tokenizer, rest = asyncio.run(live())
        assert tokenizer() is None
    finally:
        gc.enable()
    gc.collect()
    assert [left() for left in rest] == [None] * len(rest)


def test_a_name_is_taken_until_its_unload_is_over(model_path: Path) -> None:
    """Also where the load that was given up has already gone: who unloads the next model must not get the answer of the
    one before."""

    async def load_while_unloading() -> None:
        fleet = Fleet(ServerConfig(models=()), Metrics(), command)
        entry = ModelConfig(name="z", path=model_path, quantization={"load_seconds": 30.0})
        loading = asyncio.create_task(fleet.load(entry))
        await asyncio.sleep(0.1)
        unloading = asyncio.create_task(fleet.unload("z", 0))
        with pytest.raises(EngineUnavailableError):
            await loading
        assert "z" not in fleet.models
        assert not unloading.done()
        with pytest.raises(ModelExistsError, match="'z' is here, and is being unloaded; accepted is another name"):
            await fleet.load(entry)
        assert (await unloading).name == "z"
        again = asyncio.create_task(fleet.load(entry))
        await asyncio.sleep(0.1)
        assert "z" in fleet.models
        await fleet.shutdown()
        await asyncio.gather(again, return_exceptions=True)

    asyncio.run(load_while_unloading())


def test_a_model_comes_serves_and_goes(running: RunningApp, model_path: Path) -> None:
    answer = load(running, entry(model_path, "a/second", step_seconds=0.001))
    assert answer.status_code == 201, answer.text
    loaded = answer.json()
    assert (loaded["id"], loaded["state"], loaded["max_model_len"]) == ("a/second", "ready", 512)
    assert loaded["planned"] == loaded["measured"] == {"packed_weights": 4096, "kv_cache": 1024}
    assert served(running) == {"first": "ready", "a/second": "ready"}
    assert complete(running, model="a/second").json()["choices"][0]["text"] == "abc"
    pid = running.service.models["a/second"].client.process_id
    assert pid is not None
    assert series_of(running, "a/second")
    with running.client() as client:
        devices = client.get("/memory").json()["devices"]
    assert [device["models"] for device in devices] == [2]

    answer = unload(running, "a/second")
    assert answer.status_code == 200, answer.text
    returned = answer.json()
    assert returned["cut"] == {"requests": 0, "tokens": 0}
    assert returned["process"]["rss"] >= returned["process"]["pss"] > 0
    assert returned["device"] is None
    assert returned["process"]["anonymous"] > 2**20, "an interpreter is larger than that"
    available = returned["machine_available"]
    assert available["difference"] == available["after"] - available["before"]
    assert not Path(f"/proc/{pid}").exists()
    assert series_of(running, "a/second") == []
    assert running.metric("memory_unaccounted_bytes", device="cpu") == 880, "that of the one that is left"
    assert served(running) == {"first": "ready"}
    for refused in (complete(running, model="a/second"), unload(running, "a/second")):
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
    assert unload(running, "first").status_code == 200
    assert served(running) == {}
    assert running.metric("memory_unaccounted_bytes", device="cpu") == 0
    assert "none is served at present" in complete(running).json()["error"]["message"]
    with running.client() as client:
        assert client.get("/readyz").status_code == client.get("/livez").status_code == 200
    assert load(running, entry(model_path, "first")).status_code == 201


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": []}, "'adapters' is not supported yet"),
        ({"kv_cache_tokens": 5}, "the request body.kv_cache_tokens: 'kv_cache_tokens' is not known; accepted are name"),
        ({"path": "/nowhere"}, "the request body.path: '/nowhere' is not a directory"),
        ({"path": "~nobody-of-that-name/x"}, "can't be looked at: "),
        ({"path": "x" * 5000}, "can't be looked at: "),
        ({"path": "~\0"}, "can't be looked at: "),
        ({"path": None}, "the request body.path: 'None' is not a directory"),
        ({"\ud800": 5}, "the request body: '\\ud800' is not known; accepted are name, path"),
        ({"kv_cache": {"\ud800": 5}}, "'kv_cache' is '\\ud800'"),
        ({"quantization": "\ud800"}, "'quantization' is '\\ud800', which an engine can't be sent; accepted are whole"),
        ({"quantization": {"\ud800": True}}, "'quantization' is {'\\ud800': True}, which an engine can't be sent"),
        ({"quantization": '{"a":' * 100_000}, "starts like a JSON object and is not one: maximum recursion depth"),
        ({"quantization": {"load_in_4bit": 10**29}}, "'quantization' is {'load_in_4bit': 1000"),
        ({"quantization": {"a": [[-(2**63) - 1]]}}, "'quantization' is {'a': [[-9223372036854775809]]}, which"),
        ({"device_map": "\ud800"}, "'device_map' is '\\ud800', which an engine can't be sent"),
        ({"device_map": {"a": "\ud800"}}, "'device_map' is {'a': '\\ud800'}, which an engine can't be sent"),
        ({"device_map": {"a": 10**23}}, "'device_map' is {'a': 1000"),
        ({"name": "-"}, "'name' is '-'; accepted are"),
        ({"name": 5}, "the request body.name: 'name' is 5; "),
        ({"max_sequences": 0}, "the request body.max_sequences: 'max_sequences' is 0; "),
        ({"kv_cache": {"tokens": "many"}}, "'kv_cache.tokens' is 'many'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_entry_is_checked_as_in_the_file(
    running: RunningApp, model_path: Path, changes: dict[str, Any], words: str
) -> None:
    refused = load(running, entry(model_path) | changes)
    assert refused.status_code == 400, refused.text
    assert words in refused.json()["error"]["message"]
    assert served(running) == {"first": "ready"}


def test_a_body_that_is_no_entry(running: RunningApp) -> None:
    for body in ([], "second", None):
        assert load(running, body).status_code == 400
    assert "'path' is missing" in load(running, {"name": "x"}).json()["error"]["message"]
    assert unload(running, "first", drain_seconds=-1).status_code == 400
    assert "'drain' is not known; accepted are drain_seconds" in unload(running, "first", drain=1).text
    assert served(running) == {"first": "ready"}


@pytest.mark.parametrize(
    ("script", "status", "code", "words"),
    [
        ({"fail": ["config", "max_model_len is 5"]}, 400, None, "max_model_len is 5"),
        ({"fail": ["checkpoint", "it is truncated"]}, 422, "checkpoint_refused", "it is truncated"),
        ({"fail": ["does_not_fit", "it needs 5 bytes, but 3 are free"]}, 507, "does_not_fit", "5 bytes, but 3"),
        ({"fail": ["internal", "nobody foresaw it"]}, 500, "load_failed", "nobody foresaw it"),
        ({"die_while_loading": 7}, 500, "load_failed", "ended with exit code 7 while loading"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_what_does_not_load_leaves_nothing_behind(
    running: RunningApp, model_path: Path, script: dict[str, Any], status: int, code: str | None, words: str
) -> None:
    refused = load(running, entry(model_path, **script))
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert words in refused.json()["error"]["message"]
    assert served(running) == {"first": "ready"}
    assert series_of(running, "second") == []
    assert load(running, entry(model_path)).status_code == 201, "the name is free again"


def test_a_checkpoint_without_a_tokenizer_is_refused(running: RunningApp, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused = load(running, entry(tmp_path, load_seconds=60))
    assert refused.status_code == 422
    assert "has no tokenizer.json" in refused.json()["error"]["message"]
    assert served(running) == {"first": "ready"}


def test_a_relative_path_begins_where_the_file_is(serve_scripts: ServeScript, model_path: Path) -> None:
    with serve_scripts({"first": {}}, folder=model_path.parent, **SETTINGS) as running:
        answer = load(running, {"path": model_path.name, "quantization": {}})
        assert answer.status_code == 201, answer.text
        assert answer.json()["id"] == model_path.name


def test_progress_is_seen_while_the_others_serve(running: RunningApp, model_path: Path) -> None:
    with (
        in_background(load, running, entry(model_path, load_seconds=3.0)) as loading,
        running.client() as client,
    ):
        wait_for(lambda: served(running).get("second") == "loading")
        wait_for(lambda: client.get("/v1/models/second").json()["progress"]["bytes_loaded"] >= 100)
        assert client.get("/v1/models/second").json()["progress"]["bytes_total"] == 1000
        probe = client.get("/readyz")
        assert probe.status_code == 200, "the others answer"
        assert probe.json()["models"]["second"]["phase"] == "weights"
        assert 'halfbyte_engine_state{model="second",state="loading"} 1.0' in client.get("/metrics").text
        assert running.metric("model_load_bytes", model="second") >= 100
        assert complete(running, model="first").status_code == 200
        assert "still loading" in complete(running).json()["error"]["message"]
        taken = load(running, entry(model_path))
        assert (taken.status_code, taken.json()["error"]["param"]) == (409, "name")
        assert "is here, and is loading" in taken.json()["error"]["message"]
        assert loading.result().status_code == 201
    assert load(running, entry(model_path)).status_code == 409


def test_a_client_that_leaves_does_not_stop_the_loading(running: RunningApp, model_path: Path) -> None:
    with admin_of(running) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/admin/models", json=entry(model_path, load_seconds=1.0), timeout=0.2)
    wait_for(lambda: served(running).get("second") == "ready")


def test_unloading_what_is_loading_ends_both(running: RunningApp, model_path: Path) -> None:
    with in_background(load, running, entry(model_path, load_seconds=60)) as loading:
        wait_for(lambda: served(running).get("second") == "loading")
        pid = running.service.models["second"].client.process_id
        assert unload(running, "second").status_code == 200
        refused = loading.result()
    assert refused.status_code == 503
    assert "'second' is being unloaded" in refused.json()["error"]["message"]
    assert not Path(f"/proc/{pid}").exists()
    assert served(running) == {"first": "ready"}


def test_open_requests_may_finish_and_new_ones_are_refused(running: RunningApp, model_path: Path) -> None:
    load(running, entry(model_path, step_seconds=0.01))
    with in_background(complete, running, max_tokens=200) as answering:
        wait_for(lambda: running.service.models["second"].client.open_work.tokens)
        with in_background(unload, running, "second") as unloading:
            wait_for(lambda: served(running)["second"] == "stopping")
            refused = complete(running)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == "model 'second' is being unloaded"
            assert load(running, entry(model_path)).status_code == 409
            with running.client() as client:
                assert client.get("/readyz").status_code == 200, "it does not count any more"
            again = unload(running, "second", drain_seconds=0)
            assert again.json() == unloading.result().json(), "whoever comes later waits for the same end"
            assert unloading.result().json()["cut"] == {"requests": 0, "tokens": 0}
        assert answering.result().json()["usage"]["completion_tokens"] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_requests_that_take_too_long_are_cut_with_a_sentence(
    running: RunningApp, model_path: Path, stream: bool
) -> None:
    load(running, entry(model_path, step_seconds=0.01, max_model_len=100_000))
    with in_background(complete, running, **ENDLESS, stream=stream) as answering:
        wait_for(lambda: running.service.models["second"].client.open_work.tokens)
        cut = unload(running, "second", drain_seconds=0.1).json()["cut"]
        assert cut["requests"] == 1
        assert cut["tokens"] >= 1
        answer = answering.result()
    assert answer.status_code == (200 if stream else 503)
    assert "model 'second' was unloaded; this request did not end in time" in answer.text
    assert "[DONE]" not in answer.text
    assert series_of(running, "second") == [], "what the request reported last must not bring them back"


@pytest.mark.parametrize("moment", ["before", "in the drain", "in the pause"])
def test_a_death_around_an_unload_is_not_followed_by_a_restart(
    serve_scripts: ServeScript, model_path: Path, moment: str, tmp_path: Path
) -> None:
    lives = [str(tmp_path / "lives"), [{"step_seconds": 0.01, "max_model_len": 100_000}]]
    pause = 60 if moment == "in the pause" else 0.01
    limit = 0 if moment == "before" else 8
    with serve_scripts({"first": {}}, restart_pause_seconds=pause, restart_limit=limit, **SETTINGS) as running:
        load(running, entry(model_path, lives=lives))
        model = running.service.models["second"]
        if moment == "in the drain":
            with in_background(complete, running, **ENDLESS) as answering:
                wait_for(lambda: model.client.open_work.tokens)
                with in_background(unload, running, "second") as unloading:
                    wait_for(lambda: model.state == "stopping")
                    model.client.kill()
                    assert unloading.result().status_code == 200
                assert "SIGKILL" in answering.result().json()["error"]["message"]
        else:
            model.client.kill()
            wait_for(lambda: model.state == ("dead" if moment == "before" else "restarting"))
            assert unload(running, "second").json()["process"] is None, "there was none any more"
        assert served(running) == {"first": "ready"}
        assert (tmp_path / "lives").read_text() == "."
        assert load(running, entry(model_path)).status_code == 201


def test_a_stuck_engine_can_be_unloaded(
    serve_scripts: ServeScript, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.client.SHUTDOWN_SECONDS", 0.2)
    monkeypatch.setattr("server.engine.client._KILL_SECONDS", 0.2)
    with serve_scripts({"first": {}}, stuck_seconds=0.2, **SETTINGS) as running:
        load(running, entry(model_path, hang_after_steps=1))
        with in_background(complete, running, timeout=60) as answering:
            wait_for(lambda: running.service.models["second"].state == "stuck")
            assert unload(running, "second", drain_seconds=0).json()["cut"] == {"requests": 1, "tokens": 1}
            assert answering.result().status_code == 503


def test_no_model_is_loaded_once_the_server_drains(running: RunningApp, model_path: Path) -> None:
    with in_background(load, running, entry(model_path, load_seconds=60)) as loading:
        wait_for(lambda: served(running).get("second") == "loading")
        running.call(running.service.drain)
        assert loading.result().status_code == 503
        assert loading.result().json()["error"]["message"] == "the server is shutting down"
    assert load(running, entry(model_path)).status_code == 503


def test_loads_and_unloads_of_one_name_at_once(running: RunningApp, model_path: Path) -> None:
    """However they meet, each gets an answer that can be true, and what is left is one model, or none."""
    seen: set[tuple[str, int]] = set()
    lock = threading.Lock()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(6):
            if draw.random() < 0.5:
                answer = ("load", load(running, entry(model_path, load_seconds=0.1 * draw.random())).status_code)
            else:
                answer = ("unload", unload(running, "second", drain_seconds=0).status_code)
            with lock:
                seen.add(answer)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert seen <= {("load", 201), ("load", 409), ("load", 503), ("unload", 200), ("unload", 404)}
    unload(running, "second")
    assert served(running) == {"first": "ready"}
    assert series_of(running, "second") == []
    assert load(running, entry(model_path)).status_code == 201
    assert complete(running).status_code == 200


def test_what_came_back_of_a_device_is_the_drivers_figure(running: RunningApp, model_path: Path) -> None:
    assert load(running, entry(model_path, device_used=123456)).status_code == 201
    assert unload(running, "second").json()["device"] == {"name": "test:0", "used": 123456}


def plan(peak: int, kept: int | None = None, capacity: int = 100) -> dict[str, Any]:
    """A script that plans for a device of so many bytes, of which nobody is seen to take any."""
    return {"plan": {"device": "test:0", "capacity": capacity, "peak": peak, "kept": peak if kept is None else kept}}


def used(running: RunningApp, *names: str) -> None:
    for name in names:
        assert complete(running, model=name).status_code == 200


def test_what_does_not_fit_is_507_with_the_numbers(serve_scripts: ServeScript, model_path: Path) -> None:
    with serve_scripts({"first": plan(70, 60)}, **SETTINGS) as running:
        refused = load(running, entry(model_path, **plan(50)))
        assert refused.status_code == 507
        assert refused.json()["error"] == {
            "message": "it needs 50 bytes, but 40 are free",
            "type": "insufficient_memory_error",
            "param": None,
            "code": "does_not_fit",
            "device": "test:0",
            "needed_bytes": 50,
            "available_bytes": 40,
        }
        assert load(running, entry(model_path, **plan(40))).status_code == 201
        assert served(running) == {"first": "ready", "second": "ready"}
        unload(running, "first")
        assert load(running, entry(model_path, "third", **plan(60))).status_code == 201, "its promise went with it"
        assert load(running, entry(model_path, "fourth", **plan(1))).status_code == 507


def test_a_model_that_starts_again_keeps_its_room(serve_scripts: ServeScript, model_path: Path) -> None:
    with serve_scripts({"first": plan(60)}, restart_pause_seconds=1.5, **SETTINGS) as running:
        model = running.service.models["first"]
        model.client.kill()
        wait_for(lambda: model.state == "restarting")
        assert load(running, entry(model_path, **plan(41))).status_code == 507
        wait_for(lambda: model.state == "ready")
        used(running, "first")


def test_at_the_start_the_models_share_what_there_is(serve_scripts: ServeScript) -> None:
    """In the order of the file, and none is evicted for another."""
    scripts = {"first": plan(60), "second": plan(41), "third": plan(10)}
    with serve_scripts(scripts, wait=False, evict_idle=True) as running:
        wait_for(lambda: running.failures)
        assert [str(error) for error in running.failures] == ["it needs 41 bytes, but 40 are free"]
        assert running.failures[0].exit_code == 3


def test_loads_at_once_are_not_promised_the_same_bytes(serve_scripts: ServeScript, model_path: Path) -> None:
    with serve_scripts({"first": plan(1)}, **SETTINGS) as running, ThreadPoolExecutor(8) as pool:
        bodies = [entry(model_path, f"m{number}", **plan(30)) for number in range(6)]
        statuses = sorted(answer.status_code for answer in pool.map(lambda body: load(running, body), bodies))
        assert statuses == [201, 201, 201, 507, 507, 507]
        assert len(served(running)) == 4


def test_idle_models_are_evicted_as_many_as_needed(serve_scripts: ServeScript, model_path: Path) -> None:
    scripts = {name: plan(20) | {"step_seconds": 0.01, "max_model_len": 100_000} for name in ("a", "b", "c", "d")}
    with serve_scripts(scripts, evict_idle=True, **SETTINGS) as running:
        used(running, "c", "a", "b", "d")
        with in_background(complete, running, model="c", max_tokens=90_000, timeout=20) as busy:
            wait_for(lambda: running.service.models["c"].client.open_work.tokens)
            answer = load(running, entry(model_path, **plan(55)))
            assert answer.status_code == 201, answer.text
            evicted = answer.json()["evicted"]
            assert [one["name"] for one in evicted] == ["a", "b"], "c is oldest, and has a request"
            assert all(one["process"]["anonymous"] > 2**20 for one in evicted)
            assert served(running) == {"c": "ready", "d": "ready", "second": "ready"}
            assert series_of(running, "a") == []
            refused = load(running, entry(model_path, "third", **plan(85)))
            assert refused.status_code == 507
            assert served(running) == {"c": "ready", "d": "ready", "second": "ready"}, "in vain none is evicted"
            running.call(lambda: running.service.models["c"].client.end_requests("enough"))
            assert busy.result().status_code == 503
        assert load(running, entry(model_path, "third", **plan(85))).json()["evicted"] != []
        assert set(served(running)) <= {"d", "third"}


def test_without_the_setting_nothing_is_evicted(serve_scripts: ServeScript, model_path: Path) -> None:
    with serve_scripts({"first": plan(60)}, **SETTINGS) as running:
        assert load(running, entry(model_path, **plan(41))).status_code == 507
        assert served(running) == {"first": "ready"}


@pytest.mark.parametrize("evict_idle", [False, True])
def test_no_process_is_started_without_room_for_it(
    serve_scripts: ServeScript, model_path: Path, monkeypatch: pytest.MonkeyPatch, evict_idle: bool
) -> None:
    """What an engine takes to find out whether its model fits may be what others serve with."""
    script = plan(20) | {"step_seconds": 0.01, "max_model_len": 100_000}
    with serve_scripts({"first": script}, evict_idle=evict_idle, **SETTINGS) as running:
        models = running.service.models
        monkeypatch.setattr(machine, "available", lambda: 1000 if "first" in models else 2**40)
        with in_background(complete, running, model="first", max_tokens=90_000, timeout=20) as busy:
            wait_for(lambda: models["first"].client.open_work.tokens)
            refused = load(running, entry(model_path, **plan(20)))
            running.call(lambda: models["first"].client.end_requests("enough"))
            assert busy.result().status_code == 503
        assert refused.status_code == 507
        error = refused.json()["error"]
        assert (error["device"], error["available_bytes"]) == ("cpu", 1000)
        assert error["needed_bytes"] > 2**20
        assert f"takes {error['needed_bytes']:,} bytes on cpu before anything of the model" in error["message"]
        with admin_of(running) as client:
            answer = client.post("/admin/plan", json=entry(model_path))
        assert answer.status_code == 507, "neither is one that only plans"
        assert answer.json()["error"]["needed_bytes"] == error["needed_bytes"]
        answer = load(running, entry(model_path, **plan(20)))
        assert answer.status_code == (201 if evict_idle else 507)
        assert served(running) == ({"second": "ready"} if evict_idle else {"first": "ready"})
