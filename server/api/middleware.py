"""What every request passes before routing: counting, host check, key check, body limit. Plain ASGI, outermost first.

HttpMetrics -> HostCheck -> KeyCheck -> BodyLimit -> the app
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import (
    AuthenticationError,
    BodyTimeoutError,
    BodyTooLargeError,
    ForbiddenHostError,
    PathNotFoundError,
    RequestError,
)
from server.metrics import Metrics
from server.metrics.catalog import HTTP_DURATION, HTTP_IN_FLIGHT, HTTP_REQUESTS
from server.sentences import listed, shown

OPEN_PATHS: Final = frozenset({"/livez", "/startupz", "/readyz", "/health"})
"""Answered without a key: probes come from kubelets and container runtimes, and tell nothing secret."""
ADMIN_PATH: Final = "/admin"
"""Everything under it changes what is served, or reads the machine's files: it has a key of its own."""
BODY_SECONDS: Final = 30.0
"""How long a request body may take to arrive."""
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_TENANT: Final = "tenant"
"""Under which name a request's state holds it."""
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class HttpMetrics:
    """Counts requests by route, not by path, so that a scanner can't create series."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._requests = metrics.of(HTTP_REQUESTS)
        self._seconds = metrics.of(HTTP_DURATION)
        self._in_flight = metrics.of(HTTP_IN_FLIGHT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 499  # what a client that went away before the answer is counted as

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.monotonic()
        self._in_flight.inc()
        try:
            await self._app(scope, receive, watch)
        except asyncio.CancelledError:
            return None  # uvicorn cancels what is left when it stops; this is the task's outermost frame
        finally:
            self._in_flight.dec()
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", "unmatched")
            self._requests.labels(method, route, str(status)).inc()
            self._seconds.labels(method, route).observe(time.monotonic() - started)
        return None


class HostCheck:
    """Refuses hosts and origins this server is not meant for.

    Bound to loopback, a web page could reach the server by a name of its own that resolves to 127.0.0.1 (DNS
    rebinding); the Host header gives it away. Bound to other addresses, any Host is accepted unless `allowed` names
    some; an IP address even then, by which probes and scrapes reach a container, and which is no page's own name. An
    Origin must always be the server itself or an allowed name: no page of another site is served.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, host: str, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)
        own = LOOPBACK_NAMES | {host.lower()} if loopback else frozenset({host.lower()}) | LOOPBACK_NAMES
        self._hosts = own | self._allowed if loopback or self._allowed else None
        self._any_address = not loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check(headers.get("host", ""), headers.get("origin"))
            except RequestError as error:
                return await error_response(error)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check(self, host: str, origin: str | None) -> None:
        name = host_name(host)
        if self._hosts is not None and name not in self._hosts and not (self._any_address and _is_address(name)):
            raise ForbiddenHostError(
                f"the Host header is {shown(host)}; accepted are {listed(sorted(self._hosts))}, "
                "and what the setting allowed_hosts adds"
            )
        if origin is not None:
            page = page_host(origin)
            if page is None or (page != host.lower() and host_name(page) not in self._allowed):
                raise ForbiddenHostError(
                    f"the Origin header is {shown(origin)}; accepted are pages of this server, "
                    "and what the setting allowed_hosts adds"
                )


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def page_host(origin: str) -> str | None:
    """The host and port in an Origin header, in lower case; None where they can't be told."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # a bracket that is never closed, for one
        return None


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


class KeyCheck:
    """Asks for `Authorization: Bearer KEY` on every path but the probes; compares digests in constant time.

    Where there are several keys, each is a tenant's own (`tenant_of`).

    Under /admin only the admin key is accepted, and without one there is nothing: the same 404 as for any path that
    does not exist, before a body is read. The admin key opens nothing else, so that it stays where it is needed.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], admin_key: str | None = None) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._admin = [] if admin_key is None else [_digest(admin_key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        path = scope["path"]
        admin = path == ADMIN_PATH or path.startswith(ADMIN_PATH + "/")
        if admin and not self._admin:
            return await error_response(PathNotFoundError(path))(scope, receive, send)
        accepted = self._admin if admin else self._digests
        if accepted:
            try:
                place = _place(Headers(scope=scope).get("authorization", ""), accepted)
            except AuthenticationError as error:
                return await error_response(error)(scope, receive, send)
            if len(accepted) > 1:
                scope.setdefault("state", {})[_TENANT] = str(place)
        return await self._app(scope, receive, send)


def tenant_of(request: Request) -> str:
    """Which of several keys a request came with, as a number; empty where there is one key for all, or none."""
    return str(getattr(request.state, _TENANT, ""))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _place(header: str, accepted: list[bytes]) -> int:
    """Which of the accepted keys an Authorization header has; raises AuthenticationError where it is none of them."""
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationError("this server asks for a key; accepted is the header 'Authorization: Bearer KEY'")
    digest = _digest(key.strip())
    matches = [hmac.compare_digest(digest, known) for known in accepted]
    if not any(matches):
        raise AuthenticationError("the key in the Authorization header is not one that opens this path")
    return matches.index(True)


class BodyLimit:
    """Reads the whole body, up to a limit in bytes and in time, before anything parses it."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            return await self._app(scope, receive, send)
        try:
            announced = Headers(scope=scope).get("content-length", "")
            if announced.isdigit() and int(announced) > self._limit:
                raise self._too_large(f"{announced} bytes")
            message = await asyncio.wait_for(self._read(receive), self._seconds)
        except TimeoutError:
            error = BodyTimeoutError(f"the request body did not arrive within {self._seconds:g} seconds")
            return await self._refuse(error, scope, receive, send)
        except BodyTooLargeError as refusal:
            return await self._refuse(refusal, scope, receive, send)
        if message is None:
            return None
        pending: list[Message] = [message]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> Message | None:
        """The body as one message; None when the client left."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limit:
                raise self._too_large(f"more than {self._limit} bytes")
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}

    def _too_large(self, size: str) -> BodyTooLargeError:
        return BodyTooLargeError(f"the request body has {size}; accepted are at most {self._limit} bytes")

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(error)
        response.headers["Connection"] = "close"  # the rest of the body is not read
        await response(scope, receive, send)
