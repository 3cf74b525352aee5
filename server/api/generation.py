"""From a checked request to pieces of text: admit, encode, generate, decode, stop. Knows no JSON and no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from server.api.service import ServedModel
from server.errors import EngineUnavailableError, OverloadedError, RequestError
from server.records import ModelInfo, SamplingParams
from server.text.decode import IncrementalDecoder
from server.text.stop import StopStrings

TextFinish = Literal["stop", "length"]


@dataclass(frozen=True)
class Options:
    """How text is generated; `limit` None means as long as the context allows."""

    limit: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool


@dataclass(frozen=True)
class Piece:
    """New text of one choice; `finish` is set on its last piece."""

    index: int
    text: str
    finish: TextFinish | None = None


class TextJob:
    """One HTTP request's generation: one choice per prompt, all counted together.

    `encode` gives the prompts' token ids; it is called after admission, because it is work too.
    """

    def __init__(
        self, model: ServedModel, request_id: str, count: int, encode: Callable[[], Awaitable[list[list[int]]]]
    ) -> None:
        self._model = model
        self._id = request_id
        self._count = count
        self._encode = encode
        self.prompt_tokens = 0
        self.completion_tokens = 0

    async def pieces(self, options: Options) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come. Closing the generator aborts what still runs. Raises RequestError."""
        model = self._model
        with self._place():
            prompts = await self._encode()
            params = [sampling(prompt, options, model.info) for prompt in prompts]
            self.prompt_tokens = sum(map(len, prompts))
            runs = [
                self._choice(index, prompt, param, options.stop)
                for index, (prompt, param) in enumerate(zip(prompts, params, strict=True))
            ]
            async with contextlib.aclosing(runs[0] if len(runs) == 1 else _merged(runs)) as merged:
                async for piece in merged:
                    yield piece

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the model's open requests; a refusal is counted by its reason."""
        model = self._model
        with contextlib.ExitStack() as stack:
            try:
                model.client.require_ready()
                stack.enter_context(model.admission.enter(self._count))
            except OverloadedError:
                model.metrics.rejected("overloaded")
                raise
            except EngineUnavailableError:
                model.metrics.rejected("unavailable")
                raise
            yield

    async def _choice(
        self, index: int, prompt: list[int], params: SamplingParams, stop: Sequence[str]
    ) -> AsyncGenerator[Piece, None]:
        model = self._model
        decoder, stops = IncrementalDecoder(model.tokenizer), StopStrings(stop)
        with model.client.generate(f"{self._id}-{index}", prompt, params) as stream:
            async for output in stream:
                ids, finish = output.token_ids, output.finish_reason
                self.completion_tokens += len(ids)
                if finish == "stop" and ids and ids[-1] in params.stop_token_ids:
                    ids = ids[:-1]
                text = stops.push(decoder.push(ids))
                if finish is not None:
                    text += stops.push(decoder.finish())
                if stops.stopped:
                    stream.close("stop")
                    yield Piece(index, text, "stop")
                    return
                if finish is not None:
                    if finish not in ("stop", "length"):
                        raise EngineUnavailableError("the engine ended this request before it was complete")
                    yield Piece(index, text + stops.finish(), "stop" if finish == "stop" else "length")
                    return
                if text:
                    yield Piece(index, text)


def sampling(prompt: Sequence[int], options: Options, info: ModelInfo) -> SamplingParams:
    """What the engine is told; raises RequestError when prompt and completion are longer than the context."""
    room = info.max_model_len - len(prompt)
    if not prompt:
        raise RequestError("the prompt has no tokens; accepted is at least 1", param="prompt")
    if room < 1:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, and the model's context holds {info.max_model_len}; "
            "accepted is a prompt that leaves room for at least 1 token",
            param="prompt",
        )
    if options.limit is not None and options.limit > room:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {options.limit}, together "
            f"{len(prompt) + options.limit}, and the model's context holds {info.max_model_len}",
            param="max_tokens",
        )
    bad = next((token for token in prompt if token >= info.vocab_size), None)
    if bad is not None:
        raise RequestError(f"the prompt holds token id {bad}; accepted are 0 to {info.vocab_size - 1}", param="prompt")
    return SamplingParams(
        max_tokens=room if options.limit is None else options.limit,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop_token_ids=() if options.ignore_eos else info.eos_token_ids,
    )


async def encode_text(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids, made in a thread; a text that is too long whatever its tokens are is refused before that."""
    tokenizer, limit = model.tokenizer, model.info.max_model_len
    at_least = tokenizer.at_least(text)
    if at_least > limit:
        raise RequestError(
            f"the prompt has at least {at_least} tokens, and the model's context holds {limit}", param="prompt"
        )
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


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
