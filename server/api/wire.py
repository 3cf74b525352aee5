"""The request bodies, field by field: types, ranges, caps. Unknown fields are refused by name.

Fields of OpenAI's API that this server does not honour exist here too, with `only(...)`: they accept the value that
means "nothing asked for" and refuse every other in a sentence, so that nothing is silently ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from server.sentences import listed, shown

MAX_PROMPTS: Final = 32
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_MESSAGES: Final = 4096
MAX_PARTS: Final = 1024
MAX_TOKENS: Final = 2**24
MAX_TOP_K: Final = 2**20
MAX_TEMPERATURE: Final = 2.0
MAX_NAME_CHARACTERS: Final = 256
MAX_SEED: Final = 2**63 - 1
DEFAULT_COMPLETION_TOKENS: Final = 16
"""What /v1/completions generates where max_tokens is not given; the number is OpenAI's."""

Prompt = str | list[int]


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


def _as_list(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


def _content(value: object) -> object:
    if not isinstance(value, str | list):
        raise ValueError(f"'content' is {shown(value)}; accepted are a string or a list of text parts")
    return value


def _prompts(value: object) -> list[Prompt]:
    """The four shapes of `prompt` as a list of texts or token sequences."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"'prompt' is {shown(value)}; accepted are a string, a list of strings, a list of token ids, "
            "or a list of such lists"
        )
    if all(_is_token(item) for item in value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"'prompt' has {len(value)} entries; accepted are at most {MAX_PROMPTS}")
    for index, item in enumerate(value):
        tokens = isinstance(item, list) and item and all(_is_token(token) for token in item)
        if not isinstance(item, str) and not tokens:
            raise ValueError(f"'prompt[{index}]' is {shown(item)}; accepted are a string or a list of token ids")
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


_PROMPT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1},
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
    ]
}
_STOP_STRING: Final = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA: Final = {
    "anyOf": [{"type": "null"}, _STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOPS}]
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_as_list), WithJsonSchema(_STOP_SCHEMA)
]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: Any = only(False)


class Sampling(Wire):
    """What both kinds of completion share."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stops = []
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)] | None = None
    n: Any = only(1, None)
    presence_penalty: Any = only(0, None)
    frequency_penalty: Any = only(0, None)
    logit_bias: Any = only(None, {})

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is given, and accepted only with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    best_of: Any = only(1, None)
    echo: Any = only(False, None)
    logprobs: Any = only(None)
    suffix: Any = only(None, "")


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    """One message of a chat; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)], BeforeValidator(_content)
    ]
    name: Any = only(None)
    refusal: Any = only(None)
    audio: Any = only(None)
    annotations: Any = only(None, [])
    function_call: Any = only(None)
    tool_calls: Any = only(None, [])

    def plain(self) -> dict[str, str]:
        """What the chat template sees: a role and one string."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: Any = only(False, None)
    top_logprobs: Any = only(None, 0)
    response_format: Any = only(None, {"type": "text"})
    tools: Any = only(None, [])
    tool_choice: Any = only(None, "none", "auto")
    parallel_tool_calls: Any = only(None, True, False)
    functions: Any = only(None, [])
    function_call: Any = only(None, "none", "auto")
    modalities: Any = only(None, ["text"])
    audio: Any = only(None)
    prediction: Any = only(None)
    reasoning_effort: Any = only(None, "none")
    service_tier: Any = only(None, "auto", "default")
    store: Any = only(None, False)
    metadata: Any = only(None, {})
    web_search_options: Any = only(None)

    @model_validator(mode="after")
    def _check_limits(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(
                f"'max_tokens' is {both[0]} and 'max_completion_tokens' is {both[1]}; accepted is one of "
                f"{listed(('max_tokens', 'max_completion_tokens'))}"
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens
