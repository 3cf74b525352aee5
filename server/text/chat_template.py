"""Renders a chat with the model's own template, in jinja2's sandbox and with the names transformers offers templates.

The template comes from the operator's checkpoint, never from a request; the messages come from the request and are
plain strings. A template's raise_exception becomes a RequestError with its sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import RequestError, UnusableCheckpointError
from server.text.generation_tag import GenerationTag
from server.text.tokenizer import Tokenizer, read_json

TEMPLATE_FILE: Final = "chat_template.jinja"


class ChatTemplate:
    """One model's compiled template; `render` is safe in several threads."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UnusableCheckpointError(f"the chat template is not valid: {error}") from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for these messages, up to where the assistant's answer begins. Raises RequestError."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RequestError(
                f"the model's chat template can't render these messages: {error}", param="messages"
            ) from error


def load_chat_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template beside a checkpoint, or None where it has none.

    Raises UnusableCheckpointError for one that is not valid.
    """
    source = _template_source(path, tokenizer.settings)
    if source is None:
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    texts = {name: tokenizer.settings.get(name) for name in names}
    variables = {k: v["content"] if isinstance(v, dict) else str(v) for k, v in texts.items() if v is not None}
    return ChatTemplate(source, variables)


def _template_source(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(path / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UnusableCheckpointError(
            f"the chat template in {str(path)!r} is a {type(template).__name__}; accepted is a string"
        )
    return template


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escaping for HTML, with the options transformers gives it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
