"""A soak of a few hundred requests with an engine killed, and that its counting notices what it is there to notice."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import __main__ as soak
from benchmarks.soak import balance
from benchmarks.soak.attempt import Attempt, attempt
from benchmarks.soak.counts import Count, compare, read_series
from benchmarks.soak.pace import Pace
from benchmarks.soak.report import write
from benchmarks.soak.requests import KINDS, Request, make_request
from benchmarks.soak.watch import Sample, growths, take
from server.demo import DEMO_MODEL_PATH
from server.metrics import Metrics, catalog
from server.records import CPU, PSS, MemoryReport
from tests.benchmarks.test_serve import CHUNKED, chunks, event

REQUESTS = 300


@pytest.mark.timeout(400)
def test_a_short_soak() -> None:
    soaked = soak.Soak(Pace(requests=REQUESTS), kills=1)
    soak.run(soak.server_under_soak(DEMO_MODEL_PATH), soaked, clients=24, seed=0)
    assert soaked.problems == []
    assert soaked.ended == Counter(range(REQUESTS))
    assert {one.request.kind for one in soaked.attempts} == KINDS.keys()
    assert {"answered", "timed out", "refused", "left", "unseen"} == {one.end for one in soaked.attempts}
    assert (soaked.samples[-1].blocks_used, soaked.samples[-1].running) == (0, 0)
    page = write(soaked, "command", None)
    assert "No request was lost" in page
    assert "| `kv_cache` |" in page


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
    soaked = soak.Soak(Pace(requests=3), kills=1, ended=Counter({0: 1, 1: 2}), unseen=["late"])
    soaked.pace.begun = 3
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
        "late",
        "0 engines were killed, where 1 were to be",
    ]


def sample(place: int, engine: int, **held: Any) -> Sample:
    at = Sample(place, 10 * place, engine, 1_000_000 * place, 2_000_000 * place, 0, 0, {}, 0, 0, 0, 0)
    return replace(at, **held)


def test_growth_is_from_warm_to_the_end_of_each_life() -> None:
    samples = [sample(place, 7 if place < 50 else 8) for place in range(100) if place not in (50, 51)]
    http, first, second = growths(samples)
    assert (http.process, http.start_mb, http.end_mb) == ("HTTP process", 22.0, 96.0)
    assert (first.process, first.start_mb, first.end_mb) == ("engine 1", 23.0, 95.0)
    assert (second.start_mb, second.end_mb) == (124.0, 196.0)
    assert first.bytes_per_request == 72_000_000 / first.requests


LEDGER = {"packed_weights": 3_000_000, "kv_cache": 1_000_000, "heap": 50_000_000}


def test_what_is_unaccounted_is_a_share_of_weights_and_cache() -> None:
    dead = sample(2, 0, unaccounted_bytes=10**9)
    samples = [
        sample(0, 7, unaccounted_bytes=9_000_000, components=LEDGER),
        sample(1, 7, unaccounted_bytes=-200_000, components=LEDGER),
        dead,
        sample(3, 8, unaccounted_bytes=40_000, pss_bytes=77_000_000, components=LEDGER),
        sample(4, 8, unaccounted_bytes=80_000, pss_bytes=78_000_000, components=LEDGER | {"heap": 51_000_000}),
    ]
    assert balance.unaccounted(samples) == balance.Unaccounted(4_000_000, -200_000, 9_000_000, 80_000)
    page = "\n".join(balance.lines(samples))
    assert "-0.20 MB (-5.00 %) at least, 9.00 MB (+225.00 %) at most, and 0.08 MB (+2.00 %) at the end" in page
    assert "| `heap` | 50.00 | 50.00 | 51.00 | 51.00 |" in page
    assert "| the process (PSS) | 77.00 | 77.00 | 78.00 | 78.00 |" in page
    assert balance.lines([dead]) == []


def test_a_sample_has_the_ledger_as_the_server_shows_it() -> None:
    metrics = Metrics()
    report = MemoryReport(CPU, planned=LEDGER, measured=LEDGER, process={PSS: 60_000_000})
    metrics.memory.report("m", report)
    taken = take(os.getpid(), read_series(metrics.page()[0].decode()), 1.0, 1)
    assert taken.components == LEDGER
    assert (taken.pss_bytes, taken.unaccounted_bytes) == (60_000_000, 6_000_000)


async def dealt_out(pace: Pace, clients: int) -> list[int]:
    """The numbers that so many clients get, in their order."""
    found: list[int] = []

    async def client() -> None:
        while (number := await pace.next()) is not None:
            found.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def test_every_number_is_dealt_out_once() -> None:
    pace = Pace(requests=50)
    assert sorted(asyncio.run(dealt_out(pace, 7))) == list(range(50)) == list(range(pace.begun))
    assert (pace.done(0), pace.done(25), pace.done(50)) == (0, 0.5, 1)


def test_a_rate_and_a_time_are_kept() -> None:
    """20 a second for 0.5 s: the first at once, each next one 0.05 s later: ten fit, fewer where it lags."""
    pace = Pace(seconds=0.5, rate=20)
    found = asyncio.run(dealt_out(pace, 7))
    assert found == list(range(pace.begun))
    assert 1 <= len(found) <= 10
    assert pace.elapsed >= 0.05 * (len(found) - 1)
    assert Pace(seconds=1e-9).done(0) >= 1


def test_a_soak_needs_one_end() -> None:
    for given in ({}, {"requests": 1, "seconds": 1.0}):
        with pytest.raises(ValueError, match="a number of requests or of seconds"):
            Pace(**given)


def test_a_page_says_how_it_was_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def typed(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["soak", *words])
        parser = soak.make_parser()
        return soak.command(parser, soak.parse(parser))

    assert typed("--dry") == "python -m benchmarks.soak --requests 10000"
    given = ("--seconds", "3600", "--rate", "0.5", "--kills", "0", "--quantization", "nf4-dq")
    shown = f"python -m benchmarks.soak {' '.join(given[:4])} --kills 0 --model tiny --quantization nf4-dq"
    assert typed(*given, "--model", str(tmp_path / "tiny"), "--results", str(tmp_path / "x.json")) == shown
    with pytest.raises(SystemExit):
        typed("--rate", "0")
