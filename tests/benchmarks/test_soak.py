"""A soak of a few hundred requests with an engine killed, and that its counting notices what it is there to notice."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from benchmarks.soak import __main__ as soak
from benchmarks.soak.attempt import Attempt, attempt
from benchmarks.soak.counts import Count, compare, read_series
from benchmarks.soak.report import write
from benchmarks.soak.requests import KINDS, Request, make_request
from benchmarks.soak.watch import Sample, growths
from server.demo import DEMO_MODEL_PATH
from server.metrics import Metrics, catalog
from tests.benchmarks.test_serve import CHUNKED, chunks, event

REQUESTS = 300


@pytest.mark.timeout(400)
def test_a_short_soak() -> None:
    soaked = soak.run(DEMO_MODEL_PATH, REQUESTS, 1, clients=24, seed=0)
    assert soaked.problems == []
    assert soaked.ended == Counter(range(REQUESTS))
    assert {one.request.kind for one in soaked.attempts} == KINDS.keys()
    assert {"answered", "timed out", "refused", "left", "unseen"} == {one.end for one in soaked.attempts}
    assert (soaked.samples[-1].blocks_used, soaked.samples[-1].running) == (0, 0)
    assert "No request was lost" in write(soaked, dry=True)


def test_requests_are_functions_of_their_numbers() -> None:
    made = [make_request("m", 0, number) for number in range(200)]
    assert made == [make_request("m", 0, number) for number in range(200)]
    assert made != [make_request("m", 1, number) for number in range(200)]
    assert {one.kind for one in made} == KINDS.keys()


def completion(*choices: tuple[int, str, str | None], name: str = "one", **more: Any) -> bytes:
    found = [{"index": index, "text": text, "finish_reason": reason} for index, text, reason in choices]
    return event({"id": name, "choices": found} | more)


USAGE = {"usage": {"completion_tokens": 2}}
DONE = b"data: [DONE]\n\n"


def sent(*events: bytes, texts: int = 1) -> Attempt:
    """What an attempt makes of a server that streams these events to a request for two tokens."""
    request = Request(0, "choices", {"prompt": "x", "max_tokens": 2 // texts, "stream": True}, texts)

    async def one() -> Attempt:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(CHUNKED + chunks(*events))
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            return await attempt(server.sockets[0].getsockname()[1], request)

    return asyncio.run(one())


def test_an_answer_that_is_right() -> None:
    found = sent(completion((0, "a", None)), completion((0, "b", "length")), completion(**USAGE), DONE)
    assert (found.end, found.problem, found.tokens, found.reasons) == ("answered", "", 2, {"length": 1})
    both = sent(completion((0, "a", "length"), (1, "b", "length")), completion(**USAGE), DONE, texts=2)
    assert (both.end, both.reasons) == ("answered", {"length": 2})


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([completion((0, "a", "length")), completion((0, "b", "length")), completion(**USAGE), DONE], "after its end"),
        ([completion((0, "ab", "length")), completion(**USAGE), DONE, DONE], "after the end mark"),
        ([completion((0, "ab", "length")), completion(**USAGE)], "without its end mark"),
        ([completion((0, "ab", None)), completion(**USAGE), DONE], "no finish_reason"),
        ([completion((0, "ab", "stop")), completion(**USAGE), DONE], "only 'length' can be"),
        ([completion((0, "ab", "length")), DONE], "0 tokens came"),
        ([completion((1, "ab", "length")), completion(**USAGE), DONE], "index \\[1\\]"),
        ([completion((0, "a", None)), completion((0, "b", "length"), name="two"), completion(**USAGE), DONE], "names"),
        ([event({"error": {"message": "a surprise", "type": "internal_error", "code": None}})], "a surprise"),
        ([event({"error": {"message": "late", "type": "timeout_error", "code": "deadline_exceeded"}})], "late"),
    ],
)
def test_an_answer_that_is_wrong(events: list[bytes], problem: str) -> None:
    found = sent(*events)
    assert found.end == "wrong"
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(found.problem)


def test_counts_that_differ_by_one_disagree() -> None:
    metrics = Metrics()
    before = read_series(metrics.page()[0].decode())
    attempts = [Attempt(make_request("m", 0, number), "answered") for number in range(3)]
    for one in attempts:
        one.reasons["length"] = one.request.texts
    assert "HTTP requests" in {one.what for one in compare(attempts, before, before, 0) if not one.agrees}
    for _ in attempts:
        metrics.of(catalog.HTTP_REQUESTS).labels("POST", "/v1/completions", "200").inc()
    for one in attempts:
        metrics.of(catalog.REQUESTS).labels("m", "length").inc(one.request.texts)
    after = read_series(metrics.page()[0].decode())
    assert [one for one in compare(attempts, before, after, 0) if not one.agrees] == []
    for lacking in (attempts[1:], [*attempts, attempts[0]]):
        assert [one for one in compare(lacking, before, after, 0) if not one.agrees] != []
    assert [one.what for one in compare(attempts, before, after, 1) if not one.agrees] == [
        "engines started again after a signal",
        "engines started again",
    ]


def test_problems_are_said() -> None:
    soaked = soak.Soak(requests=3, kills=1, ended=Counter({0: 1, 1: 2}))
    request = make_request("m", 0, 0)
    soaked.attempts = [
        Attempt(request, "wrong", problem="odd"),
        Attempt(request, "answered", {"a"}),
        Attempt(request, "left", {"a"}),
    ]
    soaked.counts = [Count("texts", 5, 3, 4), Count("tokens", 4, 3, 4)]
    assert soaked.problems == [
        f"request 0 ({request.kind}): odd",
        "request 1 ended 2 times",
        "request 2 ended 0 times",
        "2 answers have the name a",
        "texts: the server counts 5, the client 3 to 4",
        "0 engines were killed, where 1 were to be",
    ]


def test_growth_is_from_warm_to_the_end_of_each_life() -> None:
    def sample(place: int, engine: int) -> Sample:
        return Sample(place, 10 * place, engine, 1_000_000 * place, 2_000_000 * place, 0, 0, 0, 0, 0)

    samples = [sample(place, 7 if place < 50 else 8) for place in range(100) if place not in (50, 51)]
    http, first, second = growths(samples)
    assert (http.process, http.start_mb, http.end_mb) == ("HTTP process", 22.0, 96.0)
    assert (first.process, first.start_mb, first.end_mb) == ("engine 1", 23.0, 95.0)
    assert (second.start_mb, second.end_mb) == (124.0, 196.0)
    assert first.bytes_per_request == 72_000_000 / first.requests
