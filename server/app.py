"""The HTTP application, and the process around it: socket, engines, signals, drain, exit code.

The socket is open before any model is loaded, so that probes answer from the first second. Engines are started by the
lifespan and ended by it. What routes do is in server/api; this file only puts the parts together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import uvicorn
from fastapi import FastAPI

from server.api import admin_models, admin_plan, chat, completions, health, memory, metrics, models
from server.api.errors import install_handlers
from server.api.middleware import BodyLimit, HostCheck, HttpMetrics, KeyCheck
from server.api.service import Service
from server.config import ServerConfig
from server.engine.client import Cut, engine_command
from server.engine.planner import Planner
from server.errors import ConfigError, ServerError
from server.memory import allocator

log = logging.getLogger(__name__)
CLOSE_SECONDS: Final = 3
"""After draining, how long connections that are still open may take to take their last bytes."""
BACKLOG: Final = 2048
"""Connections that may wait to be accepted."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def product_version() -> str:
    """The installed distribution's version."""
    try:
        return version("halfbyte")
    except PackageNotFoundError:
        return "unknown"


def create_app(
    config: ServerConfig,
    *,
    command: Callable[[int], list[str]] = engine_command,
    on_failure: Callable[[ServerError], None] | None = None,
) -> FastAPI:
    """The ASGI application. `on_failure` is told when a model can't be loaded; `command` starts an engine process."""
    service = Service(config, command)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service, on_failure))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await service.shutdown()

    app = FastAPI(
        title="Halfbyte",
        version=product_version(),
        description="An inference server for language models in 4 and 8 bits.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere; /openapi.json stays
        redoc_url=None,
    )
    app.state.service = service
    app.state.planner = Planner()
    for module in (models, completions, chat, health, metrics, memory, admin_models, admin_plan):
        app.include_router(module.router)
    install_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(
        KeyCheck,
        keys=[key.get_secret_value() for key in config.api_keys],
        admin_key=config.admin_key.get_secret_value() if config.admin_key else None,
    )
    app.add_middleware(HostCheck, loopback=config.loopback, host=config.host, allowed=config.allowed_hosts)
    app.add_middleware(HttpMetrics, metrics=service.metrics)
    return app


async def _load(service: Service, on_failure: Callable[[ServerError], None] | None) -> None:
    """Loads all models; a failure ends the server through `on_failure`, because half a start would go unnoticed."""
    try:
        await service.load()
    except ServerError as error:
        failure = error
    except Exception as error:
        log.exception("loading failed")
        failure = ServerError(f"loading failed unexpectedly: {error}")
    else:
        return
    if on_failure is not None:
        on_failure(failure)


def run(config: ServerConfig) -> None:
    """Serves until a signal or a failure; returns after a clean end, raises the ServerError of a model that failed.

    The first SIGINT or SIGTERM drains: no new requests, what runs may finish within config.drain_seconds. The second
    ends everything at once.
    """
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    if config.log_level == "info":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it says at info what we say ourselves
    allocator.keep_little()
    listener = bind(config.host, config.port)
    with contextlib.closing(listener):
        asyncio.run(_serve(config, listener))


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on the address; raises ConfigError when it is taken or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"can't listen on {host!r} port {port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"can't listen on {host!r} port {port}: {error.strerror}; accepted is a free one") from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process by the signal instead of with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(config: ServerConfig, listener: socket.socket) -> None:
    failures: list[ServerError] = []

    def fail(error: ServerError) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(config, on_failure=fail)
    service: Service = app.state.service
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            backlog=BACKLOG,
            access_log=config.log_level == "debug",
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )
    drain = _Drain(config, service, server)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, drain.signal, number)
    log.info("listening on %s, loading %s", _url(listener), ", ".join(map(repr, service.models)))
    if not config.loopback and not config.api_keys:
        log.warning("serving beyond this machine without api_keys: whoever reaches the port can use the models")
    try:
        await server.serve(sockets=[listener])
    finally:
        await drain.finish()
        await service.shutdown()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # the process is about to end; one more must not change its exit code
    if failures:
        raise failures[0]


class _Drain:
    """What signals do: the first one drains, the second one stops at once."""

    def __init__(self, config: ServerConfig, service: Service, server: uvicorn.Server) -> None:
        self._seconds = config.drain_seconds
        self._service = service
        self._server = server
        self._task: asyncio.Task[None] | None = None

    def signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._task is None:
            log.info("%s: draining, %d requests are open; again stops at once", name, self._service.open_requests)
            self._service.drain()
            self._task = asyncio.create_task(self._drain())
            return
        cut = self._service.kill()
        log.log(_severity(cut), "%s again: stopping at once, %d requests and their %d tokens are cut", name, *cut)
        # Not uvicorn's force_exit: that would skip the lifespan's end. Killed engines have ended every stream anyway.
        self._server.config.timeout_graceful_shutdown = 1
        self._server.should_exit = True

    async def finish(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _drain(self) -> None:
        """Waits for open requests, ends those that take too long, then lets uvicorn stop."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while self._service.open_requests and loop.time() < started + self._seconds:
            await asyncio.sleep(0.05)
        cut = self._service.end_requests("the server is shutting down; this request did not end in time")
        log.log(
            _severity(cut),
            "drained in %.1f s, %d requests and their %d tokens were cut",
            loop.time() - started,
            *cut,
        )
        self._server.should_exit = True


def _severity(cut: Cut) -> int:
    return logging.WARNING if cut.requests else logging.INFO


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
