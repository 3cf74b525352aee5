"""GET /metrics: the registry in Prometheus' text format. It never asks an engine, so it answers while one is stuck."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.api.service import Service, get_service

router = APIRouter()


@router.get("/metrics")
async def metrics(service: Annotated[Service, Depends(get_service)]) -> Response:
    """Everything in server/metrics.py."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
