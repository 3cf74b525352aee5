"""What the routers work with: the served models, and what state the server as a whole is in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from fastapi import Request

from server.api.fleet import Fleet, Unloaded
from server.api.served import ServedModel
from server.config import ModelConfig, ServerConfig
from server.engine.client import SHUTTING_DOWN, Cut, engine_command
from server.errors import EngineUnavailableError
from server.memory import machine
from server.metrics import Metrics
from server.metrics.vllm import VllmNames


class Service:
    """All models, their metrics, and whether the server is starting, serving or draining."""

    def __init__(self, config: ServerConfig, command: Callable[[int], list[str]] = engine_command) -> None:
        self.config = config
        self.metrics = Metrics()
        self.metrics.watch_machine(machine.capacity, machine.available)
        if config.vllm_metrics:
            VllmNames(self.metrics)
        self.started = False
        self.draining = False
        self._fleet = Fleet(config, self.metrics, command)
        for spec in config.specs():
            self._fleet.add(spec)

    @property
    def models(self) -> dict[str, ServedModel]:
        return self._fleet.models

    def room_to_plan(self) -> dict[str, int]:
        """By device: what is free and a model here is going to take, such as cache blocks that nothing has touched.

        Raises DoesNotFitError where there is no room for a process that plans.
        """
        return self._fleet.room_to_plan()

    async def load(self) -> None:
        """Loads all configured models at once; raises the first failure. One that is unloaded meanwhile is none."""
        tasks = [self._fleet.start(model) for model in self.models.values()]
        try:
            while tasks:
                done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    if not task.cancelled():
                        task.result()
                tasks = list(waiting)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.started = not self.draining

    async def load_model(self, entry: ModelConfig) -> tuple[ServedModel, list[Unloaded]]:
        """One model more, and what was evicted for it.

        Raises EngineUnavailableError while the server drains, and what Fleet.load raises.
        """
        self._refuse_draining()
        return await self._fleet.load(entry)

    async def unload_model(self, name: str, within: float | None = None) -> Unloaded:
        """One model less; raises ModelNotFoundError. Its requests have `within` seconds, or as many as in a drain."""
        return await self._fleet.unload(name, self.config.drain_seconds if within is None else within)

    async def shutdown(self) -> None:
        """Ends every engine; returns when no process is left."""
        await self._fleet.shutdown()

    def drain(self) -> None:
        """From now on no request is admitted, and no engine is started or started again."""
        self.draining = True
        self._fleet.stop_loading()
        for model in self.models.values():
            model.engine.keep_down()

    def end_requests(self, sentence: str) -> Cut:
        """Ends every open request with an error; says what that cut."""
        return _sum([model.end_requests(sentence) for model in self.models.values()])

    def kill(self) -> Cut:
        """Ends every engine at once; says what that cut."""
        return _sum([model.engine.kill() for model in self.models.values()])

    def find(self, name: str) -> ServedModel:
        """The model of that name; raises ModelNotFoundError."""
        return self._fleet.find(name)

    def model(self, name: str) -> ServedModel:
        """The same for a new request; raises EngineUnavailableError too, while the server drains."""
        model = self.find(name)
        try:
            self._refuse_draining()
        except EngineUnavailableError as error:
            model.metrics.rejected(error)
            model.metrics.failed(error)
            raise
        return model

    def _refuse_draining(self) -> None:
        if self.draining:
            # Behind one address others may serve, or soon will: the next try need not wait.
            raise EngineUnavailableError(f"{SHUTTING_DOWN} and takes no new requests", retry_after=1)

    @property
    def open_requests(self) -> int:
        return sum(model.admission.open for model in self.models.values())

    def states(self) -> dict[str, dict[str, Any]]:
        """By model: its state, and how far loading has come."""
        return {name: model.condition for name, model in self.models.items()}


def _sum(cuts: Iterable[Cut]) -> Cut:
    parts = list(cuts)
    return Cut(sum(cut.requests for cut in parts), sum(cut.tokens for cut in parts))


def get_service(request: Request) -> Service:
    """The app's service; a dependency of every router."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("the app was made without a Service")
    return service
