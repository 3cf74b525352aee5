"""What one client may take from the others: places, time, threads, sizes; and under which names it may come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import sse
from server.api.admission import MOST_OWED, Admission
from server.api.generation import MAX_IDS
from server.api.middleware import HostCheck
from server.api.sse import EventStream
from server.errors import OverloadedError, RequestError
from server.text.bad_words import MAX_BAD_WORD_TOKENS, bad_word_ids
from server.text.tokenizer import Tokenizer
from tests.server.conftest import RunningApp, ServeScript, wait_for
from tests.server.test_api import chat, complete


def test_an_engine_that_ends_nothing_is_not_sent_more_and_more(
    serve_scripts: ServeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that give up free their places, and what they asked for is still the engine's."""
    monkeypatch.setattr("server.engine.stream.LATE_SECONDS", 0.1)
    capacity = 3
    with serve_scripts({"echo": {"hang_after_steps": 1}}, max_sequences=2, max_queued_requests=1) as running:
        for _ in range(MOST_OWED):
            given_up = complete(running, n=capacity, timeout=1)
            assert given_up.status_code == 504
            assert "has not answered since" in given_up.json()["error"]["message"]
        assert complete(running).status_code == 429
        assert running.service.open_requests == 0
        assert running.service.models["echo"].client.owed_requests == MOST_OWED * capacity
        assert "has 6 requests that it has not ended" in complete(running).json()["error"]["message"]


def test_what_is_owed_and_free_places_are_two_limits() -> None:
    admission = Admission("m", 4)
    with admission.enter(4, owed=MOST_OWED * 4 - 4):
        pass
    with pytest.raises(OverloadedError, match="has 5 requests that it has not ended.*8 at most"):
        admission.enter(4, owed=5).__enter__()
    assert admission.open == 0


async def _nothing() -> AsyncGenerator[dict[str, Any], None]:
    yield {}


def test_a_stream_that_cannot_even_begin_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may have left so many answers unread that not a header of the next one can be written."""
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.05)

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def test(receive: Any) -> None:
        events, source = _nothing(), _nothing()
        await asyncio.wait_for(EventStream(events, source)({"type": "http"}, receive, never), 5)
        with pytest.raises(StopAsyncIteration):
            await anext(source)

    async def leaves() -> Any:
        return {"type": "http.disconnect"}

    asyncio.run(test(never))
    asyncio.run(test(leaves))


def test_only_a_message_that_nobody_takes_ends_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a stream that lasts longer; and the time is the message's own, whenever it was sent."""
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.3)
    sent: list[bytes] = []

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        for number in range(20):
            await asyncio.sleep(0.05)
            yield {"number": number, "text": 'a "é"\n\x01', "logprob": -0.125}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) == 15:  # of the start and 20 events
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def test() -> float:
        stalled = asyncio.create_task(EventStream(events(), _nothing())({"type": "http"}, receive, send))
        while len(sent) < 15:
            await asyncio.sleep(0.005)
        since = asyncio.get_running_loop().time()
        await asyncio.wait_for(stalled, 5)
        return asyncio.get_running_loop().time() - since

    assert 0.25 < asyncio.run(test()) < 2
    assert sent[1] == 'data: {"number":0,"text":"a \\"é\\"\\n\\u0001","logprob":-0.125}\n\n'.encode()
    assert len(sent) == 15


class SlowTokenizer(Tokenizer):
    """Reads nothing before `go` is set."""

    go: threading.Event

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert self.go.wait(20)
        return super().encode(text, add_special_tokens=add_special_tokens)


def test_time_runs_while_a_prompt_is_made_into_tokens_and_metrics_are_not_held_up(
    serve_scripts: ServeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_scripts({"echo": {}}) as running, running.client() as client:
        slow = running.service.models["echo"].tokenizer
        monkeypatch.setattr(slow, "__class__", SlowTokenizer)
        monkeypatch.setattr(SlowTokenizer, "go", threading.Event(), raising=False)
        waiting = [threading.Thread(target=complete, args=(running,)) for _ in range(40)]
        for thread in waiting:
            thread.start()
        try:
            wait_for(lambda: running.service.open_requests == len(waiting))
            started = time.monotonic()
            late = complete(running, timeout=0.2)
            assert late.status_code == 504
            assert "before its prompt was made into tokens" in late.json()["error"]["message"]
            assert client.get("/metrics").status_code == 200
            assert time.monotonic() - started < 10
        finally:
            SlowTokenizer.go.set()
            for thread in waiting:
                thread.join()
        wait_for(lambda: running.service.open_requests == 0)
        assert complete(running).status_code == 200


def test_bad_words_have_so_many_tokens_at_most(model_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(model_path)
    words = [f"{number:03}" + "x" * 61 for number in range(24)]
    assert sum(map(len, bad_word_ids(tokenizer, words))) <= MAX_BAD_WORD_TOKENS
    with pytest.raises(RequestError, match=r"'bad_words' are [\d,]+ tokens .*accepted are 8,192") as caught:
        bad_word_ids(tokenizer, [word * 4 for word in words])
    assert caught.value.param == "bad_words"


def test_choices_times_what_each_of_them_holds_is_limited(echo: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.generation.MAX_IDS", 40)
    fields = {"prompt": "ab", "allowed_token_ids": [67, 68, 69], "logit_bias": {"67": 1}, "stop_token_ids": [70, 71]}
    assert complete(echo, **fields, n=4).status_code == 200  # 10 each: two of the prompt, six listed, two stop words
    refused = complete(echo, **fields, n=5)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "n"
    assert "accepted are 40 in all, so 'n' of at most 4" in refused.json()["error"]["message"]
    assert MAX_IDS >= 2**16 * 64


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("llm.example", 200),
        ("10.1.2.3:8000", 200),
        ("[fd00::7]:80", 200),
        ("evil.example", 403),
        ("10.evil.example", 403),
    ],
)
def test_beyond_loopback_an_address_is_a_name_that_is_always_allowed(host: str, status: int) -> None:
    """Probes and scrapes come by the pod's address, which nobody can write into a setting."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/metrics", "headers": [(b"host", host.encode())]}
    check = HostCheck(app, loopback=False, host="0.0.0.0", allowed=("llm.example",))
    asyncio.run(check(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == status


def test_refusals_while_draining_are_counted(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {}}) as running:
        running.call(running.service.drain)
        assert complete(running).status_code == 503
        assert running.metric("requests_rejected_total", model="echo", reason="unavailable") == 1
        assert running.metric("request_errors_total", model="echo", error="engine_unavailable") == 1


def test_before_the_tokenizer_is_read_a_chat_is_told_to_wait(echo: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    model = echo.service.models["echo"]
    monkeypatch.setattr(model, "_tokenizer", None)
    monkeypatch.setattr(model, "template", None)
    early = chat(echo)
    assert early.status_code == 503
    assert "still loading its tokenizer" in early.json()["error"]["message"]


@pytest.mark.parametrize("limit", [0, 1])
def test_an_echo_without_an_answer_says_what_was_cached_too(echo: RunningApp, limit: int) -> None:
    def cached() -> int:
        answer: httpx.Response = complete(echo, prompt=f"said before {limit}", echo=True, max_tokens=limit)
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() == len("said before 0") - 1


def test_a_fault_of_the_server_is_told_and_counted_as_one(
    serve_scripts: ServeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("/srv/secret")

    with serve_scripts({"echo": {}}) as running:
        monkeypatch.setattr(running.service.models["echo"].tokenizer, "encode", fails)
        answer = complete(running)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
        assert running.metric("request_errors_total", model="echo", error="internal_error") == 1


def test_fields_of_openais_api_that_ask_for_nothing_here(echo: RunningApp) -> None:
    unused = {"safety_identifier": "someone", "prompt_cache_key": "a tenant", "user": "someone"}
    nothing = {"prompt_cache_retention": "in_memory", "prompt_cache_options": None, "moderation": None}
    assert chat(echo, **unused, **nothing, verbosity="medium").status_code == 200
    refused = chat(echo, verbosity="high")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "verbosity"
