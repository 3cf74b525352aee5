"""POST /v1/chat/completions: the model's chat template, then one choice, as JSON or as a stream of events."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.generation import TextJob, encode_text
from server.api.respond import Format, options, respond
from server.api.service import Service, get_service
from server.api.wire import ChatRequest
from server.errors import RequestError

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(
    request: Request, body: ChatRequest, service: Annotated[Service, Depends(get_service)]
) -> Response:
    """Answers a chat. Refused with 400 (a field), 404 (the model), 429 (full), 503 (the engine)."""
    model = service.model(body.model)

    async def encode() -> list[list[int]]:
        if model.template is None:
            raise RequestError(
                f"model {model.name!r} has no chat template; accepted are plain prompts on /v1/completions",
                param="model",
            )
        messages = [message.plain() for message in body.messages]
        text = await asyncio.to_thread(model.template.render, messages)
        return [await encode_text(model, text, add_special_tokens=False)]

    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    job = TextJob(model, request_id, 1, encode)
    return await respond(request, job, options(body, body.limit), body, ChatFormat(request_id, body.model))


class ChatFormat(Format):
    """chat.completion objects, and chat.completion.chunk objects that open with the role."""

    def __init__(self, request_id: str, model: str) -> None:
        self._id, self._model, self._created = request_id, model, int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": choices}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk([_delta(index, {"role": "assistant", "content": ""}, None)])

    def chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return self._chunk([_delta(index, {"content": text} if text else {}, finish)])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage}

    def whole(self, texts: list[str], finishes: list[str | None], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish,
            }
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return self._head("chat.completion") | {"choices": choices, "usage": usage}


def _delta(index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
