"""POST /admin/plan: what a model would need, and whether it fits, without loading it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import JSONResponse

from server.api.service import Service, get_service
from server.config import ModelConfig, load_entry, thread_share
from server.engine.planner import Planner
from server.errors import ServerError, load_refusal

router = APIRouter()
_ENTRY = {"requestBody": {"content": {"application/json": {"schema": ModelConfig.model_json_schema()}}}}


def get_planner(request: Request) -> Planner:
    """The app's planner: one, so that plans wait for each other."""
    planner = request.app.state.planner
    if not isinstance(planner, Planner):
        raise TypeError("the app was made without a Planner")
    return planner


@router.post("/admin/plan", openapi_extra=_ENTRY)
async def plan(
    entry: Annotated[dict[str, Any], Body()],
    service: Annotated[Service, Depends(get_service)],
    planner: Annotated[Planner, Depends(get_planner)],
) -> JSONResponse:
    """The plan of one model, described as in models.yaml: the document of `halfbyte plan --json`.

    That a model does not fit is an answer (`fits`, `nearest`), no error. Refused with 400 (the entry) and 422 (the
    checkpoint); 500 where planning itself failed.
    """
    try:
        model = load_entry(entry, "the request body", service.config.folder)
        made = await planner.plan(model.spec(thread_share(1)))
    except ServerError as error:
        raise load_refusal(error) from error
    return JSONResponse(made.document())
