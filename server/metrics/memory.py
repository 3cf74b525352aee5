"""A model's memory report as series: planned, measured, their difference, and what no component explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.metrics.catalog import (
    DEVICE_AVAILABLE,
    DEVICE_CAPACITY,
    MEMORY,
    MEMORY_PEAK,
    MEMORY_PLANNED,
    MEMORY_PREDICTION_ERROR,
    MEMORY_UNACCOUNTED,
    MODEL,
    PROCESS_MEMORY,
)
from server.records import CPU, DEVICE_USED, ELSEWHERE, PSS, MemoryReport

if TYPE_CHECKING:
    from server.metrics.registry import Metrics


class MemoryMetrics:
    """All models' reports; the series of a device are sums over the engines on it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._devices: dict[str, str] = {}
        """Of each model with a report."""
        self._rests: dict[str, tuple[str, int]] = {}
        """By model: its device, and what of its memory no component explains."""

    def report(self, model: str, report: MemoryReport) -> None:
        """What a model holds from now on; its report before is forgotten."""
        self.gone(model)
        of, device = self._metrics.of, report.device
        self._devices[model] = device
        for component, size in report.measured.items():
            of(MEMORY).labels(model, device, component).set(size)
        for component, size in report.planned.items():
            of(MEMORY_PLANNED).labels(model, device, component).set(size)
        for component, size in report.peak.items():
            of(MEMORY_PEAK).labels(model, device, component).set(size)
        for component, difference in prediction_error(report).items():
            of(MEMORY_PREDICTION_ERROR).labels(model, device, component).set(difference)
        for kind, size in report.process.items():
            of(PROCESS_MEMORY).labels(model, kind).set(size)
        if report.device_capacity:
            of(DEVICE_CAPACITY).labels(device).set(report.device_capacity)
            of(DEVICE_AVAILABLE).labels(device).set(report.device_free)
        rest = unaccounted(report)
        if rest is not None:
            self._rests[model] = (device, rest)
            self._sum(device)

    def gone(self, model: str) -> None:
        """A model whose engine has ended holds nothing; what was planned for it goes too, as it is planned anew."""
        for spec in (MEMORY, MEMORY_PEAK, MEMORY_PLANNED, MEMORY_PREDICTION_ERROR, PROCESS_MEMORY):
            self._metrics.of(spec).remove_by_labels({MODEL: model})
        device = self._devices.pop(model, CPU)
        if device != CPU and device not in self._devices.values():
            for spec in (DEVICE_CAPACITY, DEVICE_AVAILABLE):  # nobody looks at it any more
                self._metrics.of(spec).remove_by_labels({"device": device})
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
    """Measured less planned bytes, of each component that either knows; of what comes and goes, the most so far."""
    most = report.measured | report.peak
    return {name: most.get(name, 0) - report.planned.get(name, 0) for name in dict.fromkeys((*report.planned, *most))}


def unaccounted(report: MemoryReport) -> int | None:
    """What the device's own figure of an engine has beyond the measured components; None where there is none.

    On a CPU the figure is the process's proportional share of resident pages (PSS), and what of its weights lies in
    mapped files and is not among them; on CUDA what the driver says is in use beyond what was before loading.
    """
    figure = report.process.get(PSS if report.device == CPU else DEVICE_USED)
    elsewhere = report.process.get(ELSEWHERE, 0)
    return None if figure is None else figure + elsewhere - sum(report.measured.values())
