"""From a checked request to pieces of text: admit, encode, generate, one choice beside the other.

What a choice's tokens become is choice.py's. Knows no JSON and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import msgspec

from server.api.choice import ChoiceText, Piece, ScoredToken, prompt_tokens
from server.api.served import ServedModel
from server.engine.client import EngineClient
from server.engine.stream import Origin
from server.errors import EngineUnavailableError, OverloadedError, RequestError, UnforeseenError
from server.records import ModelInfo, SamplingParams, TokenLogprobs
from server.text.bad_words import bad_word_ids
from server.text.threads import in_text_thread

MAX_IDS: Final = 2**22
"""Token ids of a request, counted once for every choice: what the engine holds of it takes 36 bytes for each."""


class Prompt(NamedTuple):
    ids: list[int]
    text: str | None = None
    """As the request has it; None where it has token ids."""


@dataclass(frozen=True)
class Options:
    """How text is generated, and when."""

    limit: int | None
    """Tokens at most, as the request has it: more than the context has room for is refused. 0 means that only the
    prompt is wanted, and None that it is for the server to say.
    """
    sampling: SamplingParams
    """For every choice, but for what depends on the model, on the prompt, and on which of a prompt's choices it is."""
    left_open: frozenset[str] = frozenset()
    """Fields of `sampling` that the request does not give: what the model recommends for them takes their place."""
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    """Whether what ended a text, a stop string or a stop token, is part of it."""
    default_limit: int | None = None
    """Tokens at most where there is no `limit` and the context has room for them; None takes all of its room."""
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    choices: int = 1
    """Texts for each prompt."""
    echo: bool = False
    """Whether each text begins with its prompt."""
    priority: int = 0
    timeout: float | None = None
    """Seconds from the request's arrival to its last token; None takes the server's."""
    cache_salt: str = ""


class TextJob:
    """One HTTP request's generation: `options.choices` choices per prompt, all counted together.

    `encode` gives the `count` prompts; it is called after admission, because it is work too.
    """

    def __init__(
        self,
        model: ServedModel,
        request_id: str,
        count: int,
        encode: Callable[[ModelInfo], Awaitable[list[Prompt]]],
        options: Options,
        origin: Origin,
    ) -> None:
        self._model = model
        self._origin = origin
        self._id = request_id
        self._count = count * options.choices
        self._encode = encode
        self._options = options
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._deadline: float | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come. Closing the generator aborts what still runs. Raises RequestError."""
        try:
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        except RequestError as error:
            self._model.metrics.failed(error)
            raise
        except Exception:
            self._model.metrics.failed(UnforeseenError())
            raise

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        timeout = self._model.timeout if self._options.timeout is None else self._options.timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        with self._place() as (engine, info):
            prompts, banned = await self._model.prepared(self._prepare(info), self._count, self._deadline)
            params = [sampling(prompt.ids, self._options, banned, info) for prompt in prompts]
            self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
            _check_size(prompts, params, self._options.choices)
            runs = [
                run
                for place, (prompt, param) in enumerate(zip(prompts, params, strict=True))
                for run in self._choices(engine, place, prompt, param, info)
            ]
            async with contextlib.aclosing(runs[0] if len(runs) == 1 else _merged(runs)) as merged:
                async for piece in merged:
                    yield piece

    async def _prepare(self, info: ModelInfo) -> tuple[list[Prompt], tuple[tuple[int, ...], ...]]:
        """The prompts, and the bad words as token sequences."""
        prompts, words = await self._encode(info), self._options.bad_words
        return prompts, await in_text_thread(bad_word_ids, self._model.tokenizer, words) if words else ()

    @contextlib.contextmanager
    def _place(self) -> Iterator[tuple[EngineClient, ModelInfo]]:
        """A place among the model's open requests, and the engine that serves them: no later one gets what is prepared
        for it. A refusal is counted by its reason.
        """
        model = self._model
        with contextlib.ExitStack() as stack:
            try:
                loaded = model.require_ready()
                stack.enter_context(model.admission.enter(self._count, model.client.owed_requests))
            except (OverloadedError, EngineUnavailableError) as error:
                model.metrics.rejected(error)
                raise
            yield model.client, loaded.info

    def _choices(
        self, engine: EngineClient, place: int, prompt: Prompt, params: SamplingParams, info: ModelInfo
    ) -> list[AsyncGenerator[Piece, None]]:
        """All choices of one prompt, the `place`-th."""
        count = self._options.choices
        echo: asyncio.Future[tuple[ScoredToken, ...]] = asyncio.get_running_loop().create_future()
        head = () if info.is_encoder_decoder else prompt.ids
        return [
            self._choice(engine, count * place + which, prompt, nth_choice(params, which), echo, head)
            for which in range(count)
        ]

    async def _choice(
        self,
        engine: EngineClient,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        echo: asyncio.Future[tuple[ScoredToken, ...]],
        head: Sequence[int],
    ) -> AsyncGenerator[Piece, None]:
        """`echo` are the prompt's tokens: its first choice has them scored, the others wait for that. `head` are the
        tokens that the text continues.
        """
        options, tokenizer = self._options, self._model.tokenizer
        echoed = self._echoed(prompt)
        text = ChoiceText(
            index, tokenizer, params, stop=options.stop, keep_stop=options.keep_stop, offset=len(echoed),
            before=head,
        )  # fmt: skip
        logprobs: list[TokenLogprobs] = []
        opening = options.echo
        with engine.generate(
            f"{self._id}-{index}",
            prompt.ids,
            params,
            priority=options.priority,
            deadline=self._deadline,
            cache_salt=options.cache_salt,
            origin=self._origin,
        ) as stream:
            async for output in stream:
                logprobs += output.prompt_logprobs
                if index % options.choices == 0:  # as the prompt's own tokens, which count once
                    self.cached_tokens += output.cached_tokens
                if opening and output.token_ids:  # by the first token all of the prompt has been scored
                    opening = False
                    if params.prompt_logprobs is not None:
                        scored = await in_text_thread(prompt_tokens, tokenizer, prompt.ids, logprobs, prompt.text)
                        echo.set_result(scored)
                    tokens = () if options.sampling.logprobs is None else await echo
                    yield Piece(index, echoed, "length" if options.limit == 0 else None, tokens)
                    if options.limit == 0:
                        return
                before = text.tokens
                piece = text.push(output)
                self.completion_tokens += text.tokens - before
                if piece is not None:
                    yield piece
                if text.stopped:
                    stream.close("stop")
                    return

    def _echoed(self, prompt: Prompt) -> str:
        if not self._options.echo:
            return ""
        return self._model.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text


def sampling(
    prompt: Sequence[int], options: Options, banned: tuple[tuple[int, ...], ...], info: ModelInfo
) -> SamplingParams:
    """What the engine is told of a prompt's first choice; `banned` are the bad words as token sequences.

    Raises RequestError when prompt and completion are longer than the context, and for tokens the model has not.
    """
    if options.echo and info.is_encoder_decoder:
        raise RequestError(
            f"'echo' is true, and answers of an encoder-decoder ({info.architecture}) do not continue their prompt; "
            "accepted is false",
            param="echo",
        )
    room = _room(prompt, options, info)
    limit = _default_limit(room, options) if options.limit is None else options.limit
    if options.sampling.min_tokens > limit:
        raise RequestError(
            f"'min_tokens' is {options.sampling.min_tokens}, and at most {limit} tokens are generated here; "
            f"accepted are 0 to {limit}",
            param="min_tokens",
        )
    _check_ids("prompt", prompt, info)
    asked = options.sampling
    recommended = {name: value for name, value in info.sampling_defaults.items() if name in options.left_open}
    params = msgspec.structs.replace(
        asked,
        **recommended,
        max_tokens=max(1, limit),  # the engine always draws; what only a prompt was asked for throws away
        stop_token_ids=asked.stop_token_ids + (() if options.ignore_eos else info.eos_token_ids),
        bad_words=banned,
        prompt_logprobs=asked.logprobs if options.echo else None,
    )
    _check_ids("logit_bias", [token for token, _ in params.logit_bias], info)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), info)
    _check_ids("stop_token_ids", asked.stop_token_ids, info)
    _check_a_token_is_left(params)
    return params


def _room(prompt: Sequence[int], options: Options, info: ModelInfo) -> int:
    """How many tokens may follow the prompt; raises RequestError where that is none, or fewer than are asked for."""
    room = info.room(len(prompt))
    if not prompt:
        raise RequestError("the prompt has no tokens; accepted is at least 1", param="prompt")
    if room < 1:
        accepted = (
            f"of at most {info.max_model_len}" if info.is_encoder_decoder else "that leaves room for at least 1 token"
        )
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, and the model's context holds {info.max_model_len}; "
            f"accepted is a prompt {accepted}",
            param="prompt",
        )
    if options.limit is not None and options.limit > room:
        together = f", together {len(prompt) + options.limit}, and the model's context holds {info.max_model_len}"
        alone = f"; an answer of this encoder-decoder may have {room}, whatever its prompt is"
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {options.limit}"
            + (alone if info.is_encoder_decoder else together),
            param="max_tokens",
        )
    return room


def _default_limit(room: int, options: Options) -> int:
    return room if options.default_limit is None else min(room, options.default_limit)


def _check_ids(field: str, tokens: Sequence[int], info: ModelInfo) -> None:
    bad = next((token for token in tokens if token >= info.vocab_size), None)
    if bad is not None:
        raise RequestError(f"{field!r} holds token id {bad}; accepted are 0 to {info.vocab_size - 1}", param=field)


def _check_size(prompts: Sequence[Prompt], params: Sequence[SamplingParams], choices: int) -> None:
    """Every choice is a request of its own to the engine, with all token ids that its prompt and its fields have."""
    ids = sum(len(prompt.ids) + param.listed_tokens for prompt, param in zip(prompts, params, strict=True))
    if ids > MAX_IDS:
        raise RequestError(
            f"the request's prompts and the token ids and words that it lists are {ids:,} token ids; accepted are "
            f"{MAX_IDS:,}",
            param="prompt",
        )
    if choices * ids > MAX_IDS:
        raise RequestError(
            f"the request's prompts and the token ids and words that it lists are {ids:,} token ids for each of its "
            f"{choices} choices; accepted are {MAX_IDS:,} in all, so 'n' of at most {MAX_IDS // ids}",
            param="n",
        )


def _check_a_token_is_left(params: SamplingParams) -> None:
    if params.allowed_token_ids is None:
        return
    ruled_out = {word[0] for word in params.bad_words if len(word) == 1}
    if params.min_tokens:
        ruled_out |= set(params.stop_token_ids)
    if ruled_out.issuperset(params.allowed_token_ids):
        raise RequestError(
            "'allowed_token_ids' holds only tokens that bad_words or min_tokens rule out; accepted is one more",
            param="allowed_token_ids",
        )


def nth_choice(params: SamplingParams, which: int) -> SamplingParams:
    """The first choice is as asked; the others count on from its seed, and have no prompt scored once more."""
    if which == 0:
        return params
    seed = None if params.seed is None else params.seed + which
    return msgspec.structs.replace(params, seed=seed, prompt_logprobs=None)


async def encode_text(model: ServedModel, info: ModelInfo, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids, made in a thread; a text that is too long whatever its tokens are is refused before that."""
    tokenizer, limit = model.tokenizer, info.max_model_len
    at_least = tokenizer.at_least(text)
    if at_least > limit:
        raise RequestError(
            f"the prompt has at least {at_least} tokens, and the model's context holds {limit}", param="prompt"
        )
    return await in_text_thread(partial(tokenizer.encode, text, add_special_tokens=add_special_tokens))


async def _merged(runs: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of several generators, in the order of their arrival; the first failure ends all."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=2 * len(runs))

    async def drain(run: AsyncGenerator[Piece, None]) -> None:
        async with contextlib.aclosing(run):
            try:
                async for piece in run:
                    await queue.put(piece)
            except Exception as error:
                await queue.put(error)
            else:
                await queue.put(None)

    tasks = [asyncio.create_task(drain(run)) for run in runs]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
