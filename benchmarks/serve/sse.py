"""One completion over HTTP, streamed as events with the time of their arrival, or whole. Standard library only.

The client shares the machine with the servers it measures, so it reads bytes itself: a general HTTP client takes
several times as long for a chunk. It speaks as much HTTP/1.1 as the measured servers answer with, one request per
connection. Leaving the generator, or being cancelled, closes the connection, which is a disconnect to the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

DONE: Final = "[DONE]"
LARGEST_EVENT_BYTES: Final = 1 << 20


class Event(NamedTuple):
    seconds: float
    """When it had arrived, by time.monotonic."""
    data: dict[str, Any] | None
    """The chunk; None for the end mark."""


class StatusError(Exception):
    """The server answered with another status than 200; the text is what it said, retry_after its header."""

    def __init__(self, status: int, text: str, retry_after: float | None = None) -> None:
        super().__init__(f"status {status}: {text[:500]}")
        self.status = status
        self.text = text
        self.retry_after = retry_after


class BrokenStreamError(Exception):
    """The connection ended, or could not be made, before the answer did."""


async def stream(host: str, port: int, path: str, body: dict[str, Any]) -> AsyncGenerator[Event, None]:
    """Posts `body` and gives the events of the answer. Raises StatusError and BrokenStreamError."""
    async with _answer(host, port, path, body) as pieces:
        async for line in _lines(pieces):
            if line.startswith(b"data:"):
                text = line[5:].strip()
                yield Event(time.monotonic(), None if text == DONE.encode() else json.loads(text))


async def whole(host: str, port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Posts `body` and gives the JSON object of the answer. Raises as stream does."""
    async with _answer(host, port, path, body) as pieces:
        found: dict[str, Any] = json.loads(b"".join([piece async for piece in pieces]))
        return found


@asynccontextmanager
async def _answer(host: str, port: int, path: str, body: dict[str, Any]) -> AsyncGenerator[AsyncIterator[bytes], None]:
    """The answer's body, in pieces."""
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=LARGEST_EVENT_BYTES)
    except OSError as error:
        raise BrokenStreamError(f"no connection: {error}") from error
    try:
        writer.write(_request(host, port, path, json.dumps(body).encode()))
        await writer.drain()
        status, headers = await _head(reader)
        pieces = _body(reader, headers)
        if status != 200:
            text = b"".join([piece async for piece in pieces]).decode(errors="replace")
            raise StatusError(status, text, float(headers["retry-after"]) if "retry-after" in headers else None)
        yield pieces
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise BrokenStreamError(f"the answer broke off: {error!r}") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _request(host: str, port: int, path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nAccept: text/event-stream\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return int(first.split()[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body in the pieces that the server sent; ends only where the server says that it is whole."""
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(1 << 16):
            yield piece


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line
