"""GET /v1/models and /v1/models/{id}: what is served, its state, its context length and its quantization config."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from server.api.served import ServedModel
from server.api.service import Service, get_service

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: Annotated[Service, Depends(get_service)]) -> dict[str, Any]:
    """Every configured model, loaded or not."""
    return {"object": "list", "data": [describe(model) for model in service.models.values()]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, service: Annotated[Service, Depends(get_service)]) -> dict[str, Any]:
    """One model; 404 for a name that is not served."""
    return describe(service.find(name))


def describe(model: ServedModel) -> dict[str, Any]:
    """OpenAI's fields, then ours; what is known only after loading is null until then."""
    loaded = model.client.loaded
    info = loaded.info if loaded is not None else None
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "halfbyte",
        "state": model.state,
        "progress": model.progress,
        "max_model_len": info.max_model_len if info else None,
        "architecture": info.architecture if info else None,
        "dtype": info.dtype if info else None,
        "device": info.device if info else None,
        "quantization": info.quantization if info else None,
        "prefix_caching": info.prefix_caching if info else None,
        "batching": info.batching if info else None,
        "encoder_decoder": info.is_encoder_decoder if info else None,
        "sampling_defaults": info.sampling_defaults if info else None,
        "speculative_tokens": info.speculative_tokens if info else None,
    }
