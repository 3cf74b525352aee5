"""The fields that say how tokens are chosen, with their ranges: the same for both kinds of completion.

What OpenAI's API does not have is named as vLLM names it. Null means what absence means, for every field but `model`:
many clients write out all the fields they know. What needs the model to be checked (token ids, words as tokens, the
context's length) is checked in generation.py.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.api.strict import Wire
from server.records import SamplingParams
from server.sampling_ranges import MinP, Recommendations, RepetitionPenalty, Share, Temperature, TopK
from server.sentences import shown

MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_STOP_TOKENS: Final = 64
MAX_TOKENS: Final = 2**24
MAX_PENALTY: Final = 2.0
MAX_BIAS: Final = 100.0
MAX_BIASED_TOKENS: Final = 1024
MAX_ALLOWED_TOKENS: Final = 2**16
MAX_BAD_WORDS: Final = 256
MAX_BAD_WORD_CHARACTERS: Final = 256
MAX_NAME_CHARACTERS: Final = 256
MAX_SEED: Final = 2**63 - 1
MAX_CHOICES: Final = 128
MAX_TOKEN_ID: Final = 2**31 - 1
DEFAULT_TEMPERATURE: Final = 1.0


def _as_list(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


def _biases(value: object) -> object:
    """JSON's keys are strings; each must be a token id, written in the one way that makes it that key."""
    for key in value if isinstance(value, dict) else ():
        digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= len(str(MAX_TOKEN_ID))
        if not digits or str(int(key)) != key:
            raise ValueError(
                f"'logit_bias' has the key {shown(key)}; accepted are token ids as strings, such as \"17\""
            )
    return value


_STOP_STRING: Final = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA: Final = {
    "anyOf": [{"type": "null"}, _STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOPS}]
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_as_list), WithJsonSchema(_STOP_SCHEMA)
]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Biases = Annotated[dict[str, Bias], Field(max_length=MAX_BIASED_TOKENS), BeforeValidator(_biases)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARACTERS)]


class SamplingFields(Wire):
    """Which model, and how its tokens are chosen; docs/api.md says what each field does."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    max_tokens: TokenCount | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    typical_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stops = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def choices(self) -> int:
        """How many texts each prompt gets."""
        return self.n or 1

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens come with each token's logprob; None: no logprobs."""
        raise NotImplementedError

    @property
    def left_open(self) -> frozenset[str]:
        """The fields, of those that a checkpoint may recommend, that this request does not give."""
        return frozenset(name for name in Recommendations.model_fields if getattr(self, name) is None)

    def params(self) -> SamplingParams:
        """What can be said without the model: `max_tokens`, bad words and the model's own stop ids are still open."""
        return SamplingParams(
            max_tokens=1,
            min_tokens=self.min_tokens or 0,
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            typical_p=1.0 if self.typical_p is None else self.typical_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.wanted_logprobs,
        )
