"""The request bodies, field by field: types, ranges, caps. Unknown fields are refused by name.

Fields of OpenAI's API that this server does not honour exist here too, with `only(...)`: they accept the value that
means "nothing asked for" and refuse every other in a sentence, so that nothing is silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from server.api.sampling_fields import (
    MAX_CHOICES,
    MAX_NAME_CHARACTERS,
    MAX_TOKEN_ID,
    MAX_TOKENS,
    SamplingFields,
    TokenCount,
)
from server.api.strict import Wire, only
from server.records import MAX_TIMEOUT_SECONDS, MAX_TOP_LOGPROBS
from server.sentences import listed, shown

MAX_PROMPTS: Final = 32
MAX_MESSAGES: Final = 4096
MAX_PARTS: Final = 1024
MAX_PRIORITY: Final = 100
MAX_COMPLETION_LOGPROBS: Final = 5
"""Of /v1/completions; the number is OpenAI's, as MAX_TOP_LOGPROBS is for chats."""
DEFAULT_COMPLETION_TOKENS: Final = 16
"""What /v1/completions generates at most where max_tokens is not given; the number is OpenAI's."""

Prompt = str | list[int]


def _content(value: object) -> object:
    if not isinstance(value, str | list):
        raise ValueError(f"'content' is {shown(value)}; accepted are a string or a list of text parts")
    if isinstance(value, str):
        _require_characters("content", value)
        return value
    for index, part in enumerate(value):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            _require_characters(f"content[{index}].text", part["text"])
    return value


def _require_characters(name: str, text: str) -> None:
    """Refuses halves of UTF-16 pairs, which JSON can hold, and no tokenizer or answer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name!r} holds half of a surrogate pair, U+{ord(text[error.start]):04X} at {error.start}; "
            "accepted are whole characters"
        ) from None


def _prompts(value: object) -> list[Prompt]:
    """The four shapes of `prompt` as a list of texts or token sequences."""
    if isinstance(value, str):
        _require_characters("prompt", value)
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
        if isinstance(item, str):
            _require_characters(f"prompt[{index}]", item)
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


_PROMPT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}, "minItems": 1},
        {
            "type": "array",
            "items": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
                "minItems": 1,
            },
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
    ]
}


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = only(False, None)


Unused = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)] | None
"""Says who asks, or helps a service of many servers to find its cache: taken, and not used."""


class Sampling(SamplingFields):
    """What both kinds of completion share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)] | None = None
    user: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Any = only(None, "in_memory", "in-memory")
    prompt_cache_options: Any = only(None)
    moderation: Any = only(None)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is given, and accepted only with stream: true")
        if self.usage_in_every_chunk and not self.usage_at_the_end:
            raise ValueError(
                "'stream_options.continuous_usage_stats' is true, and accepted only with include_usage: true"
            )
        return self

    @property
    def usage_at_the_end(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    suffix: Any = only(None, "")

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError(
                f"'best_of' is {self.best_of} and 'n' is {self.choices}; accepted is a best_of that equals n, because "
                "nothing is generated that is not returned"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' is 0, and accepted only with echo: true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


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
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
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
    verbosity: Any = only(None, "medium")
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
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"'top_logprobs' is {self.top_logprobs}, and accepted only with logprobs: true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens
