"""One choice's tokens to pieces of text: decodes, watches for stop strings, and keeps each token's logprobs beside its
text. Knows no engine, no JSON and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from server.errors import EngineUnavailableError
from server.records import SamplingParams, SequenceOutput, TokenLogprobs
from server.text.decode import IncrementalDecoder
from server.text.stop import StopStrings
from server.text.tokenizer import Spelling, Tokenizer

TextFinish = Literal["stop", "length"]
LOWEST_LOGPROB: Final = -9999.0
"""What stands for a probability of 0 or nearly so; the number is OpenAI's. JSON has no infinity."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of a choice's text with its logprob, and the likeliest tokens in its place."""

    spelling: Spelling
    offset: int
    """Where its first character is in the choice's text."""
    logprob: float | None
    """None for a prompt's first token, which nothing predicts."""
    top: tuple[tuple[Spelling, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of one choice, and the tokens that begin in it where logprobs are wanted; `finish` is on the last."""

    index: int
    text: str
    finish: TextFinish | None = None
    tokens: tuple[ScoredToken, ...] = ()


class ChoiceText:
    """The text of one choice, which begins at `offset` (behind an echoed prompt) and continues the tokens `before`."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        offset: int = 0,
        before: Sequence[int] = (),
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._params = params
        self._decoder = IncrementalDecoder(tokenizer, before)
        self._stops = StopStrings(stop, keep=keep_stop)
        self._keep_stop = keep_stop
        self.tokens = 0
        """How many the text has taken so far, with those that ended it; none of those behind a stop string."""
        self._decoded = self._given = offset
        """Ends of the text that is decoded, and of what has been given out of it."""
        self._pending: list[ScoredToken] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text, which the engine doesn't know."""
        return self._stops.stopped

    def push(self, output: SequenceOutput) -> Piece | None:
        """What an output adds, or None where that is nothing yet. Raises EngineUnavailableError for an aborted one."""
        finish = output.finish_reason
        if finish not in (None, "stop", "length"):
            raise EngineUnavailableError("the engine ended this request before it was complete")
        ids = output.token_ids
        if finish == "stop" and not self._keep_stop and ids and ids[-1] in self._params.stop_token_ids:
            ids = ids[:-1]
        text = "".join(self._read(ids, output.logprobs))
        if not self.stopped:
            self.tokens += len(output.token_ids) - len(ids)
        if finish is not None:
            text += self._stops.push(self._decoder.finish(), may_stop=self._may_stop)
            text += self._stops.finish()
        end: TextFinish | None = "stop" if self.stopped else finish
        if not text and end is None:
            return None
        self._given += len(text)
        return Piece(self._index, text, end, self._begun(all_of_them=end is not None and not self.stopped))

    @property
    def _may_stop(self) -> bool:
        return self.tokens >= self._params.min_tokens

    def _read(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Iterable[str]:
        for place, token in enumerate(ids):
            if logprobs:
                self._pending.append(scored(self._tokenizer, token, logprobs[place], self._decoded))
            self.tokens += 1
            text = self._decoder.push((token,))
            self._decoded += len(text)
            yield self._stops.push(text, may_stop=self._may_stop)
            if self.stopped:
                return

    def _begun(self, *, all_of_them: bool) -> tuple[ScoredToken, ...]:
        """The tokens that begin in the text given out, each once."""
        count = sum(1 for token in self._pending if all_of_them or token.offset < self._given)
        begun, self._pending = self._pending[:count], self._pending[count:]
        return tuple(begun)


def prompt_tokens(
    tokenizer: Tokenizer, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs], text: str | None = None
) -> tuple[ScoredToken, ...]:
    """An echoed prompt's tokens; `logprobs` are those of all but the first, `text` is the request's own, if it has one:
    that is echoed as it is written, special tokens and all, while decoding leaves those out.
    """
    places = _places(tokenizer, prompt) if text is None else _places_in(text, tokenizer, prompt)
    return tuple(
        scored(tokenizer, token, found, place)
        for token, found, place in zip(prompt, (None, *logprobs), places, strict=True)
    )


def _places(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[int]:
    """Where each token begins in the text that they are decoded to behind others."""
    decoder, places, reached = IncrementalDecoder(tokenizer, before), [], 0
    for token in ids:
        places.append(reached)
        reached += len(decoder.push((token,)))
    return places


def _places_in(text: str, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where each token begins in the text that they were encoded from: between two special tokens as decoding says."""
    places: list[int] = []
    reached = 0
    for number, (begin, end) in (tokenizer.special_spans(text) | {len(ids): (len(text), len(text))}).items():
        between = ids[len(places) : number]
        # Some tokenizers put a space before what follows a special token, as they do at the start of a text.
        starts_anew = tokenizer.decode(between) == text[reached:begin]
        before = () if starts_anew else ids[: len(places)]
        places += [reached + place for place in _places(tokenizer, between, before)]
        places.append(begin)
        reached = end
    return places[: len(ids)]


def scored(tokenizer: Tokenizer, token: int, found: TokenLogprobs | None, offset: int) -> ScoredToken:
    if found is None:
        return ScoredToken(tokenizer.spell(token), offset, None)
    top = zip(found.top_ids, found.top_logprobs, strict=True)
    return ScoredToken(
        tokenizer.spell(token),
        offset,
        max(found.logprob, LOWEST_LOGPROB),
        tuple((tokenizer.spell(one), max(logprob, LOWEST_LOGPROB)) for one, logprob in top),
    )
