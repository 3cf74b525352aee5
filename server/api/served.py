"""One served model: its engine, kept alive, and its text side. Which models there are is fleet.py's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from server.api.admission import Admission
from server.api.race import unless
from server.engine.client import Cut, EngineClient
from server.engine.supervisor import ModelState, Supervisor
from server.errors import DeadlineExceededError, EngineUnavailableError
from server.memory import allocator
from server.metrics import ModelMetrics
from server.records import Loaded, ModelSpec
from server.text.chat_template import ChatTemplate, load_chat_template
from server.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class ServedModel:
    """Its text side loads while the engine does; `load`, then requests."""

    def __init__(
        self, spec: ModelSpec, metrics: ModelMetrics, engine: Supervisor, max_queued: int, timeout: float | None
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.created = int(time.time())
        self.metrics = metrics
        self.engine = engine
        self.admission = Admission(spec.name, spec.max_sequences + max_queued)
        self.timeout = timeout
        """Seconds for a request that brings none of its own; None for any time."""
        self.template: ChatTemplate | None = None
        self.ready = False
        """Whether it has been loaded once."""
        self._tokenizer: Tokenizer | None = None
        self._preparing = 0
        """Choices of requests that the engine does not know of yet."""
        self._cut = asyncio.Event()
        self._why_cut = ""

    async def load(self) -> Loaded:
        """Starts the engine and reads the tokenizer; returns when both are done. Raises a ServerError."""
        await self.engine.start()
        await self._read_text()
        self.engine.before_serving_again = self._read_text  # the checkpoint may be another one by then
        loaded = await self.engine.wait_loaded()
        self.ready = True
        self.admission.touch()
        log.info("model %r is ready after %.1f s", self.name, loaded.load_seconds)
        return loaded

    async def _read_text(self) -> None:
        self._tokenizer, self.template = await asyncio.to_thread(self._load_text)

    def _load_text(self) -> tuple[Tokenizer, ChatTemplate | None]:
        path = Path(self.spec.path)
        try:
            tokenizer = Tokenizer.from_directory(path)
            return tokenizer, load_chat_template(path, tokenizer)
        finally:
            allocator.give_back()  # reading a large tokenizer takes several times what it keeps

    async def prepared(self, work: Coroutine[Any, Any, _Result], count: int, deadline: float | None) -> _Result:
        """What is done of a request of `count` choices before the engine gets it. Raises EngineUnavailableError where
        the open requests are ended meanwhile, DeadlineExceededError where its time (by time.monotonic) is up.
        """
        self._preparing += count
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await unless(self._cut.wait(), work, lambda: EngineUnavailableError(self._why_cut))
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceededError("the request's time was up before its prompt was made into tokens") from None
        finally:
            self._preparing -= count

    def end_requests(self, why: str) -> Cut:
        """Ends every open request with an error, for good; says what that cut."""
        cut = self.client.end_requests(why)
        self._why_cut = why
        self._cut.set()
        return Cut(cut.requests + self._preparing, cut.tokens)

    async def end(self, why: str) -> None:
        """Ends the engine and lets the tokenizer go; requests that still run have it as long as they do."""
        await self.engine.shutdown(why)
        self._tokenizer = None
        await asyncio.to_thread(allocator.give_back)

    @property
    def client(self) -> EngineClient:
        """The engine of the present; after a restart it is another one."""
        return self.engine.client

    @property
    def state(self) -> ModelState:
        return "loading" if self.engine.state == "ready" and not self.ready else self.engine.state

    @property
    def answers(self) -> bool | None:
        """Whether requests are served now; None for a model that is still coming, or already going."""
        if not self.ready or self.state == "stopping":
            return None
        return self.state == "ready"

    @property
    def idle(self) -> bool:
        """Whether it serves and nobody is served."""
        return self.state == "ready" and not self.admission.open

    def require_ready(self) -> Loaded:
        """What the engine loaded; raises EngineUnavailableError while it, or the text side, can serve no request."""
        loaded = self.engine.require_ready()
        if self._tokenizer is None:
            raise EngineUnavailableError(self._without_tokenizer())
        return loaded

    def _without_tokenizer(self) -> str:
        return self.engine.parting or f"model {self.name!r} is still loading its tokenizer"

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise EngineUnavailableError(self._without_tokenizer())
        return self._tokenizer

    @property
    def progress(self) -> dict[str, Any]:
        """How far loading has come."""
        progress = self.engine.progress
        return {"phase": progress.phase, "bytes_loaded": progress.bytes_loaded, "bytes_total": progress.bytes_total}

    @property
    def condition(self) -> dict[str, Any]:
        """What the probes say of it."""
        return {
            "state": self.state,
            **self.progress,
            "restarts": self.engine.restarts,
            "stalled_seconds": round(self.client.stalled_seconds, 3),
        }
