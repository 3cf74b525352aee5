"""GET /memory: where the bytes are, planned beside measured, per model and per device."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from server.api.served import ServedModel
from server.api.service import Service, get_service
from server.metrics import unaccounted
from server.records import MemoryReport

router = APIRouter()


@router.get("/memory")
async def memory(service: Annotated[Service, Depends(get_service)]) -> dict[str, Any]:
    """Bytes by component, as reported when each model had loaded; models that have not are listed without numbers."""
    reports = [(model, _report(model)) for model in service.models.values()]
    return {
        "devices": _devices([report for _, report in reports if report is not None]),
        "models": [_model(model, report) for model, report in reports],
    }


def _report(model: ServedModel) -> MemoryReport | None:
    return model.client.loaded.memory if model.client.loaded is not None and model.state != "dead" else None


def _model(model: ServedModel, report: MemoryReport | None) -> dict[str, Any]:
    return {
        "name": model.name,
        "state": model.state,
        "device": report.device if report else None,
        "planned": report.planned if report else {},
        "measured": report.measured if report else {},
        "process": report.process if report else {},
    }


def _devices(reports: list[MemoryReport]) -> list[dict[str, Any]]:
    """Sums over the engines of each device; `unaccounted` is null where the device's own figure is not known."""
    found = []
    for device in sorted({report.device for report in reports}):
        here = [report for report in reports if report.device == device]
        rests = [unaccounted(report) for report in here]
        known = [rest for rest in rests if rest is not None]
        found.append(
            {
                "device": device,
                "models": len(here),
                "planned": sum(sum(report.planned.values()) for report in here),
                "measured": sum(sum(report.measured.values()) for report in here),
                "unaccounted": sum(known) if len(known) == len(rests) else None,
            }
        )
    return found
