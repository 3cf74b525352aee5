"""The request bodies, field by field: types, ranges, caps. Unknown fields are refused by name.

Fields of OpenAI's API that this server does not honour exist here too, with `only(...)`: they accept the value that
means "nothing asked for" and refuse every other in a sentence, so that nothing is silently ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
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


def only(*accepted: Any) -> Any:
    """The type of a field that is not supported: it takes these values and no others."""

    def check(value: object, info: ValidationInfo) -> object:
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            return value
        choices = " or ".join(json.dumps(one) for one in accepted)
        raise ValueError(f"'{info.field_name}' is {shown(value)}, which is not supported; accepted is {choices}")

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": list(accepted)})]


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
    include_obfuscation: only(False) = False  # type: ignore[valid-type]


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
    n: only(1, None) = 1  # type: ignore[valid-type]
    presence_penalty: only(0, None) = 0  # type: ignore[valid-type]
    frequency_penalty: only(0, None) = 0  # type: ignore[valid-type]
    logit_bias: only(None, {}) = None  # type: ignore[valid-type]

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
    best_of: only(1, None) = 1  # type: ignore[valid-type]
    echo: only(False, None) = False  # type: ignore[valid-type]
    logprobs: only(None) = None  # type: ignore[valid-type]
    suffix: only(None, "") = None  # type: ignore[valid-type]


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    """One message of a chat; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)], BeforeValidator(_content)
    ]
    name: only(None) = None  # type: ignore[valid-type]
    refusal: only(None) = None  # type: ignore[valid-type]
    audio: only(None) = None  # type: ignore[valid-type]
    annotations: only(None, []) = None  # type: ignore[valid-type]
    function_call: only(None) = None  # type: ignore[valid-type]
    tool_calls: only(None, []) = None  # type: ignore[valid-type]

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
    logprobs: only(False, None) = False  # type: ignore[valid-type]
    top_logprobs: only(None, 0) = None  # type: ignore[valid-type]
    response_format: only(None, {"type": "text"}) = None  # type: ignore[valid-type]
    tools: only(None, []) = None  # type: ignore[valid-type]
    tool_choice: only(None, "none", "auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: only(None, True, False) = None  # type: ignore[valid-type]
    functions: only(None, []) = None  # type: ignore[valid-type]
    function_call: only(None, "none", "auto") = None  # type: ignore[valid-type]
    modalities: only(None, ["text"]) = None  # type: ignore[valid-type]
    audio: only(None) = None  # type: ignore[valid-type]
    prediction: only(None) = None  # type: ignore[valid-type]
    reasoning_effort: only(None, "none") = None  # type: ignore[valid-type]
    service_tier: only(None, "auto", "default") = None  # type: ignore[valid-type]
    store: only(None, False) = None  # type: ignore[valid-type]
    metadata: only(None, {}) = None  # type: ignore[valid-type]
    web_search_options: only(None) = None  # type: ignore[valid-type]

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
