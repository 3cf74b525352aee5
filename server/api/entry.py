"""One entry of models.yaml as the body of a request: how it is documented, and how it becomes a config.

What an entry may hold, and what is wrong with one, is config.py's.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Body, Depends

from server.api.service import Service, get_service
from server.config import ModelConfig, load_entry
from server.errors import ConfigError, load_refusal

ENTRY_BODY: Final = {"requestBody": {"content": {"application/json": {"schema": ModelConfig.model_json_schema()}}}}
"""For `openapi_extra` of a route whose body is read by `requested_entry`."""


def requested_entry(
    entry: Annotated[dict[str, Any], Body()], service: Annotated[Service, Depends(get_service)]
) -> ModelConfig:
    """The body, checked as an entry of models.yaml is; a dependency. Raises RequestError for a bad one."""
    try:
        return load_entry(entry, "the request body", service.config.folder)
    except ConfigError as error:
        raise load_refusal(error) from error
