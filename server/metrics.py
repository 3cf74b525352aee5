"""Every metric of the server in one list, and the two views that feed them: one per model, one for HTTP.

Values are set as records and requests pass by; a scrape only reads the registry and never asks an engine, so it answers
while a step is stuck. Names, labels and buckets are spelled in METRICS and nowhere else; docs/api.md is checked
against it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from server.records import FinishReason, Loaded, LoadProgress, MemoryReport, StepReport

PREFIX: Final = "halfbyte_"
disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the page

# The OpenTelemetry GenAI buckets, continued upwards: what dashboards for other servers already use.
FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
INTER_TOKEN_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
DURATION_BUCKETS: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKEN_BUCKETS: Final = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000,
)  # fmt: skip
SEQUENCE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Spec:
    """One metric family; `name` is without the prefix, and without the _total that counters get when exposed."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()


METRICS: Final = (
    Spec("memory_bytes", "gauge", "Measured bytes by component.", ("model", "device", "component")),
    Spec(
        "memory_planned_bytes",
        "gauge",
        "Bytes by component as planned before loading.",
        ("model", "device", "component"),
    ),
    Spec(
        "memory_unaccounted_bytes", "gauge", "Bytes engines hold on a device that no component explains.", ("device",)
    ),
    Spec(
        "engine_process_memory_bytes",
        "gauge",
        "The engine process as the system sees it, after loading.",
        ("model", "kind"),
    ),
    Spec(
        "model_info",
        "gauge",
        "Constant 1; what is served and how it is quantized.",
        ("model", "architecture", "dtype", "device", "quantization"),
    ),
    Spec("model_max_length_tokens", "gauge", "Longest prompt plus completion."),
    Spec("model_load_seconds", "gauge", "How long the model took to load."),
    Spec("model_load_bytes", "gauge", "Bytes of the checkpoint read so far."),
    Spec("engine_up", "gauge", "1 while the engine is ready, 0 while it loads or after it died."),
    Spec("engine_state", "gauge", "1 for the state a model is in, 0 for the others.", ("model", "state")),
    Spec("engine_restarts", "counter", "Engines started again, by how the one before ended.", ("model", "reason")),
    Spec("engine_stalled_seconds", "gauge", "Time without a report of an engine that has requests; 0 with none."),
    Spec("requests", "counter", "Requests that were admitted and ended, by how.", ("model", "finish_reason")),
    Spec("requests_rejected", "counter", "Requests that were refused before they ran.", ("model", "reason")),
    Spec("prompt_tokens", "counter", "Prompt tokens of admitted requests."),
    Spec("generation_tokens", "counter", "Generated tokens."),
    Spec("requests_running", "gauge", "Sequences that share the engine's steps."),
    Spec("requests_waiting", "gauge", "Requests that wait for their first step."),
    Spec("kv_blocks_used", "gauge", "KV cache blocks in use."),
    Spec("kv_blocks_capacity", "gauge", "KV cache blocks there are."),
    Spec("kv_cache_usage_ratio", "gauge", "Used part of the KV cache, 0 to 1."),
    Spec("kv_blocks_cached", "gauge", "KV cache blocks that nobody uses, kept because they may be found again."),
    Spec("prefix_cache_query_tokens", "counter", "Prompt tokens that were looked for in the KV cache."),
    Spec("prefix_cache_hit_tokens", "counter", "Prompt tokens that were found in the KV cache and not computed."),
    Spec(
        "time_to_first_token_seconds",
        "histogram",
        "From the request's arrival to its first token.",
        buckets=FIRST_TOKEN_BUCKETS,
    ),
    Spec(
        "inter_token_latency_seconds",
        "histogram",
        "Between one token of a request and its next.",
        buckets=INTER_TOKEN_BUCKETS,
    ),
    Spec(
        "request_duration_seconds", "histogram", "From a request's arrival to its last token.", buckets=DURATION_BUCKETS
    ),
    Spec(
        "request_queue_seconds",
        "histogram",
        "From the engine's receiving a request to its first step.",
        buckets=DURATION_BUCKETS,
    ),
    Spec("request_prompt_tokens", "histogram", "Prompt tokens per request.", buckets=TOKEN_BUCKETS),
    Spec("request_generation_tokens", "histogram", "Generated tokens per request.", buckets=TOKEN_BUCKETS),
    Spec("engine_steps", "counter", "Engine steps."),
    Spec("engine_forward_passes", "counter", "Forward passes of the model."),
    Spec("engine_step_duration_seconds", "histogram", "One engine step.", buckets=INTER_TOKEN_BUCKETS),
    Spec(
        "engine_step_sequences",
        "histogram",
        "Sequences that took part in a step: the batch size.",
        buckets=SEQUENCE_BUCKETS,
    ),
    Spec("engine_step_tokens", "counter", "Tokens computed, by phase.", ("model", "phase")),
    Spec(
        "engine_seconds_since_last_step", "gauge", "Grows while the engine is idle, or stuck if requests are running."
    ),
    Spec("http_requests", "counter", "HTTP requests by route and status.", ("method", "route", "status")),
    Spec("http_requests_in_flight", "gauge", "HTTP requests being answered.", ()),
    Spec(
        "http_request_duration_seconds",
        "histogram",
        "HTTP requests, streams to their end.",
        ("method", "route"),
        buckets=DURATION_BUCKETS,
    ),
)


class Metrics:
    """The registry with everything in METRICS, and prometheus-client's metrics of the HTTP process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.counters: dict[str, Counter] = {}
        self.gauges: dict[str, Gauge] = {}
        self.histograms: dict[str, Histogram] = {}
        for spec in METRICS:
            name, registry = PREFIX + spec.name, self.registry
            if spec.kind == "counter":
                self.counters[spec.name] = Counter(name, spec.help, spec.labels, registry=registry)
            elif spec.kind == "gauge":
                self.gauges[spec.name] = Gauge(name, spec.help, spec.labels, registry=registry)
            else:
                self.histograms[spec.name] = Histogram(
                    name, spec.help, spec.labels, registry=registry, buckets=spec.buckets
                )
        self._unaccounted: dict[tuple[str, str], int] = {}

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def forget(self, model: str) -> None:
        """Takes every series of a model away, and its part out of sums."""
        for spec in METRICS:
            if "model" in spec.labels:
                families = self.counters | self.gauges | self.histograms
                families[spec.name].remove_by_labels({"model": model})
        for name, device in list(self._unaccounted):
            if name == model:
                del self._unaccounted[name, device]
                self._sum_unaccounted(device)

    def set_unaccounted(self, model: str, device: str, value: int) -> None:
        """One engine's part of what no component of a device explains; the series is the sum over the engines."""
        self._unaccounted[model, device] = value
        self._sum_unaccounted(device)

    def _sum_unaccounted(self, device: str) -> None:
        parts = [part for (_, on), part in self._unaccounted.items() if on == device]
        if parts:
            self.gauges["memory_unaccounted_bytes"].labels(device).set(sum(parts))
        else:
            self.gauges["memory_unaccounted_bytes"].remove(device)


class ModelMetrics:
    """One model's view: translates its records and requests into values; its series exist from the start."""

    def __init__(self, metrics: Metrics, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._model = model
        self._clock = clock
        self._last_step = clock()
        own = [spec for spec in METRICS if spec.labels == ("model",)]
        self._counters = {s.name: metrics.counters[s.name].labels(model) for s in own if s.kind == "counter"}
        self._gauges = {s.name: metrics.gauges[s.name].labels(model) for s in own if s.kind == "gauge"}
        self._histograms = {s.name: metrics.histograms[s.name].labels(model) for s in own if s.kind == "histogram"}
        for reason in get_args(FinishReason):
            metrics.counters["requests"].labels(model, reason)
        self._gauges["engine_seconds_since_last_step"].set_function(lambda: self._clock() - self._last_step)

    def forget(self) -> None:
        """Takes the model's series away for good: what its last requests still report goes nowhere."""
        self._metrics.forget(self._model)
        self._metrics = Metrics()

    def watch(self, states: Iterable[str], state: Callable[[], str], stalled: Callable[[], float]) -> None:
        """Takes the model's state, one of `states`, and how long it has not moved from these functions."""
        for one in states:
            self._metrics.gauges["engine_state"].labels(self._model, one).set_function(_is(one, state))
        self._gauges["engine_stalled_seconds"].set_function(stalled)

    def restarted(self, reason: str) -> None:
        self._metrics.counters["engine_restarts"].labels(self._model, reason).inc()

    def loading(self, progress: LoadProgress) -> None:
        self._gauges["model_load_bytes"].set(progress.bytes_loaded)

    def loaded(self, record: Loaded) -> None:
        info = record.info
        self._last_step = self._clock()
        self._gauges["engine_up"].set(1)
        self._gauges["model_load_seconds"].set(record.load_seconds)
        self._gauges["model_max_length_tokens"].set(info.max_model_len)
        self._metrics.gauges["model_info"].labels(
            self._model, info.architecture, info.dtype, info.device, quantization_label(info.quantization)
        ).set(1)
        self._memory(record.memory)

    def _memory(self, report: MemoryReport) -> None:
        gauges, device = self._metrics.gauges, report.device
        for component, size in report.measured.items():
            gauges["memory_bytes"].labels(self._model, device, component).set(size)
        for component, size in report.planned.items():
            gauges["memory_planned_bytes"].labels(self._model, device, component).set(size)
        for kind, size in report.process.items():
            gauges["engine_process_memory_bytes"].labels(self._model, kind).set(size)
        rest = unaccounted(report)
        if rest is not None:
            self._metrics.set_unaccounted(self._model, device, rest)

    def step(self, report: StepReport) -> None:
        self._last_step = self._clock()
        gauges = self._gauges
        gauges["requests_running"].set(report.running)
        gauges["requests_waiting"].set(report.waiting)
        gauges["kv_blocks_used"].set(report.kv_blocks_used)
        gauges["kv_blocks_capacity"].set(report.kv_blocks_total)
        gauges["kv_cache_usage_ratio"].set(report.kv_blocks_used / max(1, report.kv_blocks_total))
        gauges["kv_blocks_cached"].set(report.kv_blocks_cached)
        self._counters["prefix_cache_query_tokens"].inc(report.prefix_query_tokens)
        self._counters["prefix_cache_hit_tokens"].inc(report.prefix_hit_tokens)
        self._counters["engine_steps"].inc()
        self._counters["engine_forward_passes"].inc(report.forward_passes)
        if report.forward_passes:
            self._histograms["engine_step_duration_seconds"].observe(report.seconds)
            self._histograms["engine_step_sequences"].observe(sum(1 for output in report.outputs if output.token_ids))
        for seconds in report.queue_seconds:
            self._histograms["request_queue_seconds"].observe(seconds)
        phases = self._metrics.counters["engine_step_tokens"]
        phases.labels(self._model, "prefill").inc(report.prefill_tokens)
        phases.labels(self._model, "decode").inc(report.decode_tokens)

    def died(self) -> None:
        for name in (
            "engine_up",
            "requests_running",
            "requests_waiting",
            "kv_blocks_used",
            "kv_blocks_cached",
            "kv_cache_usage_ratio",
        ):
            self._gauges[name].set(0)

    def rejected(self, reason: str) -> None:
        self._metrics.counters["requests_rejected"].labels(self._model, reason).inc()

    def admitted(self, prompt_tokens: int) -> None:
        self._counters["prompt_tokens"].inc(prompt_tokens)
        self._histograms["request_prompt_tokens"].observe(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        self._histograms["time_to_first_token_seconds"].observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._histograms["inter_token_latency_seconds"].observe(seconds)

    def generated(self, tokens: int) -> None:
        self._counters["generation_tokens"].inc(tokens)

    def finished(self, reason: FinishReason, generated: int, seconds: float) -> None:
        self._metrics.counters["requests"].labels(self._model, reason).inc()
        self._histograms["request_generation_tokens"].observe(generated)
        self._histograms["request_duration_seconds"].observe(seconds)


def _is(one: str, state: Callable[[], str]) -> Callable[[], float]:
    return lambda: float(state() == one)


def unaccounted(report: MemoryReport) -> int | None:
    """What the device's own figure has beyond the measured components; None where there is no such figure.

    On a CPU the figure is the engine process's anonymous memory, so Python and torch themselves are in it.
    """
    if report.device != "cpu" or "rss_anonymous" not in report.process:
        return None
    return report.process["rss_anonymous"] - sum(report.measured.values())


def quantization_label(quantization: Mapping[str, Any]) -> str:
    """A short name of an effective quantization config: nf4, nf4-dq, fp4, fp4-dq, int8 or none."""
    if quantization.get("load_in_8bit"):
        return "int8"
    if quantization.get("load_in_4bit"):
        nested = "-dq" if quantization.get("bnb_4bit_use_double_quant") else ""
        return f"{quantization.get('bnb_4bit_quant_type', 'fp4')}{nested}"
    return "none"
