"""Keeps one model's engine alive: notices that a life ended or that a step is stuck, waits, and starts the next one.

The first life is not its business to repeat: a model that can't be loaded at all ends the start, or the request that
asked for it. Later ones are repeated with a growing pause, until one has lasted or too many in a row have not. It knows
no HTTP and no configuration file; one life is client.py's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from server.engine.client import SHUTTING_DOWN, Cut, DeathReason, EngineClient, engine_command
from server.engine.room import Room
from server.errors import ConfigError, EngineUnavailableError, ServerError
from server.metrics import ModelMetrics, Watched
from server.records import Loaded, LoadProgress, ModelSpec

log = logging.getLogger(__name__)

ModelState = Literal["loading", "ready", "stuck", "restarting", "dead", "stopping"]
"""stuck: it has requests and does not report. restarting: its engine died and the next one waits, or loads.
dead: it is not started again. stopping: the server ends, or the model is unloaded."""
RestartReason = DeathReason | Literal["load"]
"""How the life before ended; load: it did not get as far as to be ready."""
_RESTART_REASONS: Final = tuple(reason for kind in get_args(RestartReason) for reason in get_args(kind))
LONGEST_RETRY_SECONDS: Final = 600
_LONGEST_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Supervision:
    """When an engine is started again, and when it counts as stuck."""

    restart_limit: int = 8
    """Restarts in a row, none of which has lasted, before a model is given up; 0 for no restart."""
    first_pause: float = 1.0
    longest_pause: float = 60.0
    """Seconds; also how long a life must last for the next pause to be the first one again."""
    stuck_seconds: float = 300.0
    """So long without a report, with requests open, and the engine counts as stuck."""
    restart_stuck: bool = False
    """Whether a stuck engine is killed and started again, or only reported."""


class Backoff:
    """Pauses that double from the first to the longest, and start over after a life that lasted."""

    def __init__(self, rules: Supervision) -> None:
        self._rules = rules
        self.restarts = 0
        """In a row."""

    def next(self, lived: float) -> float | None:
        """Seconds to wait after a life of that many seconds of being ready; None to give up."""
        if lived >= self._rules.longest_pause:
            self.restarts = 0
        if self.restarts >= self._rules.restart_limit:
            return None
        pause = min(self._rules.longest_pause, self._rules.first_pause * 2.0**self.restarts)
        self.restarts += 1
        return pause


class Supervisor:
    """One model's engines, one after the other. `start`, then `wait_loaded`; `shutdown` in the end."""

    def __init__(
        self,
        spec: ModelSpec,
        metrics: ModelMetrics,
        rules: Supervision | None = None,
        *,
        command: Callable[[int], list[str]] = engine_command,
        room: Room | None = None,
    ) -> None:
        self.spec = spec
        self.rules = rules or Supervision()
        self._metrics = metrics
        self._command = command
        self.claim = (room or Room()).claim(spec.name)
        self.client = self._next_life()
        self._state: Literal["first", "serving", "restarting", "dead", "stopping"] = "first"
        self._down = asyncio.Event()
        """Set once no engine is to be started any more."""
        self.restarts = 0
        self._given_up = False
        self._last_words = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._life_begins = time.monotonic()
        self._load_seconds: float | None = None
        self.parting = ""
        """Why it is stopping, as a refused request is told."""
        self.before_serving_again: Callable[[], Awaitable[None]] | None = None
        """Awaited once a later engine has loaded, before it gets requests. What it raises ends that life too."""
        watched = Watched(
            state=lambda: self.state,
            stalled=lambda: self.client.stalled_seconds,
            owed=lambda: self.client.owed_requests,
        )
        metrics.watch(watched, get_args(ModelState), _RESTART_REASONS)

    async def start(self) -> None:
        """Starts the first engine; returns at once, loading goes on by itself. Raises LoadError."""
        self._life_begins = time.monotonic()
        await self.client.start()

    async def wait_loaded(self) -> Loaded:
        """The first engine's Loaded record, from when on it is kept alive; raises what kept it from loading."""
        loaded = await self.client.wait_loaded()
        self._now_serving()
        self._tasks = [
            asyncio.create_task(self._keep_alive(), name=f"supervisor {self.spec.name}"),
            asyncio.create_task(self._watch(), name=f"watch {self.spec.name}"),
        ]
        return loaded

    @property
    def state(self) -> ModelState:
        if self._state in ("restarting", "dead", "stopping"):
            return self._state
        match self.client.state:
            case "ready":
                return "stuck" if self.client.stalled_seconds > self.rules.stuck_seconds else "ready"
            case "dead":
                return "dead" if self._state == "first" else "restarting"
        return "loading"

    @property
    def progress(self) -> LoadProgress:
        """How far loading has come; between two engines it has not begun."""
        return LoadProgress("start") if self.client.state == "dead" else self.client.progress

    @property
    def hopeless(self) -> bool:
        """Whether nothing here will make it answer again."""
        return self.state == "dead" or (self.state == "stuck" and not self.rules.restart_stuck)

    def require_ready(self) -> Loaded:
        """What was loaded; raises EngineUnavailableError, with the time after which to try again where that is known.

        A stuck engine still takes requests: it may move again, and they may have a deadline of their own.
        """
        if self._state == "stopping":
            raise EngineUnavailableError(self.parting)
        if self._state == "restarting":  # the next engine may have loaded, and what is to be there before requests not
            sentence = f"the engine of model {self.spec.name!r} is not ready"
            raise EngineUnavailableError(self._why(sentence), retry_after=self.retry_after())
        try:
            return self.client.require_ready()
        except EngineUnavailableError as error:
            raise EngineUnavailableError(self._why(error.message), retry_after=self.retry_after()) from None

    def retry_after(self) -> int | None:
        """Whole seconds until it should be ready: the pause that is left, and as long as loading took before.

        Where it has not been loaded before: as long again as loading has taken so far. None where there is no hope.
        """
        if self.state in ("dead", "stopping"):
            return None
        since = time.monotonic() - self._life_begins
        left = since if self._load_seconds is None else self._load_seconds - since
        return max(1, min(LONGEST_RETRY_SECONDS, math.ceil(left)))

    def keep_down(self) -> None:
        """From now on an engine that dies stays dead: the server drains, or the model is being unloaded."""
        self._down.set()

    def retire(self, why: str) -> None:
        """From now on it takes no requests either, which are told why; those that run may still finish."""
        self.keep_down()
        self.parting = self.parting or why
        self._state = "stopping"

    async def shutdown(self, why: str = SHUTTING_DOWN) -> None:
        """Ends the engine and everything that would start another; returns when no process is left."""
        self.retire(why)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.shutdown(self.parting)
        self.claim.drop()

    def kill(self) -> Cut:
        """Ends the engine at once and for good; says what that cuts."""
        self.keep_down()
        cut = self.client.open_work
        self.client.kill()
        return cut

    def _next_life(self) -> EngineClient:
        return EngineClient(self.spec, self._metrics, command=self._command, claim=self.claim)

    def _now_serving(self) -> None:
        self._become("serving")
        self._load_seconds = time.monotonic() - self._life_begins

    async def _keep_alive(self) -> None:
        backoff = Backoff(self.rules)
        while True:
            ready_at = time.monotonic()
            await self.client.wait_ended()
            reason: RestartReason = self.client.death or "exit"
            self._last_words = self.client.how_it_died
            ended = self.client.last_moved if reason == "stuck" else time.monotonic()
            lived = ended - ready_at  # hanging is not living
            while not await self._again(backoff, lived, reason):
                if self._given_up:
                    return
                reason, lived = "load", 0.0

    async def _again(self, backoff: Backoff, lived: float, reason: RestartReason) -> bool:
        """One more life after a pause; whether it became ready. Sets the state to dead where there is none."""
        pause = backoff.next(lived)
        if pause is None or self._down.is_set():
            self._give_up(f"it has been started {backoff.restarts} times in a row" if backoff.restarts else "")
            return False
        self._become("restarting")
        self._life_begins = time.monotonic() + pause
        row = f"restart {backoff.restarts} of at most {self.rules.restart_limit} in a row"
        log.warning("model %r starts again in %.1f s, %s", self.spec.name, pause, row)
        try:  # until the pause is over, or nobody wants the engine back
            await asyncio.wait_for(self._down.wait(), pause)
        except TimeoutError:
            pass
        else:
            self._give_up("")
            return False
        self.client = self._next_life()
        self.restarts += 1
        self._metrics.restarted(reason)
        try:
            await self.client.start()
            await self.client.wait_loaded()
            if self.before_serving_again is not None:
                await self.before_serving_again()
        except Exception as error:  # whatever was short, such as descriptors or threads: the next try may have it
            self._last_words = f"model {self.spec.name!r} did not load again ({error})"
            log.error(self._last_words, exc_info=None if isinstance(error, ServerError) else error)
            await self.client.shutdown()
            if isinstance(error, ConfigError):
                self._give_up("what it is configured to be is not accepted any more")
            return False
        self._now_serving()
        log.info("model %r is ready again after %.1f s", self.spec.name, self._load_seconds)
        return True

    def _become(self, state: Literal["serving", "restarting", "dead"]) -> None:
        """What is stopping stays so, whatever else happens to it."""
        if self._state != "stopping":
            self._state = state

    def _give_up(self, why: str) -> None:
        self._become("dead")
        self._given_up = True
        self.claim.drop()
        log.error("model %r is not started again%s", self.spec.name, f": {why}" if why else "")

    async def _watch(self) -> None:
        """Looks for an engine that owes requests their ends and does not move.

        It counts when it is seen twice: reports may be waiting to be read because this process was held up itself.
        """
        seen = False
        said: EngineClient | None = None
        limit = self.rules.stuck_seconds
        while True:
            await asyncio.sleep(min(_LONGEST_LOOK_SECONDS, limit / 4))
            stuck = self.state == "stuck"
            if stuck and seen and said is None:
                said = self.client
                self._say_stuck(said)
            elif said is not None and not stuck:
                moves, said = said is self.client and self.state == "ready", None  # else it is gone, or about to be
                if moves:
                    log.info("the engine of model %r is no longer stuck", self.spec.name)
            seen = stuck

    def _say_stuck(self, client: EngineClient) -> None:
        seconds, requests = client.stalled_seconds, client.open_work.requests
        sentence = f"has not moved for {seconds:.1f} s with {requests} requests open"
        log.error("the engine of model %r %s", self.spec.name, sentence)
        if self.rules.restart_stuck:
            client.condemn(f"was killed because it {sentence.replace('has', 'had', 1)}")

    def _why(self, sentence: str) -> str:
        """What a refused request is told; `sentence` is what the present client says."""
        what_happened = self._last_words or sentence
        match self.state:
            case "restarting":
                return f"{what_happened}, and is being started again"
            case "dead":
                return f"{what_happened}, and is not started again"
        return sentence
