"""POST /v1/completions: n choices per prompt, as JSON or as a stream of events."""

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
from server.api.wire import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from server.records import ModelInfo

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(
    request: Request, body: CompletionRequest, service: Annotated[Service, Depends(get_service)]
) -> Response:
    """Continues each prompt. Refused with 400 (a field), 404 (the model), 429 (full), 503 (the engine)."""
    origin = origin_of(request)
    model = service.model(body.model)

    async def encode(info: ModelInfo) -> list[Prompt]:
        return [await one(info, prompt) for prompt in body.prompt]

    async def one(info: ModelInfo, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(await encode_text(model, info, prompt, add_special_tokens=True), prompt)
        return Prompt(prompt)

    request_id = f"cmpl-{uuid.uuid4().hex}"
    asked = options(
        body, body.max_tokens, tenant=tenant_of(request), default_limit=DEFAULT_COMPLETION_TOKENS, echo=bool(body.echo)
    )
    job = TextJob(model, request_id, len(body.prompt), encode, asked, origin)
    scored = body.wanted_logprobs is not None
    return await respond(request, job, body, CompletionFormat(request_id, body.model, scored=scored))


class CompletionFormat(Format):
    """text_completion objects: the whole and the chunks have the same shape."""

    def __init__(self, request_id: str, model: str, *, scored: bool) -> None:
        self._head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._scored = scored

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        return self._head | {"choices": [_choice(index, text, _logprobs(tokens) if tokens else None, finish)]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        written = [
            _choice(index, choice.text, _logprobs(choice.tokens) if self._scored else None, choice.finish)
            for index, choice in enumerate(choices)
        ]
        return self._head | {"choices": written, "usage": usage}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    return {
        "tokens": [token.spelling.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_candidates(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _candidates(token: ScoredToken) -> dict[str, float] | None:
    """The likeliest tokens, and the token itself where it is not among them; of two with the same text the likelier."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for spelling, logprob in (*token.top, (token.spelling, token.logprob)):
        found.setdefault(spelling.text, logprob)
    return found
