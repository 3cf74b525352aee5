"""GET /metrics: the registry as Prometheus' text, or as OpenMetrics where that is asked for.

It never asks an engine, so it costs none anything and answers while one is stuck. The page is written in a thread, so
that tokens go out meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.service import Service, get_service

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request, service: Annotated[Service, Depends(get_service)]) -> Response:
    """Everything in server/metrics/catalog.py."""
    page, content_type = await asyncio.to_thread(service.metrics.page, request.headers.get("accept", ""))
    return Response(page, headers={"Content-Type": content_type})
