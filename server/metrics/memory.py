"""A model's memory report as series: planned, measured, their difference, and what no component explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.metrics.catalog import (
    DEVICE_CAPACITY,
    MEMORY,
    MEMORY_PLANNED,
    MEMORY_PREDICTION_ERROR,
    MEMORY_UNACCOUNTED,
    MODEL,
    PROCESS_MEMORY,
)
from server.records import MemoryReport

if TYPE_CHECKING:
    from server.metrics.registry import Metrics


class MemoryMetrics:
    """All models' reports; the series of a device are sums over the engines on it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._rests: dict[str, tuple[str, int]] = {}
        """By model: its device, and what of its memory no component explains."""

    def report(self, model: str, report: MemoryReport) -> None:
        """What a model holds from now on; its report before is forgotten."""
        self.gone(model)
        of, device = self._metrics.of, report.device
        for component, size in report.measured.items():
            of(MEMORY).labels(model, device, component).set(size)
        for component, size in report.planned.items():
            of(MEMORY_PLANNED).labels(model, device, component).set(size)
        for component, difference in prediction_error(report).items():
            of(MEMORY_PREDICTION_ERROR).labels(model, device, component).set(difference)
        for kind, size in report.process.items():
            of(PROCESS_MEMORY).labels(model, kind).set(size)
        if report.device_capacity:
            of(DEVICE_CAPACITY).labels(device).set(report.device_capacity)
        rest = unaccounted(report)
        if rest is not None:
            self._rests[model] = (device, rest)
            self._sum(device)

    def gone(self, model: str) -> None:
        """A model whose engine has ended holds nothing; what was planned for it goes too, as it is planned anew."""
        for spec in (MEMORY, MEMORY_PLANNED, MEMORY_PREDICTION_ERROR, PROCESS_MEMORY):
            self._metrics.of(spec).remove_by_labels({MODEL: model})
        if model in self._rests:
            device, _ = self._rests.pop(model)
            self._sum(device)

    def _sum(self, device: str) -> None:
        rests = [rest for on, rest in self._rests.values() if on == device]
        family = self._metrics.of(MEMORY_UNACCOUNTED)
        if rests:
            family.labels(device).set(sum(rests))
        else:
            family.remove_by_labels({"device": device})


def prediction_error(report: MemoryReport) -> dict[str, int]:
    """Measured less planned bytes, of each component that either knows."""
    names = dict.fromkeys((*report.planned, *report.measured))
    return {name: report.measured.get(name, 0) - report.planned.get(name, 0) for name in names}


def unaccounted(report: MemoryReport) -> int | None:
    """What the device's own figure has beyond the measured components; None where there is no such figure.

    On a CPU the figure is the engine process's anonymous memory, so Python and torch themselves are in it.
    """
    if report.device != "cpu" or "rss_anonymous" not in report.process:
        return None
    return report.process["rss_anonymous"] - sum(report.measured.values())
