"""The probes: /livez, /startupz, /readyz, and /health for those who know only one.

/livez     200 while some model answers, or may come to by itself; 503 when none will: restart the server
/startupz  503 with phase and bytes until every model was ready once, then 200
/readyz    200 while every model answers: started, not draining, no engine dead, being started again, or stuck; one
           that is being loaded or unloaded while others serve doesn't count
/health    the same as /readyz
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse

from server.api.service import Service, get_service

router = APIRouter()


def _answer(service: Service, status: str, *, ok: bool) -> JSONResponse:
    return JSONResponse({"status": status, "models": service.states()}, status_code=200 if ok else 503)


@router.get("/livez")
async def livez(service: Annotated[Service, Depends(get_service)]) -> JSONResponse:
    """Whether a restart would not help. A stuck engine counts as dead, unless it is going to be started again: only
    whoever restarts the server can get it to move. One of several is not worth the others' requests.
    """
    dead = bool(service.models) and all(model.engine.hopeless for model in service.models.values())
    return _answer(service, "dead" if dead else "alive", ok=not dead)


@router.get("/startupz")
async def startupz(service: Annotated[Service, Depends(get_service)]) -> JSONResponse:
    """Whether every model has been loaded, and how far loading is."""
    return _answer(service, "started" if service.started else "starting", ok=service.started)


@router.get("/readyz")
@router.get("/health")
async def readyz(service: Annotated[Service, Depends(get_service)]) -> JSONResponse:
    """Whether every model answers now. One that doesn't leaves the others answering, but sends no new traffic here."""
    if service.draining:
        return _answer(service, "draining", ok=False)
    if not service.started:
        return _answer(service, "starting", ok=False)
    ready = all(model.answers is not False for model in service.models.values())
    return _answer(service, "ready" if ready else "degraded", ok=ready)
