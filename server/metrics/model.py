"""One model's view of the registry: translates its records and requests into values.

Its series exist from the start, so that a rate over them sees the first event, and go when the model is forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, get_args

from prometheus_client import Counter, Gauge, Histogram

from server.errors import (
    DeadlineExceededError,
    EngineFaultError,
    EngineUnavailableError,
    OverloadedError,
    RequestError,
    UnforeseenError,
)
from server.metrics import catalog as c
from server.metrics.labels import quantization_label, quantization_labels
from server.metrics.registry import Metrics
from server.records import KV_BLOCK_TOKENS, FinishReason, Loaded, LoadProgress, MemoryReport, StepReport

REJECTIONS: Final[dict[type[RequestError], str]] = {
    OverloadedError: "overloaded",
    EngineUnavailableError: "unavailable",
}
"""Errors that keep a request from being admitted, and the reason they are counted under."""
_EXPECTED_ERRORS: Final = (
    RequestError,
    OverloadedError,
    EngineFaultError,
    EngineUnavailableError,
    DeadlineExceededError,
    UnforeseenError,
)
"""What a request for text may end with; a class without a code of its own is counted by its kind."""


@dataclass(frozen=True)
class Watched:
    """What is asked at each scrape, because no record says it when it changes. All of these must be quick."""

    state: Callable[[], str]
    stalled: Callable[[], float]
    """Seconds without a report while there are requests."""
    owed: Callable[[], int]
    """Texts that the engine has been sent and whose end it has not reported."""


class ModelMetrics:
    """Of one model, for as long as it is served. Every method is quick and none raises for a model that is gone."""

    def __init__(self, metrics: Metrics, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._model = model
        self._clock = clock
        self._last_step = clock()
        self._running = 0
        self._resolve()
        for reason in get_args(FinishReason):
            self._counter(c.REQUESTS, reason)
        for rejection in REJECTIONS.values():
            self._counter(c.REQUESTS_REJECTED, rejection)
        for error in _EXPECTED_ERRORS:
            self._counter(c.REQUEST_ERRORS, error_label(error))
        self._gauges[c.SECONDS_SINCE_STEP.name].set_function(lambda: self._clock() - self._last_step)

    def _resolve(self) -> None:
        """Looks up once what is set with every step: the families whose only label is the model."""
        own = [spec for spec in c.METRICS if spec.labels == (c.MODEL,)]
        of, model = self._metrics.of, self._model
        self._counters: dict[str, Counter] = {s.name: of(s).labels(model) for s in own if isinstance(s, c.CounterSpec)}
        self._gauges: dict[str, Gauge] = {s.name: of(s).labels(model) for s in own if isinstance(s, c.GaugeSpec)}
        self._histograms: dict[str, Histogram] = {
            s.name: of(s).labels(model) for s in own if isinstance(s, c.HistogramSpec)
        }
        self._prefill = self._counter(c.STEP_TOKENS, "prefill")
        self._decode = self._counter(c.STEP_TOKENS, "decode")

    def _counter(self, spec: c.CounterSpec, *labels: str) -> Counter:
        return self._metrics.of(spec).labels(self._model, *labels)

    def _gauge(self, spec: c.GaugeSpec, *labels: str) -> Gauge:
        return self._metrics.of(spec).labels(self._model, *labels)

    def forget(self) -> None:
        """The model is not served any more: its series vanish, and what still comes of it is counted nowhere."""
        self._metrics.forget(self._model)
        self._metrics = Metrics()  # a registry that nobody reads
        self._resolve()

    # --- the engine ---------------------------------------------------------------------------------------------------

    def watch(self, watched: Watched, states: Iterable[str], restart_reasons: Iterable[str]) -> None:
        """Takes from `watched` what no record says; `states` and `restart_reasons` are all there may be."""
        for state in states:
            self._gauge(c.ENGINE_STATE, state).set_function(_is(state, watched.state))
        for reason in restart_reasons:
            self._counter(c.ENGINE_RESTARTS, reason)
        self._gauges[c.ENGINE_STALLED.name].set_function(watched.stalled)
        self._gauges[c.REQUESTS_WAITING.name].set_function(lambda: max(0, watched.owed() - self._running))

    def restarted(self, reason: str) -> None:
        self._counter(c.ENGINE_RESTARTS, reason).inc()

    def loading(self, progress: LoadProgress) -> None:
        self._set(c.LOAD_BYTES, progress.bytes_loaded)

    def loaded(self, record: Loaded) -> None:
        info = record.info
        self._last_step = self._clock()
        self._set(c.ENGINE_UP, 1)
        self._set(c.LOAD_SECONDS, record.load_seconds)
        self._set(c.MODEL_MAX_LENGTH, info.max_model_len)
        self._set(c.KV_CAPACITY, record.kv_blocks)
        # Files may have changed since the last life.
        for spec in (c.MODEL_INFO, c.KV_INFO, c.QUANTIZATION_ERROR, c.QUANTIZATION_OUTLIERS):
            self._metrics.of(spec).remove_by_labels({c.MODEL: self._model})
        labels = (info.architecture, info.dtype, info.device, quantization_label(info.quantization))
        self._gauge(c.MODEL_INFO, *labels, *quantization_labels(info.quantization)).set(1)
        self._gauge(c.KV_INFO, str(KV_BLOCK_TOKENS), str(record.kv_blocks)).set(1)
        for quality in record.quality:
            self._gauge(c.QUANTIZATION_ERROR, quality.group, quality.format).set(quality.relative_error)
            self._gauge(c.QUANTIZATION_OUTLIERS, quality.group, quality.format).set(quality.outlier_share)
        self.memory_changed(record.memory)

    def memory_changed(self, report: MemoryReport) -> None:
        self._metrics.memory.report(self._model, report)

    def step(self, report: StepReport) -> None:
        self._last_step = self._clock()
        self._running = report.running
        self._set(c.REQUESTS_RUNNING, report.running)
        self._set(c.KV_USED, report.kv_blocks_used)
        self._set(c.KV_CAPACITY, report.kv_blocks_total)
        self._set(c.KV_USAGE, report.kv_blocks_used / max(1, report.kv_blocks_total))
        self._set(c.KV_CACHED, report.kv_blocks_cached)
        self._add(c.PREFIX_QUERIES, report.prefix_query_tokens)
        self._add(c.PREFIX_HITS, report.prefix_hit_tokens)
        self._add(c.PREEMPTIONS, report.preemptions)
        self._add(c.DRAFT_TOKENS, report.draft_tokens)
        self._add(c.DRAFT_ACCEPTED, report.accepted_draft_tokens)
        self._add(c.STEPS, report.prefill_tokens + report.decode_tokens > 0)  # else it only says what has ended
        self._add(c.FORWARD_PASSES, report.forward_passes)
        if report.forward_passes:
            self._observe(c.STEP_DURATION, report.seconds)
            self._observe(c.STEP_SEQUENCES, sum(1 for output in report.outputs if output.token_ids))
        for seconds in report.queue_seconds:
            self._observe(c.REQUEST_QUEUE, seconds)
        self._prefill.inc(report.prefill_tokens)
        self._decode.inc(report.decode_tokens)

    def died(self) -> None:
        """The engine has ended: it runs nothing and holds nothing."""
        self._running = 0
        for spec in (c.ENGINE_UP, c.REQUESTS_RUNNING, c.KV_USED, c.KV_CACHED, c.KV_USAGE):
            self._set(spec, 0)
        self._metrics.memory.gone(self._model)

    # --- requests -----------------------------------------------------------------------------------------------------

    def failed(self, error: RequestError) -> None:
        """A request for text is answered with an error; one that kept it from being admitted is a rejection too."""
        self._counter(c.REQUEST_ERRORS, error_label(type(error))).inc()

    def rejected(self, error: RequestError) -> None:
        """A request was not admitted; `error` is one of REJECTIONS."""
        reason = next(reason for kind, reason in REJECTIONS.items() if isinstance(error, kind))
        self._counter(c.REQUESTS_REJECTED, reason).inc()

    def first_token(self, seconds: float, prompt_tokens: int, trace_id: str | None = None) -> None:
        self._add(c.PROMPT_TOKENS, prompt_tokens)
        self._observe(c.FIRST_TOKEN, seconds, trace_id)

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` tokens came together, so long after the one before: each is counted with its share."""
        for _ in range(count):
            self._observe(c.INTER_TOKEN, seconds / count)

    def generated(self, tokens: int) -> None:
        self._add(c.GENERATION_TOKENS, tokens)

    def finished(
        self, reason: FinishReason, prompt_tokens: int, generated: int, seconds: float, trace_id: str | None = None
    ) -> None:
        self._counter(c.REQUESTS, reason).inc()
        self._observe(c.REQUEST_PROMPT_TOKENS, prompt_tokens)
        self._observe(c.REQUEST_GENERATION_TOKENS, generated)
        self._observe(c.REQUEST_DURATION, seconds, trace_id)

    def paced(self, seconds: float, trace_id: str | None = None) -> None:
        """A complete text of several tokens: its mean time per token after the first."""
        self._observe(c.TIME_PER_TOKEN, seconds, trace_id)

    # --- values -------------------------------------------------------------------------------------------------------

    def _set(self, spec: c.GaugeSpec, value: float) -> None:
        self._gauges[spec.name].set(value)

    def _add(self, spec: c.CounterSpec, amount: float = 1) -> None:
        self._counters[spec.name].inc(amount)

    def _observe(self, spec: c.HistogramSpec, value: float, trace_id: str | None = None) -> None:
        self._histograms[spec.name].observe(value, None if trace_id is None else {"trace_id": trace_id})


def error_label(error: type[RequestError]) -> str:
    """The code that clients see in the error's body; its type where it has no code."""
    return error.code or error.kind


def _is(one: str, state: Callable[[], str]) -> Callable[[], float]:
    return lambda: float(state() == one)
