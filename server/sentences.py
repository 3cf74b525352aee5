"""Turns pydantic's error details into one sentence: what was wrong, with the value, and what is accepted.

Shared by the configuration (server/config.py) and the request bodies (server/api/errors.py). It knows no wire format.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

_SHOWN_CHARACTERS: Final = 80


_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = _repr.maxlong = _SHOWN_CHARACTERS


def shown(value: object) -> str:
    """A value as an error message quotes it: its repr, cut to fit a sentence, however long or deep the value is."""
    text = _repr.repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def listed(names: Iterable[str]) -> str:
    """Names as a sentence lists them, in their own order."""
    return ", ".join(names)


def location(parts: Iterable[int | str]) -> str:
    """('messages', 0, 'content') -> messages[0].content"""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def describe(detail: Mapping[str, Any], name: str, accepted: Iterable[str]) -> str:
    """One pydantic ErrorDetails as a sentence about `name`; `accepted` are the keys that exist beside it."""
    kind, message = detail["type"], str(detail["msg"])
    if kind == "extra_forbidden":
        return f"{name!r} is not known; accepted are {listed(accepted)}"
    if kind == "missing":
        return f"{name!r} is missing, and required"
    if kind in ("value_error", "assertion_error"):
        return message.split(", ", 1)[-1]
    message = message[:1].lower() + message[1:]
    message = message.replace("input should be", "it must be").replace("input should", "it must")
    return f"{name!r} is {shown(detail['input'])}; {message}"
