"""Answers a generation request, whole or streamed; the two kinds of completion differ only in their Format."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.choice import Piece, ScoredToken, TextFinish
from server.api.generation import Options, TextJob
from server.api.sse import ClientGoneError, EventStream, unless_gone
from server.api.wire import Sampling

CLIENT_GONE = 499
"""Nobody reads this status; it is what the metrics count."""


@dataclass
class Choice:
    """One choice's whole text."""

    text: str = ""
    finish: TextFinish | None = None
    tokens: list[ScoredToken] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish = piece.finish
        self.tokens += piece.tokens


class Format(ABC):
    """How the pieces of one kind of completion look on the wire."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens a choice's stream, where there is one."""

    @abstractmethod
    def chunk(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        """One streamed piece."""

    @abstractmethod
    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, for who asked for include_usage."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer that is not streamed."""


def options(
    body: Sampling, limit: int | None, *, tenant: str, default_limit: int | None = None, echo: bool = False
) -> Options:
    """The wire's fields with their defaults filled in; `tenant` shares cached beginnings with no other."""
    return Options(
        limit=limit,
        default_limit=default_limit,
        sampling=body.params(),
        left_open=body.left_open,
        stop=tuple(body.stop),
        keep_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        priority=body.priority or 0,
        timeout=body.timeout,
        cache_salt=":".join(filter(None, (tenant, body.cache_salt))),
        bad_words=tuple(body.bad_words or ()),
        choices=body.choices,
        echo=echo,
    )


async def respond(request: Request, job: TextJob, body: Sampling, form: Format) -> Response:
    """Waits for the first piece, so that what fails before it still gets a status of its own, then answers."""
    pieces = job.pieces()
    try:
        if body.stream:
            first = await unless_gone(request, anext(pieces))
            return EventStream(_events(first, pieces, job, form, body), pieces)
        async with contextlib.aclosing(pieces):
            return JSONResponse(await unless_gone(request, _whole(pieces, job, form)))
    except ClientGoneError:
        await pieces.aclose()
        return Response(status_code=CLIENT_GONE)


async def _whole(pieces: AsyncGenerator[Piece, None], job: TextJob, form: Format) -> dict[str, Any]:
    choices: dict[int, Choice] = {}
    async for piece in pieces:
        choices.setdefault(piece.index, Choice()).add(piece)
    return form.whole([choices[index] for index in sorted(choices)], usage(job))


async def _events(
    first: Piece, pieces: AsyncGenerator[Piece, None], job: TextJob, form: Format, body: Sampling
) -> AsyncGenerator[dict[str, Any], None]:
    async with contextlib.aclosing(pieces):
        async for chunk in _chunks(_chained(first, pieces), form):
            yield chunk | {"usage": usage(job)} if body.usage_in_every_chunk else chunk
        if body.usage_at_the_end:
            yield form.usage_chunk(usage(job))


async def _chunks(pieces: AsyncGenerator[Piece, None], form: Format) -> AsyncGenerator[dict[str, Any], None]:
    opened: set[int] = set()
    async for piece in pieces:
        if piece.index not in opened:
            opened.add(piece.index)
            opening = form.opening(piece.index)
            if opening is not None:
                yield opening
        if piece.text or piece.tokens:
            yield form.chunk(piece.index, piece.text, piece.tokens, None)
        if piece.finish is not None:
            yield form.chunk(piece.index, "", (), piece.finish)


async def _chained(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece


def usage(job: TextJob) -> dict[str, Any]:
    """Tokens as counted by the engine, those of a stop string included; a prompt counts once, however many choices."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "total_tokens": job.prompt_tokens + job.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
    }
