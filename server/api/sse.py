"""Server-sent events, and work that ends when the client leaves. Knows no models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.errors import error_body
from server.api.race import unless
from server.errors import RequestError, UnforeseenError

log = logging.getLogger(__name__)
DONE: Final = b"[DONE]"
SEND_SECONDS: Final = 60.0
"""How long a client may read nothing before it counts as gone; the number is nginx's."""
_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The client closed its connection; whatever was being done for it has been stopped."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client disconnects first (ClientGoneError)."""
    return await unless(_disconnected(request.receive), work, ClientGoneError)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends JSON objects as events, then [DONE]. A failure in between is sent as an error event, and ends the stream.

    The generators are always closed, whether it ended, failed, or the client left.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], source: AsyncGenerator[Any, None]) -> None:
        self._events = events
        self._source = source
        """What `events` reads from: closed too, because `events` can't do it when it was never started."""
        self._sending_since: float | None = None
        """When the message went out that is still on its way, by time.monotonic."""
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"})
        del self.headers["Content-Length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGoneError):
                await unless(self._abandoned(receive), self._write(send), ClientGoneError)
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _abandoned(self, receive: Receive) -> None:
        """Ends when the client has left, or has not read what has been on its way for SEND_SECONDS.

        One timer for all messages: of each, it would be an eighth of what sending it takes.
        """
        left = SEND_SECONDS
        while left > 0:
            try:
                async with asyncio.timeout(left):
                    await _disconnected(receive)
                    return
            except TimeoutError:
                since = self._sending_since
                left = SEND_SECONDS if since is None else since + SEND_SECONDS - time.monotonic()

    async def _write(self, send: Send) -> None:
        async def deliver(message: Message) -> None:
            self._sending_since = time.monotonic()
            await send(message)
            self._sending_since = None

        async def data(content: bytes, *, more: bool = True) -> None:
            await deliver({"type": "http.response.body", "body": b"data: " + content + b"\n\n", "more_body": more})

        try:
            await deliver({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await data(msgspec.json.encode(event))
        except RequestError as error:
            await data(msgspec.json.encode(error_body(error)), more=False)
        except OSError:
            return  # the connection broke while writing
        except Exception:
            log.exception("a stream failed")
            with contextlib.suppress(OSError):
                await data(msgspec.json.encode(error_body(UnforeseenError())), more=False)
        else:
            await data(DONE, more=False)
