"""GET /memory: where the bytes are, planned beside measured and peak, per model, per device, and per layer if asked.

It answers from what engines have reported last, and asks none of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from server.api.served import ServedModel
from server.api.service import Service, get_service
from server.metrics import unaccounted
from server.records import MemoryReport

router = APIRouter()


class MemoryQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    detail: Literal["components", "layers"] = Field(
        default="components", description="layers: each model's weights also by layer and format."
    )


class DeviceMemory(BaseModel):
    """Sums over the engines of a device, in bytes; `unaccounted` is null where the device's own figure is not known."""

    device: str
    models: int
    planned: int
    measured: int
    unaccounted: int | None


class LayerBytes(BaseModel):
    layer: str
    format: str
    components: dict[str, int]


class ModelMemory(BaseModel):
    """Bytes by component (docs/memory.md); empty or null until the model has loaded."""

    name: str
    state: str
    device: str | None
    planned: dict[str, int]
    measured: dict[str, int]
    peak: dict[str, int]
    unaccounted: int | None
    process: dict[str, int]
    layers: list[LayerBytes] | None = None
    """Only with `detail=layers`."""


class MemoryDocument(BaseModel):
    devices: list[DeviceMemory]
    models: list[ModelMemory]


@router.get("/memory", response_model_exclude_unset=True)
async def memory(
    service: Annotated[Service, Depends(get_service)], query: Annotated[MemoryQuery, Query()]
) -> MemoryDocument:
    """Bytes by component, as engines reported last; models that have not loaded are listed without numbers.

    Engines look when they have loaded, when they come to rest, and now and then while they work.
    """
    reports = [(model, _report(model)) for model in service.models.values()]
    devices = _devices([report for _, report in reports if report is not None])
    with_layers = query.detail == "layers"
    return MemoryDocument(devices=devices, models=[_model(model, report, with_layers) for model, report in reports])


def _report(model: ServedModel) -> MemoryReport | None:
    return model.client.loaded.memory if model.client.loaded is not None and model.state != "dead" else None


def _model(model: ServedModel, report: MemoryReport | None, with_layers: bool) -> ModelMemory:
    found = ModelMemory(
        name=model.name,
        state=model.state,
        device=report.device if report else None,
        planned=report.planned if report else {},
        measured=report.measured if report else {},
        peak=report.peak if report else {},
        unaccounted=unaccounted(report) if report else None,
        process=report.process if report else {},
    )
    if with_layers:
        loaded = model.client.loaded
        found.layers = [LayerBytes(**msgspec.to_builtins(layer)) for layer in loaded.layers] if loaded else []
    return found


def _devices(reports: list[MemoryReport]) -> list[DeviceMemory]:
    found = []
    for device in sorted({report.device for report in reports}):
        here = [report for report in reports if report.device == device]
        rests = [unaccounted(report) for report in here]
        known = [rest for rest in rests if rest is not None]
        found.append(
            DeviceMemory(
                device=device,
                models=len(here),
                planned=sum(sum(report.planned.values()) for report in here),
                measured=sum(sum(report.measured.values()) for report in here),
                unaccounted=sum(known) if len(known) == len(rests) else None,
            )
        )
    return found
