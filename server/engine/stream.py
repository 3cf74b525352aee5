"""One open request as its consumer sees it: outputs as they come, and times for the metrics. It knows no process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from server.errors import DeadlineExceededError, EngineFaultError, RequestError, ServerError
from server.metrics import ModelMetrics
from server.records import FinishReason, SequenceOutput


class OutputStream:
    """The outputs of one open request: an async iterator, and a context manager that ends what is still running.

    `forget` is called once with the request's id when the stream is closed, and with whether the engine must be told.
    """

    def __init__(
        self, request_id: str, prompt_tokens: int, metrics: ModelMetrics, forget: Callable[[str, bool], None]
    ) -> None:
        self.request_id = request_id
        self.tokens = 0
        self._forget = forget
        self._metrics = metrics
        self._outputs: asyncio.Queue[SequenceOutput | ServerError] = asyncio.Queue()
        self._started = time.monotonic()
        self._last_token: float | None = None
        self._reason: FinishReason | None = None
        self._closed = False
        metrics.admitted(prompt_tokens)

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        """The next output. Raises EngineUnavailableError when the engine dies, RequestError when it refuses,
        EngineFaultError when it fails in a step of this request, DeadlineExceededError when the time is up.
        """
        if self._closed or self._reason is not None:
            raise StopAsyncIteration
        output = await self._outputs.get()
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

    def deliver(self, output: SequenceOutput | ServerError) -> None:
        """Called by the client as outputs arrive; times are taken here, however late the consumer is."""
        if isinstance(output, SequenceOutput) and output.token_ids:
            now, count = time.monotonic(), len(output.token_ids)
            if self._last_token is None:
                self._metrics.first_token(now - self._started)
            else:
                self._metrics.next_token((now - self._last_token) / count)
            self._last_token = now
            self.tokens += count
            self._metrics.generated(count)
        self._outputs.put_nowait(output)

    def close(self, reason: FinishReason = "abort") -> None:
        """Ends the request, in the engine too if it is still running; `reason` is how the metrics count that."""
        if self._closed:
            return
        self._closed = True
        self._forget(self.request_id, self._reason is None)
        self._metrics.finished(self._reason or reason, self.tokens, time.monotonic() - self._started)

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
