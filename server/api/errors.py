"""Every refusal as OpenAI's error body: {"error": {"message", "type", "param", "code"}}, one sentence each.

The statuses are in server/errors.py; this file only writes them on the wire. What nobody expected becomes a 500 without
details, and its traceback goes to the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.errors import PathNotFoundError, RequestError, UnforeseenError
from server.sentences import describe, location

log = logging.getLogger(__name__)


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON object that clients of OpenAI's API expect for an error."""
    fields: dict[str, Any] = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": fields | dict(error.details)}


def error_response(error: RequestError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Makes every error of the app an OpenAI error body."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    return error_response(error if isinstance(error, RequestError) else UnforeseenError())


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    details = error.errors() if isinstance(error, RequestValidationError) else ()
    return error_response(invalid_request(details, _model_at_fault(request, details)))


async def _http(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    refusals = {
        404: PathNotFoundError(request.url.path),
        405: RequestError(f"{request.method} is not accepted on {request.url.path!r}"),
    }
    body = error_body(refusals.get(status) or RequestError("the request body is not JSON that can be read"))
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse(body, status_code=status, headers=dict(headers) if headers else None)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(UnforeseenError())


def invalid_request(details: Sequence[Any], model: type[BaseModel] | None) -> RequestError:
    """The first of pydantic's complaints as a sentence that names the field."""
    if not details:
        return RequestError("the request is not accepted")
    # A union reports a complaint per member; the one that got furthest into the body is about what was meant.
    detail = max(details, key=lambda one: len(one["loc"]))
    path = [part for part in detail["loc"] if part not in ("body", "query", "path")]
    if detail["type"] == "json_invalid":
        problem = detail.get("ctx", {}).get("error", "malformed")
        position = path[0] if path else 0
        return RequestError(f"the request body is not valid JSON at character {position}: {problem}")
    if not path and detail["type"] != "value_error":
        return RequestError("the request body must be a JSON object, sent with Content-Type: application/json")
    fields, accepted = _walk(model, path)
    param = location(fields)
    return RequestError(describe(detail, param, accepted), param=param or None)


def _walk(model: type[BaseModel] | None, path: Sequence[int | str]) -> tuple[list[int | str], Sequence[str]]:
    """The path without the names pydantic gives to a union's members, and the fields beside its last part."""
    current: Any = model
    fields: list[int | str] = []
    accepted: Sequence[str] = list(model.model_fields) if model is not None else []
    for number, part in enumerate(path):
        known = isinstance(part, int) or current is None or part in current.model_fields
        if known or (number == len(path) - 1 and not _is_member(part)):
            fields.append(part)
        if isinstance(part, str) and current is not None:
            accepted = list(current.model_fields)
            field = current.model_fields.get(part)
            if field is not None:
                current = _nested_model(field.annotation) or current
    return fields, accepted


def _is_member(part: int | str) -> bool:
    """Whether a part of a path is a union member's name, such as str or list[TextPart]."""
    return part in ("str", "int", "float", "bool") or str(part).startswith(("list[", "function-", "constrained-"))


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Model`, `list[Model]` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_nested_model(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)


def _model_at_fault(request: Request, details: Sequence[Any]) -> type[BaseModel] | None:
    """What describes the body, or the query where that is what the first complaint is about."""
    route = request.scope.get("route")
    field = getattr(route, "body_field", None)
    if details and details[0]["loc"][0] == "query":
        field = next(iter(route.dependant.query_params), None) if isinstance(route, APIRoute) else None
    return _nested_model(getattr(getattr(field, "field_info", None), "annotation", None))
