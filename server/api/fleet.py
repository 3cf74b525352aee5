"""Which models are served, as that changes while the server runs: loading, unloading, and what that gave back.

A name is taken from the moment its loading begins until its process is gone, so two loads, or a load and an unload, of
one name can't meet. What does not load leaves nothing behind. It knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from server.api.eviction import Idle, choose
from server.api.served import ServedModel
from server.config import ModelConfig, ServerConfig, thread_share
from server.engine.client import SHUTTING_DOWN, Cut
from server.engine.room import Room
from server.engine.supervisor import Supervision, Supervisor
from server.errors import DoesNotFitError, EngineUnavailableError, ModelExistsError, ModelNotFoundError
from server.memory import machine
from server.memory.machine import ProcessBytes, machine_available, process_bytes
from server.metrics import Metrics, ModelMetrics
from server.records import DEVICE_USED, Loaded, ModelSpec, Shortage
from server.sentences import listed, shown

log = logging.getLogger(__name__)


class DeviceBytes(NamedTuple):
    """The driver's figure when the engine last looked: what was in use, less what was before it loaded."""

    name: str
    used: int


@dataclass(frozen=True)
class Unloaded:
    """What an unload ended, and what the system had before and has after; None where it doesn't say."""

    name: str
    seconds: float
    cut: Cut
    process: ProcessBytes | None
    """What the engine's process held just before it was ended. It is gone, so all of it is back."""
    device: DeviceBytes | None
    """What it held of a device beside the CPU."""
    available_before: int | None
    available_after: int | None
    """The machine's; other processes move it too."""


class Fleet:
    """The models by name, and the tasks that load or unload them."""

    def __init__(self, config: ServerConfig, metrics: Metrics, command: Callable[[int], list[str]]) -> None:
        self.models: dict[str, ServedModel] = {}
        self._config = config
        self._metrics = metrics
        self._command = command
        self._room = Room(self._make_room)
        self._evicted: dict[str, list[Unloaded]] = {}
        """For whom something may be evicted, and what was."""
        self._loading: dict[str, asyncio.Task[Loaded]] = {}
        self._unloading: dict[str, asyncio.Task[Unloaded]] = {}

    def add(self, spec: ModelSpec) -> ServedModel:
        """A model that is not loaded yet; raises ModelExistsError, until an unload under that name is over too."""
        other = self.models.get(spec.name)
        if other is not None or spec.name in self._unloading:
            state = "being unloaded" if other is None else other.state
            raise ModelExistsError(
                f"a model named {spec.name!r} is here, and is {state}; accepted is another name, or this one "
                "after it was unloaded",
                param="name",
            )
        config, metrics = self._config, ModelMetrics(self._metrics, spec.name)
        engine = Supervisor(spec, metrics, supervision(config), command=self._command, room=self._room)
        model = ServedModel(spec, metrics, engine, config.max_queued_requests, config.request_timeout_seconds)
        self.models[spec.name] = model
        return model

    def find(self, name: str) -> ServedModel:
        """The model of that name; raises ModelNotFoundError."""
        if name not in self.models:
            here = f"served are {listed(map(repr, self.models))}" if self.models else "none is served at present"
            raise ModelNotFoundError(f"there is no model {shown(name)} here; {here}", param="model")
        return self.models[name]

    def room_to_plan(self) -> dict[str, int]:
        """By device: what is free and one of these models is going to take.

        Raises DoesNotFitError where a process that plans would take what is theirs.
        """
        available = machine.available()
        shortage = None if available is None else self._room.process_shortage(available)
        if shortage is not None:
            raise _no_room_to_plan(shortage)
        return self._room.promised_bytes()

    async def load(self, entry: ModelConfig) -> tuple[ServedModel, list[Unloaded]]:
        """A new model, ready to serve, and what was evicted for it. It goes on loading when the caller is cancelled.

        Raises ModelExistsError at once, the ServerError that kept it from loading later.
        """
        model = self.add(entry.spec(thread_share(len(self.models) + 1)))
        log.info("loading %r from %s", model.name, model.spec.path)
        evicted = self._evicted[model.name] = []
        task = self.start(model)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise EngineUnavailableError(model.engine.parting) from None
        except DoesNotFitError as error:
            names = listed(repr(one.name) for one in evicted)
            raise DoesNotFitError(f"{error}; evicted were {names}", error.shortage) if evicted else error from None
        return model, evicted

    def start(self, model: ServedModel) -> asyncio.Task[Loaded]:
        """The task that loads a model that was added; if it fails or is cancelled, the model is gone."""
        task = asyncio.create_task(self._load(model), name=f"load {model.name}")
        self._loading[model.name] = task
        task.add_done_callback(_look_at)
        return task

    async def _load(self, model: ServedModel) -> Loaded:
        try:
            await self._make_room_for_process(model)
            return await model.load()
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                log.error("model %r did not load: %s", model.name, error)
            await self._remove(model, f"model {model.name!r} did not load")
            raise
        finally:
            del self._loading[model.name]
            self._evicted.pop(model.name, None)

    async def _make_room_for_process(self, model: ServedModel) -> None:
        """An engine finds out whether its model fits, and takes memory for that: none of the others' may be theirs."""
        while (available := machine.available()) is not None:
            shortage = model.engine.claim.enter(available)
            if shortage is None:
                return
            if not await self._make_room(model.name, shortage):
                raise _no_room_to_plan(shortage)

    async def unload(self, name: str, within: float) -> Unloaded:
        """Ends a model: what runs may finish within so many seconds, then is cut; returns when its process is gone.

        Who asks while somebody else's unload is under way gets the same answer. Raises ModelNotFoundError.
        """
        return await asyncio.shield(self._begin_unload(self.find(name), within))

    def _begin_unload(self, model: ServedModel, within: float) -> asyncio.Task[Unloaded]:
        task = self._unloading.get(model.name)
        if task is None:
            model.engine.retire(f"model {model.name!r} is being unloaded")
            task = asyncio.create_task(self._unload(model, within), name=f"unload {model.name}")
            self._unloading[model.name] = task
            task.add_done_callback(_look_at)
        return task

    async def _unload(self, model: ServedModel, within: float) -> Unloaded:
        started = time.monotonic()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(model.admission.empty.wait(), within)
            cut = model.end_requests(f"model {model.name!r} was unloaded; this request did not end in time")
            pid = model.client.process_id
            held = None if pid is None else await asyncio.to_thread(process_bytes, pid)
            device = _device_bytes(model.client.loaded)
            before = machine_available()
            loading = self._loading.get(model.name)
            if loading is not None:
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)
            await self._remove(model, f"model {model.name!r} was unloaded")
            after = machine_available()
        finally:
            del self._unloading[model.name]
        seconds = time.monotonic() - started
        log.info("unloaded %r in %.1f s, %d requests and their %d tokens were cut", model.name, seconds, *cut)
        return Unloaded(model.name, seconds, cut, held, device, before, after)

    async def _make_room(self, asking: str, shortage: Shortage) -> bool:
        """Evicts what makes room for a model that is loaded by a request; no server evicts one that it starts with."""
        evicted = self._evicted.get(asking)
        if evicted is None or not self._config.evict_idle:
            return False
        idle = [
            Idle(model.name, model.admission.used, held)
            for model in self.models.values()
            if model.idle and (held := model.engine.claim.held_bytes(shortage.device))
        ]
        chosen = choose(idle, shortage.needed - shortage.available)
        if chosen:
            log.info("evicting %s for %r", listed(repr(one.name) for one in chosen), asking)
        tasks = [self._begin_unload(self.models[one.name], 0) for one in chosen]
        evicted += await asyncio.gather(*map(asyncio.shield, tasks))
        return bool(chosen)

    async def _remove(self, model: ServedModel, why: str) -> None:
        """Ends the engine, then forgets the model; in this order, so that its name stays taken until then."""
        await model.end(why)
        if self.models.get(model.name) is model:
            model.metrics.forget()
            del self.models[model.name]

    def stop_loading(self) -> None:
        """Gives up what has not been loaded yet, because the server ends."""
        for name, task in self._loading.items():
            self.models[name].engine.retire(SHUTTING_DOWN)
            task.cancel()

    async def shutdown(self) -> None:
        """Ends every engine; returns when no process is left."""
        self.stop_loading()
        tasks = [*self._loading.values(), *self._unloading.values()]
        await asyncio.gather(*(model.engine.shutdown() for model in self.models.values()))
        await asyncio.gather(*tasks, return_exceptions=True)


def _no_room_to_plan(shortage: Shortage) -> DoesNotFitError:
    return DoesNotFitError(
        f"the process that plans a model, and loads it, takes {shortage.needed:,} bytes on {shortage.device} before "
        f"anything of the model, but {shortage.available:,} are free and not promised to other models",
        shortage,
    )


def _device_bytes(loaded: Loaded | None) -> DeviceBytes | None:
    used = None if loaded is None else loaded.memory.process.get(DEVICE_USED)
    return None if loaded is None or used is None else DeviceBytes(loaded.memory.device, used)


def _look_at(task: asyncio.Task[Loaded] | asyncio.Task[Unloaded]) -> None:
    """Whoever waited may be gone; an error that nobody takes would be reported as forgotten."""
    if not task.cancelled():
        task.exception()


def supervision(config: ServerConfig) -> Supervision:
    """The settings that say when an engine is started again."""
    return Supervision(
        restart_limit=config.restart_limit,
        first_pause=config.restart_pause_seconds,
        longest_pause=max(config.restart_pause_seconds, config.restart_longest_pause_seconds),
        stuck_seconds=config.stuck_seconds,
        restart_stuck=config.restart_stuck,
    )
