"""POST /admin/models and DELETE /admin/models/{name}: models come and go while the server runs.

Both answer when the work is done. The status then says how it went, and a client that does not want to wait closes its
connection: the work goes on, and /v1/models, /readyz and /metrics show how far it is.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from server.api.entry import ENTRY_BODY, requested_entry
from server.api.fleet import Unloaded
from server.api.models import describe
from server.api.service import Service, get_service
from server.config import MAX_DRAIN_SECONDS, ModelConfig
from server.errors import RequestError, ServerError, load_refusal
from server.records import Loaded

router = APIRouter()


class UnloadQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    drain_seconds: Annotated[float, Field(ge=0, le=MAX_DRAIN_SECONDS, allow_inf_nan=False)] | None = None


@router.post("/admin/models", status_code=201, openapi_extra=ENTRY_BODY)
async def load_model(
    entry: Annotated[ModelConfig, Depends(requested_entry)], service: Annotated[Service, Depends(get_service)]
) -> JSONResponse:
    """Loads one model, described as in models.yaml, and answers when it is ready.

    Refused with 400 (the entry), 409 (the name), 422 (the checkpoint), 507 (the memory); 500 when its engine failed.
    """
    try:
        model, evicted = await service.load_model(entry)
    except RequestError:
        raise
    except ServerError as error:
        raise load_refusal(error) from error
    loaded = model.client.loaded
    answer = describe(model) | _measured(loaded) | {"evicted": [_returned(one) for one in evicted]}
    return JSONResponse(answer, status_code=201)


@router.delete("/admin/models/{name:path}")
async def unload_model(
    name: str, query: Annotated[UnloadQuery, Query()], service: Annotated[Service, Depends(get_service)]
) -> dict[str, Any]:
    """Unloads a model and answers when its process is gone: what that cut, and what came back. 404 for no such model.

    Its requests have `drain_seconds` to end, by default the server's; then they are cut.
    """
    return _returned(await service.unload_model(name, query.drain_seconds))


def _measured(loaded: Loaded | None) -> dict[str, Any]:
    if loaded is None:
        return {}
    memory = loaded.memory
    return {
        "load_seconds": loaded.load_seconds,
        "planned": memory.planned,
        "measured": memory.measured,
        "process": memory.process,
    }


def _returned(unloaded: Unloaded) -> dict[str, Any]:
    """Bytes that the system has again; null where it doesn't say."""
    before, after = unloaded.available_before, unloaded.available_after
    process = unloaded.process
    return {
        "name": unloaded.name,
        "seconds": round(unloaded.seconds, 3),
        "cut": unloaded.cut._asdict(),
        "process": None if process is None else process._asdict(),
        "device": None if unloaded.device is None else unloaded.device._asdict(),
        "machine_available": {
            "before": before,
            "after": after,
            "difference": None if before is None or after is None else after - before,
        },
    }
