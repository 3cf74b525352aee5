"""Answers a generation request, whole or streamed; the two kinds of completion differ only in their Format."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.generation import Options, Piece, TextJob
from server.api.sse import ClientGoneError, EventStream, unless_gone
from server.api.wire import Sampling

DEFAULT_TEMPERATURE = 1.0
CLIENT_GONE = 499
"""Nobody reads this status; it is what the metrics count."""


class Format(ABC):
    """How the pieces of one kind of completion look on the wire."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens a choice's stream, where there is one."""

    @abstractmethod
    def chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """One streamed piece."""

    @abstractmethod
    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, for who asked for include_usage."""

    @abstractmethod
    def whole(self, texts: list[str], finishes: list[str | None], usage: dict[str, int]) -> dict[str, Any]:
        """The answer that is not streamed; one text and finish_reason per choice."""


def options(body: Sampling, limit: int | None) -> Options:
    """The wire's sampling fields with their defaults filled in; top_k 0 means no limit."""
    return Options(
        limit=limit,
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=body.seed,
        stop=tuple(body.stop),
        ignore_eos=body.ignore_eos,
    )


async def respond(request: Request, job: TextJob, how: Options, body: Sampling, form: Format) -> Response:
    """Waits for the first piece, so that what fails before it still gets a status of its own, then answers."""
    pieces = job.pieces(how)
    try:
        if body.stream:
            first = await unless_gone(request, anext(pieces))
            return EventStream(_events(first, pieces, job, form, include_usage=body.include_usage), pieces)
        async with contextlib.aclosing(pieces):
            return JSONResponse(await unless_gone(request, _whole(pieces, job, form)))
    except ClientGoneError:
        await pieces.aclose()
        return Response(status_code=CLIENT_GONE)


async def _whole(pieces: AsyncGenerator[Piece, None], job: TextJob, form: Format) -> dict[str, Any]:
    texts: dict[int, list[str]] = {}
    finishes: dict[int, str | None] = {}
    async for piece in pieces:
        texts.setdefault(piece.index, []).append(piece.text)
        finishes[piece.index] = piece.finish
    order = sorted(texts)
    return form.whole(["".join(texts[i]) for i in order], [finishes[i] for i in order], usage(job))


async def _events(
    first: Piece, pieces: AsyncGenerator[Piece, None], job: TextJob, form: Format, *, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    opened: set[int] = set()
    async with contextlib.aclosing(pieces):
        async for piece in _chained(first, pieces):
            if piece.index not in opened:
                opened.add(piece.index)
                opening = form.opening(piece.index)
                if opening is not None:
                    yield opening
            if piece.text:
                yield form.chunk(piece.index, piece.text, None)
            if piece.finish is not None:
                yield form.chunk(piece.index, "", piece.finish)
        if include_usage:
            yield form.usage_chunk(usage(job))


async def _chained(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece


def usage(job: TextJob) -> dict[str, int]:
    """Tokens as counted by the engine, those of a stop string included."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "total_tokens": job.prompt_tokens + job.completion_tokens,
    }
