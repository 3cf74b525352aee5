"""POST /v1/chat/completions: the model's chat template, then n choices, as JSON or as a stream of events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.choice import ScoredToken
from server.api.generation import Prompt, TextJob, encode_text
from server.api.middleware import tenant_of
from server.api.respond import Choice, Format, options, respond
from server.api.service import Service, get_service
from server.api.tracing import origin_of
from server.api.wire import ChatRequest
from server.errors import RequestError
from server.records import ModelInfo
from server.text.threads import in_text_thread
from server.text.tokenizer import Spelling

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(
    request: Request, body: ChatRequest, service: Annotated[Service, Depends(get_service)]
) -> Response:
    """Answers a chat. Refused with 400 (a field), 404 (the model), 429 (full), 503 (the engine)."""
    origin = origin_of(request)
    model = service.model(body.model)

    async def encode(info: ModelInfo) -> list[Prompt]:
        if model.template is None:
            raise RequestError(
                f"model {model.name!r} has no chat template; accepted are plain prompts on /v1/completions",
                param="model",
            )
        messages = [message.plain() for message in body.messages]
        text = await in_text_thread(model.template.render, messages)
        return [Prompt(await encode_text(model, info, text, add_special_tokens=False), text)]

    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    job = TextJob(model, request_id, 1, encode, options(body, body.limit, tenant=tenant_of(request)), origin)
    scored = body.wanted_logprobs is not None
    return await respond(request, job, body, ChatFormat(request_id, body.model, scored=scored))


class ChatFormat(Format):
    """chat.completion objects, and chat.completion.chunk objects that open with the role."""

    def __init__(self, request_id: str, model: str, *, scored: bool) -> None:
        self._id, self._model, self._created = request_id, model, int(time.time())
        self._scored = scored

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": choices}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk([_delta(index, {"role": "assistant", "content": ""}, None, None)])

    def chunk(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return self._chunk([_delta(index, delta, _logprobs(tokens) if tokens else None, finish)])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        written = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _logprobs(choice.tokens) if self._scored else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return self._head("chat.completion") | {"choices": written, "usage": usage}


def _delta(index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    content = [
        _token(token.spelling, token.logprob) | {"top_logprobs": [_token(*candidate) for candidate in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(spelling: Spelling, logprob: float | None) -> dict[str, Any]:
    return {"token": spelling.text, "bytes": list(spelling.data), "logprob": logprob}
