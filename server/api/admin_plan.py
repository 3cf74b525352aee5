"""POST /admin/plan: what a model would need, and whether it fits, without loading it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse

from server.api.entry import ENTRY_BODY, requested_entry
from server.api.service import Service, get_service
from server.config import ModelConfig, thread_share
from server.engine.planner import Planner
from server.errors import ServerError, load_refusal

router = APIRouter()


def get_planner(request: Request) -> Planner:
    """The app's planner: one, so that plans wait for each other."""
    planner = request.app.state.planner
    if not isinstance(planner, Planner):
        raise TypeError("the app was made without a Planner")
    return planner


@router.post("/admin/plan", openapi_extra=ENTRY_BODY)
async def plan(
    entry: Annotated[ModelConfig, Depends(requested_entry)],
    planner: Annotated[Planner, Depends(get_planner)],
    service: Annotated[Service, Depends(get_service)],
) -> JSONResponse:
    """The plan of one model, described as in models.yaml: the document of `halfbyte plan --json`.

    It is for the memory that the models here leave: `promised_bytes` of `free_bytes` are theirs, and not touched yet.
    That a model does not fit is an answer (`fits`, `nearest`), no error. Refused with 400 (the entry) and 422 (the
    checkpoint); 507 where not even planning has room; 500 where it failed.
    """
    try:
        made = await planner.plan(entry.spec(thread_share(1)), service.room_to_plan)
    except ServerError as error:
        raise load_refusal(error) from error
    return JSONResponse(made.document())
