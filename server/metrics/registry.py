"""The one registry: what the catalog lists, the HTTP process's own metrics, and the page that scrapers read.

It is fed as records and requests pass by. Reading it asks nobody: no engine hears of a scrape, so the page comes while
a step is stuck. There is one registry in one process, whatever the number of engines, so nothing has to be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import overload

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

from server.metrics import formats
from server.metrics.catalog import (
    DEVICE_AVAILABLE,
    DEVICE_CAPACITY,
    METRICS,
    MODEL,
    PREFIX,
    CounterSpec,
    GaugeSpec,
    HistogramSpec,
    Spec,
)
from server.metrics.memory import MemoryMetrics
from server.records import CPU

disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the page


class Metrics:
    """The registry with everything in METRICS, and prometheus-client's metrics of the HTTP process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._families: dict[str, Counter | Gauge | Histogram] = {
            spec.name: _family(spec, self.registry) for spec in METRICS
        }
        self.memory = MemoryMetrics(self)

    @overload
    def of(self, spec: CounterSpec) -> Counter: ...
    @overload
    def of(self, spec: GaugeSpec) -> Gauge: ...
    @overload
    def of(self, spec: HistogramSpec) -> Histogram: ...
    def of(self, spec: Spec) -> Counter | Gauge | Histogram:
        """The family of a spec of the catalog."""
        return self._families[spec.name]

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics, with exemplars, where the Accept header asks for it."""
        encode, content_type = formats.choose(accept)
        return encode(self.registry), content_type

    def watch_machine(self, capacity: Callable[[], int | None], available: Callable[[], int | None]) -> None:
        """Asks these functions at each scrape for the bytes of the CPU's memory; NaN where they don't know."""
        self.of(DEVICE_CAPACITY).labels(CPU).set_function(lambda: _number(capacity()))
        self.of(DEVICE_AVAILABLE).labels(CPU).set_function(lambda: _number(available()))

    def forget(self, model: str) -> None:
        """Removes every series of a model."""
        self.memory.gone(model)
        for spec in METRICS:
            if MODEL in spec.labels:
                self._families[spec.name].remove_by_labels({MODEL: model})


def _number(value: int | None) -> float:
    return math.nan if value is None else value


def _family(spec: Spec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name = PREFIX + spec.name
    if isinstance(spec, HistogramSpec):
        return Histogram(name, spec.help, spec.labels, registry=registry, buckets=spec.buckets)
    if isinstance(spec, CounterSpec):
        return Counter(name, spec.help, spec.labels, registry=registry)
    return Gauge(name, spec.help, spec.labels, registry=registry)
