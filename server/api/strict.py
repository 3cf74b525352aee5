"""The base of every request body: unknown fields are refused by name, and so is a value that would not be honoured."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from server.sentences import shown


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_only(cls, value: Any, info: ValidationInfo) -> Any:
        """What `only` promises; the schema is the rule."""
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        accepted = extra.get("enum") if isinstance(extra, dict) else None
        if not isinstance(accepted, list):
            return value
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            return value
        choices = " or ".join(map(json.dumps, accepted))
        raise ValueError(f"'{info.field_name}' is {shown(value)}, which is not supported; accepted is {choices}")


def only(*accepted: Any) -> Any:
    """A field that is not supported: it takes these values and no others; the first is its default."""
    return Field(default=accepted[0], json_schema_extra={"enum": list(accepted)})
