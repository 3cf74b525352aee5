"""The load comparison on the demo model, and that its client reads what servers send as they may send it."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import __main__ as serve
from benchmarks.serve.client import Answer, ask
from benchmarks.serve.load import quantile, summarise
from benchmarks.serve.prompts import SYLLABLES, prompt, tokenizer
from benchmarks.serve.results import Results, tables
from benchmarks.serve.servers import NF4, OURS, Contestant, ours
from benchmarks.serve.sse import BrokenStreamError, StatusError, stream
from server.demo import DEMO_MODEL_PATH
from server.records import KV_BLOCK_TOKENS

NAME = "halfbyte nf4-dq"
SETTINGS = {"words": 8, "tokens": 5, "cache_tokens": 16384}
PLAN = serve.Plan(concurrency=(1, 3), rounds=1, words=8, tokens=5, prefix_tokens=100)


@pytest.mark.timeout(300)
def test_ours_beside_the_bare_runner_and_a_server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in OURS.keys() - {NAME}:
        monkeypatch.delitem(OURS, other)
    monkeypatch.setattr(serve, "PREFIXES", 1)
    server, broken = ours(NAME, DEMO_MODEL_PATH, NF4), Contestant("broken", ["false", "{port}"], "none")
    results = Results(tmp_path / "serve.json", SETTINGS)
    serve.run(DEMO_MODEL_PATH, [server, broken], PLAN, results)

    assert [(x.server, x.concurrency) for x in results.levels] == [(f"bare runner of {NAME}", 1), (NAME, 1), (NAME, 3)]
    assert [level.requests for level in results.levels] == [4, 4, 12]
    bare, one, three = results.levels
    assert bare.prompt_tokens == one.prompt_tokens, "both have the same prompts"
    for level in (one, three):
        assert 0 < level.first_token_p50 <= level.first_token_p95
        assert 0 < level.burst_p50 <= level.burst_p95
        assert level.memory_mb > bare.memory_mb, "the engine, and the HTTP process"
        assert level.client_cpu > 0
    full_blocks = PLAN.prefix_tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
    assert [prefix.requests for prefix in results.prefixes] == [32]
    assert all(prefix.cached_tokens >= full_blocks - KV_BLOCK_TOKENS for prefix in results.prefixes)
    assert list(results.failures) == ["broken"]
    assert "before it was ready" in results.failures["broken"]
    assert "- broken: " in results.file.with_suffix(".md").read_text()

    resumed = Results.resume(results.file, SETTINGS)
    serve.run(DEMO_MODEL_PATH, [server], PLAN, resumed)
    assert (resumed.levels, resumed.prefixes) == (results.levels, results.prefixes), "nothing was left to do"
    with pytest.raises(ValueError, match="other settings"):
        Results.resume(results.file, SETTINGS | {"tokens": 6})


def test_summary_of_answers_known_to_the_millisecond() -> None:
    answers = [
        Answer(sent=12.2, pieces=[12.5, 14.0], ended=14.1, prompt_tokens=8, completion_tokens=2),
        Answer(sent=10.0, pieces=[11.0, 11.5, 12.0], ended=12.1, prompt_tokens=7, completion_tokens=3),
        Answer(sent=10.0, pieces=[12.0, 14.0], ended=14.1, prompt_tokens=9, completion_tokens=5),
    ]
    level = summarise(answers, 0.4, "a", 2, 0, 100.0, 3.0)
    assert (level.tokens_per_second, level.prompt_tokens, level.client_cpu) == (2.5, 8.0, 0.1)
    assert (level.burst_p50, level.burst_p95) == (1.0, 2.0), "those that come at once"
    assert (level.first_token_p50, level.first_token_p95) == (0.3, 0.3), "the one that comes when another ends"
    assert (level.gap_p50, level.gap_p95, level.tokens_per_piece) == (0.5, 2.0, 1.43)


def test_quantile_is_nearest_rank() -> None:
    values = [float(value) for value in range(20, 0, -1)]
    assert [quantile(values, part) for part in (0.0, 0.5, 0.95, 1.0)] == [1.0, 10.0, 19.0, 20.0]
    assert math.isnan(quantile([], 0.5))


def test_medians_over_rounds(tmp_path: Path) -> None:
    results = Results(tmp_path / "serve.json", SETTINGS)
    for number, end in enumerate((12.0, 15.0, 20.0)):
        answer = Answer(sent=10.0, pieces=[11.0, end], prompt_tokens=7, completion_tokens=10)
        results.add(summarise([answer], 0.0, "a", 1, number, 100.0, 3.0))
    assert "| a | 2.0 |" in tables(results)


def test_prompts_are_words_of_the_tokenizer() -> None:
    made = tokenizer(4000)
    assert made.get_vocab_size() == 4000
    texts = [prompt(100, f"{i}") for i in range(50)]
    assert all(made.decode(made.encode(text).ids) == text for text in texts)
    assert len({text[:15] for text in texts}) == 50, "no two begin alike"
    assert {len(text.split()) for text in texts} == {100}
    two_syllables = [f" {a}{b}" for a in SYLLABLES[:5] for b in SYLLABLES[:5]]
    assert all(len(made.encode(text).ids) == 1 for text in two_syllables)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunks(*pieces: bytes, last: bool = True) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if last else b"")


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


TEXT = {"choices": [{"text": "a"}]}
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
}


def answer_to(raw: bytes) -> Answer:
    """What the client makes of these bytes from a server that then closes the connection."""

    async def serve_once() -> Answer:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            assert json.loads(await reader.readexactly(length)) == {"prompt": "x"}
            writer.write(raw)
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await ask("127.0.0.1", port, "/v1/completions", {"prompt": "x"}, 10)

    return asyncio.run(serve_once())


@pytest.mark.parametrize(
    "raw",
    [
        CHUNKED + chunks(event(TEXT), event(TEXT), event(USAGE), b"data: [DONE]\n\n"),
        CHUNKED + chunks(event(TEXT) + event(TEXT) + event(USAGE)),
        CHUNKED + chunks(event(TEXT)[:9], event(TEXT)[9:] + event(TEXT)[:1], event(TEXT)[1:], event(USAGE)),
        CHUNKED + chunks(b": a comment\r\n\r\n", event(TEXT).replace(b"\n", b"\r\n"), event(TEXT), event(USAGE)),
        HEAD + b"Connection: close\r\n\r\n" + event(TEXT) + event(TEXT) + event(USAGE),
    ],
)
def test_the_client_reads_any_framing(raw: bytes) -> None:
    answer = answer_to(raw)
    assert (answer.error, len(answer.pieces)) == (None, 2)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (3, 2, 1)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (CHUNKED + chunks(event(TEXT), last=False), "broke off"),
        (CHUNKED + chunks(b"data: {"), None),
        (CHUNKED + chunks(b"data: {\n\n"), "broke off"),
        (CHUNKED + chunks(event({"error": {"message": "no engine"}})), "no engine"),
        (b"HTTP/1.1 503 Unavailable\r\nContent-Length: 4\r\n\r\nlate", "status 503: late"),
        (b"", "broke off"),
    ],
)
def test_the_client_says_what_went_wrong(raw: bytes, error: str | None) -> None:
    answer = answer_to(raw)
    assert (answer.error is None) == (error is None)
    assert error is None or error in (answer.error or "")


def test_nobody_listens() -> None:
    async def first() -> None:
        async with aclosing(stream("127.0.0.1", 1, "/", {})) as events:
            await anext(events)

    with pytest.raises((BrokenStreamError, StatusError), match="no connection"):
        asyncio.run(first())
