"""One attempt at a request, how it ended for the client, and what an answer must not be.

An attempt ends in one of these ways, and in no other:

    answered     every text of it, whole, each with its end
    timed out    an error that says so
    refused      full (429), no engine (503), or an engine that died (503, or an error event): to be sent again
    left         the client has gone after it had seen a part of the answer, so the server knew the request
    unseen       the client has gone before it had seen anything
    wrong        anything else; `problem` says what
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from benchmarks.serve.servers import COMPLETIONS, HOST
from benchmarks.serve.sse import BrokenStreamError, StatusError, stream, whole
from benchmarks.soak.requests import EXACT, Request

End = Literal["answered", "timed out", "refused", "left", "unseen", "wrong"]
LONGEST_SECONDS: Final = 300.0
"""Of an attempt; a request that has no end by then hangs."""
TIMED_OUT: Final = "deadline_exceeded"
REFUSALS: Final = frozenset({"engine_unavailable", "overloaded"})


@dataclass
class Attempt:
    """What the client knows of one attempt."""

    request: Request
    end: End = "wrong"
    ids: set[str] = field(default_factory=set)
    """The answer's name, once: every chunk must have the same."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of the texts that ended."""
    tokens: int = 0
    """As the answer's usage says."""
    status: int = 200
    """Of the answer, as far as it had come."""
    code: str = ""
    """Of the error that it ended with."""
    retry_after: float | None = None
    problem: str = ""


class WrongAnswerError(Exception):
    """The answer is one that there must not be."""


async def attempt(port: int, request: Request) -> Attempt:
    """Sends a request once. Raises nothing: what goes wrong is in the attempt."""
    found = Attempt(request)
    try:
        async with asyncio.timeout(LONGEST_SECONDS):
            found.end = await (_streamed if request.body.get("stream") else _whole)(port, request, found)
    except StatusError as error:
        found.status = error.status
        _refused(found, json.loads(error.text)["error"], error.retry_after)
    except (WrongAnswerError, BrokenStreamError) as error:
        found.problem = str(error)
    except TimeoutError:
        found.problem = f"no end after {LONGEST_SECONDS:.0f} s"
    if len(found.ids) > 1:
        found.end, found.problem = "wrong", f"one answer has the names {sorted(found.ids)}"
    return found


async def _whole(port: int, request: Request, found: Attempt) -> End:
    asking = whole(HOST, port, COMPLETIONS, request.body)
    try:
        answer = await (asyncio.wait_for(asking, request.leaves_after_seconds) if not request.stays else asking)
    except TimeoutError:
        if request.stays:
            raise
        return "unseen"
    texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
    if len(texts) != len(answer["choices"]):
        raise WrongAnswerError("two choices have the same index")
    found.ids.add(answer["id"])
    found.reasons.update(choice["finish_reason"] for choice in answer["choices"])
    found.tokens = answer["usage"]["completion_tokens"]
    return _complete(request, found, texts)


async def _streamed(port: int, request: Request, found: Attempt) -> End:
    texts: dict[int, str] = {}
    ended: set[int] = set()
    pieces, done = 0, False
    async with aclosing(stream(HOST, port, COMPLETIONS, request.body)) as events:
        async for event in events:
            if done:
                raise WrongAnswerError("something came after the end mark")
            if event.data is None:
                done = True
                continue
            if "error" in event.data:
                return _refused(found, event.data["error"], None)
            found.ids.add(event.data["id"])
            if usage := event.data.get("usage"):
                found.tokens = usage["completion_tokens"]
            for choice in event.data["choices"]:
                _add(choice, texts, ended, found)
            pieces += 1
            if request.leaves_after_pieces is not None and pieces >= request.leaves_after_pieces:
                return "left"
    if not done:
        raise WrongAnswerError("the stream ended without its end mark")
    if ended != texts.keys():
        raise WrongAnswerError("a text has no finish_reason")
    return _complete(request, found, texts)


def _add(choice: dict[str, Any], texts: dict[int, str], ended: set[int], found: Attempt) -> None:
    index, reason = choice["index"], choice["finish_reason"]
    if index in ended:
        raise WrongAnswerError(f"text {index} goes on after its end")
    texts[index] = texts.get(index, "") + choice["text"]
    if reason is not None:
        ended.add(index)
        found.reasons[reason] += 1


def _complete(request: Request, found: Attempt, texts: dict[int, str]) -> End:
    """Checks an answer that says it is whole against what was asked for."""
    body = request.body
    if texts.keys() != set(range(request.texts)):
        raise WrongAnswerError(f"{request.texts} texts were asked for, and those with index {sorted(texts)} came")
    limit = request.texts * body["max_tokens"]
    if found.tokens > limit or (request.kind in EXACT and found.tokens != limit):
        raise WrongAnswerError(f"{found.tokens} tokens came, where {limit} were asked for")
    if request.kind in EXACT and found.reasons != {"length": request.texts}:
        raise WrongAnswerError(f"the texts ended by {dict(found.reasons)}, where only 'length' can be")
    if "echo" in body and not texts[0].startswith(body["prompt"]):
        raise WrongAnswerError("the text does not begin with its own prompt")
    for stop in body.get("stop", ()):
        if stop in texts[0]:
            raise WrongAnswerError(f"the text holds its stop string {stop!r}")
    return "answered"


def _refused(found: Attempt, error: dict[str, Any], retry_after: float | None) -> End:
    """Sorts an error that the server gave; one that is none of the expected is wrong."""
    found.code, found.retry_after = error["code"] or error["type"], retry_after
    found.end = "timed out" if found.code == TIMED_OUT else "refused" if found.code in REFUSALS else "wrong"
    if found.end == "timed out" and found.request.kind != "deadline":
        found.end = "wrong"
    if found.end == "wrong":
        found.problem = error["message"]
    return found.end
