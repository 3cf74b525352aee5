"""What the routers work with: the served models by name, and what state the server as a whole is in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Request

from server.api.admission import Admission
from server.config import ServerConfig
from server.engine.client import EngineClient, engine_command
from server.errors import EngineUnavailableError, ModelNotFoundError
from server.metrics import Metrics, ModelMetrics
from server.records import ModelInfo, ModelSpec
from server.sentences import listed, shown
from server.text.chat_template import ChatTemplate, load_chat_template
from server.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class ServedModel:
    """One model: its engine's client, and its text side, which loads while the engine does."""

    def __init__(
        self, spec: ModelSpec, metrics: ModelMetrics, client: EngineClient, max_queued: int, timeout: float | None
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.metrics = metrics
        self.client = client
        self.admission = Admission(spec.name, spec.max_sequences + max_queued)
        self.timeout = timeout
        """Seconds for a request that brings none of its own; None for any time."""
        self.template: ChatTemplate | None = None
        self.ready = False
        self._tokenizer: Tokenizer | None = None

    async def load(self) -> None:
        """Starts the engine and reads the tokenizer; returns when both are done. Raises a ServerError."""
        await self.client.start()
        self._tokenizer, self.template = await asyncio.to_thread(self._load_text)
        loaded = await self.client.wait_loaded()
        self.ready = True
        log.info("model %r is ready after %.1f s", self.name, loaded.load_seconds)

    def _load_text(self) -> tuple[Tokenizer, ChatTemplate | None]:
        path = Path(self.spec.path)
        tokenizer = Tokenizer.from_directory(path)
        return tokenizer, load_chat_template(path, tokenizer)

    @property
    def state(self) -> str:
        """loading, ready or dead."""
        return "loading" if self.client.state == "ready" and not self.ready else self.client.state

    @property
    def info(self) -> ModelInfo:
        """Raises EngineUnavailableError unless requests can be served."""
        return self.client.require_ready().info

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
            client = EngineClient(spec, metrics, command=command)
            self.models[spec.name] = ServedModel(
                spec, metrics, client, config.max_queued_requests, config.request_timeout_seconds
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
        await asyncio.gather(*(model.client.shutdown() for model in self.models.values()))

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
            raise EngineUnavailableError("the server is shutting down and takes no new requests")
        return self.models[name]

    @property
    def open_requests(self) -> int:
        return sum(model.admission.open for model in self.models.values())

    def states(self) -> dict[str, dict[str, Any]]:
        """By model: its state, and how far loading has come."""
        return {name: _state(model) for name, model in self.models.items()}


def _state(model: ServedModel) -> dict[str, Any]:
    progress = model.client.progress
    return {
        "state": model.state,
        "phase": progress.phase,
        "bytes_loaded": progress.bytes_loaded,
        "bytes_total": progress.bytes_total,
    }


def get_service(request: Request) -> Service:
    """The app's service; a dependency of every router."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("the app was made without a Service")
    return service
