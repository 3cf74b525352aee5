"""One open request as its consumer sees it: outputs as they come, and times for the metrics. It knows no process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from server.errors import DeadlineExceededError, EngineFaultError, RequestError, ServerError
from server.metrics import ModelMetrics
from server.records import FinishReason, SequenceOutput

LATE_SECONDS: Final = 2.0
"""How long after a deadline the engine's own word on it is waited for: it comes between steps, which take time."""


@dataclass(frozen=True)
class Origin:
    """Where a request came from, as far as its times and traces go."""

    arrived: float = field(default_factory=time.monotonic)
    """When, by time.monotonic: before templates and tokenizer, which its client waits for too."""
    trace_id: str | None = None
    """The trace that its client records it in; examples in the histograms of request times point there."""


class OutputStream:
    """The outputs of one open request: an async iterator, and a context manager that ends what is still running.

    `forget` is called once with the request's id when the stream is closed, and with whether the engine must be told.
    """

    def __init__(
        self,
        request_id: str,
        prompt_tokens: int,
        metrics: ModelMetrics,
        forget: Callable[[str, bool], None],
        origin: Origin | None = None,
        deadline: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.tokens = 0
        self._forget = forget
        self._metrics = metrics
        self._outputs: asyncio.Queue[SequenceOutput | ServerError | None] = asyncio.Queue()
        """None wakes who waits when the time is up."""
        self._prompt_tokens = prompt_tokens
        self._origin = origin or Origin()
        self._first_token: float | None = None
        self._last_token = 0.0
        self._reason: FinishReason | None = None
        self._closed = False
        self._is_late = False
        self._alarm: asyncio.TimerHandle | None = None
        if deadline is not None:
            self._alarm = asyncio.get_running_loop().call_at(deadline + LATE_SECONDS, self._time_is_up)

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        """The next output. Raises EngineUnavailableError when the engine dies, RequestError when it refuses,
        EngineFaultError when it fails in a step of this request, DeadlineExceededError when the time is up.
        """
        if self._closed or self._reason is not None:
            raise StopAsyncIteration
        output = await self._next()
        if isinstance(output, ServerError):
            self._reason = "error"
            raise output
        self._reason = output.finish_reason
        if output.finish_reason in ("error", "timeout"):
            sentence = output.error or "the engine ended this request and gave no reason"
            if output.finish_reason == "timeout":
                raise DeadlineExceededError(sentence)
            raise RequestError(sentence) if output.refused else EngineFaultError(sentence)
        return output

    async def _next(self) -> SequenceOutput | ServerError:
        """Not for longer than the deadline and what an engine may take to say that it has come: a stuck one doesn't,
        and who reads slowly holds the place of another.
        """
        output = await self._outputs.get()
        if output is not None and not self._is_late:
            return output
        self.close("timeout")
        words = f"not all of its {self.tokens} tokens have been read"
        if output is None and self._outputs.empty():
            words = f"with {self.tokens} tokens generated, and the engine has not answered since"
        raise DeadlineExceededError(f"the request's time was up {LATE_SECONDS:.3g} seconds ago, {words}")

    def _time_is_up(self) -> None:
        """One timer for all outputs: of each, it would cost more than what is done with it."""
        self._is_late = True
        if self._outputs.empty():
            self._outputs.put_nowait(None)

    def deliver(self, output: SequenceOutput | ServerError) -> None:
        """Called by the client as outputs arrive; times are taken here, however late the consumer is."""
        if isinstance(output, SequenceOutput) and output.token_ids:
            now, count = time.monotonic(), len(output.token_ids)
            if self._first_token is None:
                self._first_token = now
                self._metrics.first_token(now - self._origin.arrived, self._prompt_tokens, self._origin.trace_id)
            else:
                self._metrics.next_tokens(now - self._last_token, count)
            self._last_token = now
            self.tokens += count
        self._outputs.put_nowait(output)

    def close(self, reason: FinishReason | None = None) -> None:
        """Ends the request, in the engine too if it is still running.

        `reason` is how the metrics count that; without one it is the engine's, or "abort" where it had not ended.
        """
        if self._closed:
            return
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        self._forget(self.request_id, self._reason is None)
        self._count(reason or self._reason or "abort")

    def _count(self, reason: FinishReason) -> None:
        trace_id = self._origin.trace_id
        seconds = time.monotonic() - self._origin.arrived
        self._metrics.finished(reason, self._prompt_tokens, self.tokens, seconds, trace_id)
        if reason in ("stop", "length") and self._first_token is not None and self.tokens > 1:
            self._metrics.paced((self._last_token - self._first_token) / (self.tokens - 1), trace_id)

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
