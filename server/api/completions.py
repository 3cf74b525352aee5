"""POST /v1/completions: one choice per prompt, as JSON or as a stream of events."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.generation import TextJob, encode_text
from server.api.respond import Format, options, respond
from server.api.service import Service, get_service
from server.api.wire import DEFAULT_COMPLETION_TOKENS, CompletionRequest, Prompt

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(
    request: Request, body: CompletionRequest, service: Annotated[Service, Depends(get_service)]
) -> Response:
    """Continues each prompt. Refused with 400 (a field), 404 (the model), 429 (full), 503 (the engine)."""
    model = service.model(body.model)

    async def encode() -> list[list[int]]:
        return [await ids(prompt) for prompt in body.prompt]

    async def ids(prompt: Prompt) -> list[int]:
        return await encode_text(model, prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt

    request_id = f"cmpl-{uuid.uuid4().hex}"
    job = TextJob(model, request_id, len(body.prompt), encode)
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return await respond(request, job, options(body, limit), body, CompletionFormat(request_id, body.model))


class CompletionFormat(Format):
    """text_completion objects: the whole and the chunks have the same shape."""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return self._head | {"choices": [_choice(index, text, finish)]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": usage}

    def whole(self, texts: list[str], finishes: list[str | None], usage: dict[str, int]) -> dict[str, Any]:
        choices = [_choice(i, text, finish) for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))]
        return self._head | {"choices": choices, "usage": usage}


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
