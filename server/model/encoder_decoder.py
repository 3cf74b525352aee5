"""The runner for encoder-decoders, T5 above all: an encoder reads the prompt once, and a decoder writes the answer.

A sequence is its prompt, then what the decoder begins after, then the answer; each token has its place in the pages:

    tokens     p0 p1 p2 p3 | start a0 a1 a2 ...
    pages      cross-attention's keys and values of p0..p3 | self-attention's of start a0 a1 ...

So neither the scheduler nor the plan has to know of two kinds of keys, which are equally large. An encoder looks ahead:
a prompt that comes in chunks is kept until its last one is there, and then computed at once; the same after a
preemption, with the answer so far. Nothing of it can be shared: a token's keys depend on all of the prompt. Decodes
share calls as cache_runner.py's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from server.model.batch import Chunk, StepError
from server.model.cache_runner import CacheRunner, Rows, groups
from server.model.gather import Gather, Span
from server.model.paged_cache import PagedCache
from server.model.transfer import on_device
from server.records import Batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EncoderDecoderRunner(CacheRunner):
    def __init__(
        self, model: PreTrainedModel, cache: PagedCache, batching: Batching, decoder_prompt: tuple[int, ...]
    ) -> None:
        super().__init__(model, cache, batching)
        self.shares_blocks = False
        self.decoder_prompt = decoder_prompt
        self._begun: dict[str, tuple[int, ...]] = {}
        """Tokens of sequences whose prompts have not come to their end."""

    def release(self, request_id: str) -> None:
        self._begun.pop(request_id, None)

    def _calls(self, chunks: Sequence[Chunk]) -> list[list[Chunk]]:
        """Prompts that are complete, with others of their length; then decodes."""
        whole: dict[tuple[int, int], list[Chunk]] = {}
        decodes: list[Chunk] = []
        for chunk in chunks:
            begun = self._begun.pop(chunk.request_id, ())[: chunk.start]
            if chunk.start >= chunk.encoder_tokens + len(self.decoder_prompt) and not begun:
                decodes.append(chunk)
                continue
            if len(begun) != chunk.start:
                raise StepError(f"request {chunk.request_id} continues at {chunk.start}, where it was not left")
            chunk = msgspec.structs.replace(chunk, tokens=(*begun, *chunk.tokens), start=0)
            if chunk.draw is None:
                self._begun[chunk.request_id] = tuple(chunk.tokens)
            else:
                whole.setdefault((chunk.encoder_tokens, chunk.end), []).append(chunk)
        calls = list(whole.values())
        if self.batching == "single":
            calls = [call for group in calls for chunk in group for call in self._one_by_one(chunk)]
        return [*calls, *groups(decodes, self.batching)]

    def _one_by_one(self, chunk: Chunk) -> list[list[Chunk]]:
        """A call for what all begin with, the prompt and what the decoder begins after; then one for each token."""
        first = chunk.encoder_tokens + len(self.decoder_prompt)
        if first == chunk.end:
            return [[chunk]]
        beginning = msgspec.structs.replace(chunk, tokens=chunk.tokens[:first], draw=None)
        rest = msgspec.structs.replace(chunk, tokens=chunk.tokens[first:], start=first)
        return [[beginning], *([piece] for piece in rest.one_by_one())]

    @torch.inference_mode()
    def _forward(self, group: Sequence[Chunk], rows: Rows) -> None:
        is_prompt = group[0].start == 0
        crossed = [
            Span(chunk.blocks, 0, 0 if is_prompt else chunk.encoder_tokens, chunk.encoder_tokens) for chunk in group
        ]
        own = [
            Span(chunk.blocks, chunk.encoder_tokens, max(chunk.start, chunk.encoder_tokens), chunk.end)
            for chunk in group
        ]
        cross_gather, self_gather = (Gather(self.cache, spans, self.device) for spans in (crossed, own))
        ids = on_device([list(chunk.tokens) for chunk in group], self.device)
        if is_prompt:
            arguments: dict[str, Any] = {"input_ids": ids[:, : group[0].encoder_tokens]}
        else:
            # What the encoder gave is in the cache, as keys and values; only how much it was still matters.
            shape = (len(group), cross_gather.width, self.model.config.get_text_config().hidden_size)
            given = torch.zeros(1, dtype=self.model.dtype, device=self.device).expand(shape)
            arguments = {"encoder_outputs": BaseModelOutput(last_hidden_state=given)}
        logits: torch.Tensor = self.model(
            **arguments,
            attention_mask=cross_gather.mask,
            decoder_input_ids=ids[:, group[0].encoder_tokens :] if is_prompt else ids,
            decoder_attention_mask=self_gather.mask,
            use_cache=True,
            **{self._cache_argument: EncoderDecoderCache(self_gather.layers(), cross_gather.layers())},
        ).logits
        for chunk, row in zip(group, logits, strict=True):
            rows[chunk.request_id].append(row[len(row) - chunk.wanted :])
