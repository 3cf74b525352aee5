"""What the routers work with: the served models by name, and what state the server as a whole is in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastapi import Request

from server.api.admission import Admission
from server.config import ServerConfig
from server.engine.client import Cut, EngineClient, engine_command
from server.engine.supervisor import ModelState, Supervision, Supervisor
from server.errors import EngineUnavailableError, ModelNotFoundError
from server.metrics import Metrics, ModelMetrics
from server.records import ModelInfo, ModelSpec
from server.sentences import listed, shown
from server.text.chat_template import ChatTemplate, load_chat_template
from server.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class ServedModel:
    """One model: its engine, kept alive, and its text side, which loads while the engine does."""

    def __init__(
        self, spec: ModelSpec, metrics: ModelMetrics, engine: Supervisor, max_queued: int, timeout: float | None
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.metrics = metrics
        self.engine = engine
        self.admission = Admission(spec.name, spec.max_sequences + max_queued)
        self.timeout = timeout
        """Seconds for a request that brings none of its own; None for any time."""
        self.template: ChatTemplate | None = None
        self.ready = False
        self._tokenizer: Tokenizer | None = None

    async def load(self) -> None:
        """Starts the engine and reads the tokenizer; returns when both are done. Raises a ServerError."""
        await self.engine.start()
        self._tokenizer, self.template = await asyncio.to_thread(self._load_text)
        loaded = await self.engine.wait_loaded()
        self.ready = True
        log.info("model %r is ready after %.1f s", self.name, loaded.load_seconds)

    def _load_text(self) -> tuple[Tokenizer, ChatTemplate | None]:
        path = Path(self.spec.path)
        tokenizer = Tokenizer.from_directory(path)
        return tokenizer, load_chat_template(path, tokenizer)

    @property
    def client(self) -> EngineClient:
        """The engine of the present; after a restart it is another one."""
        return self.engine.client

    @property
    def state(self) -> ModelState:
        return "loading" if self.engine.state == "ready" and not self.ready else self.engine.state

    @property
    def info(self) -> ModelInfo:
        """Raises EngineUnavailableError unless requests can be served."""
        return self.engine.require_ready().info

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise EngineUnavailableError(f"model {self.name!r} is still loading its tokenizer")
        return self._tokenizer


class Service:
    """All models, their metrics, and whether the server is starting, serving or draining."""

    def __init__(self, config: ServerConfig, command: Callable[[int], list[str]] = engine_command) -> None:
        self.config = config
        self.metrics = Metrics()
        self.created = int(time.time())
        self.started = False
        self.draining = False
        self.models: dict[str, ServedModel] = {}
        for spec in config.specs():
            metrics = ModelMetrics(self.metrics, spec.name)
            engine = Supervisor(spec, metrics, supervision(config), command=command)
            self.models[spec.name] = ServedModel(
                spec, metrics, engine, config.max_queued_requests, config.request_timeout_seconds
            )

    async def load(self) -> None:
        """Loads all models at once; raises the first failure."""
        tasks = [asyncio.create_task(model.load()) for model in self.models.values()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.started = True

    async def shutdown(self) -> None:
        """Ends every engine; returns when no process is left."""
        await asyncio.gather(*(model.engine.shutdown() for model in self.models.values()))

    def drain(self) -> None:
        """From now on no request is admitted, and no engine is started again."""
        self.draining = True
        for model in self.models.values():
            model.engine.keep_down()

    def end_requests(self, sentence: str) -> Cut:
        """Ends every open request with an error; says what that cut."""
        return _sum([model.client.end_requests(sentence) for model in self.models.values()])

    def kill(self) -> Cut:
        """Ends every engine at once; says what that cut."""
        return _sum([model.engine.kill() for model in self.models.values()])

    def find(self, name: str) -> ServedModel:
        """The model of that name; raises ModelNotFoundError."""
        if name not in self.models:
            raise ModelNotFoundError(
                f"there is no model {shown(name)} here; served are {listed(map(repr, self.models))}", param="model"
            )
        return self.models[name]

    def model(self, name: str) -> ServedModel:
        """The same for a new request; raises EngineUnavailableError too, while the server drains."""
        self.find(name)
        if self.draining:
            # Behind one address others may serve, or soon will: the next try need not wait.
            raise EngineUnavailableError("the server is shutting down and takes no new requests", retry_after=1)
        return self.models[name]

    @property
    def open_requests(self) -> int:
        return sum(model.admission.open for model in self.models.values())

    def states(self) -> dict[str, dict[str, Any]]:
        """By model: its state, and how far loading has come."""
        return {name: _state(model) for name, model in self.models.items()}


def supervision(config: ServerConfig) -> Supervision:
    """The settings that say when an engine is started again."""
    return Supervision(
        restart_limit=config.restart_limit,
        first_pause=config.restart_pause_seconds,
        longest_pause=max(config.restart_pause_seconds, config.restart_longest_pause_seconds),
        stuck_seconds=config.stuck_seconds,
        restart_stuck=config.restart_stuck,
    )


def _sum(cuts: Iterable[Cut]) -> Cut:
    parts = list(cuts)
    return Cut(sum(cut.requests for cut in parts), sum(cut.tokens for cut in parts))


def _state(model: ServedModel) -> dict[str, Any]:
    progress = model.engine.progress
    return {
        "state": model.state,
        "phase": progress.phase,
        "bytes_loaded": progress.bytes_loaded,
        "bytes_total": progress.bytes_total,
        "restarts": model.engine.restarts,
        "stalled_seconds": round(model.client.stalled_seconds, 3),
    }


def get_service(request: Request) -> Service:
    """The app's service; a dependency of every router."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("the app was made without a Service")
    return service
