"""Whether an encoder-decoder can be served, found out by trying, as probe.py does for all others.

Two prompts with an answer each go through encoder_decoder.py's runner, the answers token by token and side by side at
different lengths; every token's logits must be those of the model's own forward call without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import DynamicCache, EncoderDecoderCache

from server.errors import LoadError
from server.memory.kv import kv_dtype
from server.model.batch import Chunk
from server.model.cache_runner import batchings, cache_argument
from server.model.encoder_decoder import EncoderDecoderRunner
from server.model.fuse import fuse
from server.model.gather import cached_shapes
from server.model.paged_cache import LayerShape, PagedCache
from server.model.proof import (
    DRAW,
    Provable,
    allowed_difference,
    architecture_of,
    first_proven,
    logits_of,
    probe_prompts,
    relative,
)
from server.model.runner import input_device
from server.records import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TAIL: Final = 3
"""Tokens of the first answer behind its beginning; the second has one less."""


def choose_encoder_decoder_runner(
    model: PreTrainedModel, spec: ModelSpec, *, blocks: int, block_tokens: int, max_model_len: int
) -> EncoderDecoderRunner:
    """The runner, proven, its cache allocated; raises LoadError for an architecture that it cannot serve."""
    beginning = decoder_prompt(model)
    proof = EncoderDecoderProof.of(model, beginning, blocks=blocks, block_tokens=block_tokens, longest=max_model_len)
    fuse(model)
    layers = [shape.stored_as(kv_dtype(spec, shape.computed)) for shape in _cached_layers(model, proof)]
    cache = PagedCache(layers, blocks, block_tokens)
    candidates = [partial(EncoderDecoderRunner, model, cache, way, beginning) for way in batchings(spec)]
    return first_proven(model, candidates, proof.difference, allowed_difference(model, spec.kv_cache_dtype))


def decoder_prompt(model: PreTrainedModel) -> tuple[int, ...]:
    """What the decoder begins after, as transformers' `generate` has it: a start token, and one that is forced if any.

    Raises LoadError where the checkpoint does not say.
    """
    settings: Any = model.generation_config
    start = settings.decoder_start_token_id
    if start is None:
        start = settings.bos_token_id
    if not isinstance(start, int):
        raise LoadError(
            f"{architecture_of(model)} cannot be served: its configuration "
            f"has decoder_start_token_id {start!r}; accepted is the id of one token"
        )
    forced = settings.forced_bos_token_id
    return (start,) if forced is None else (start, int(forced))


@dataclass(frozen=True, slots=True)
class EncoderDecoderProof:
    prompts: list[list[int]]
    answers: list[list[int]]
    """Of different lengths, each behind what the decoder begins after."""
    beginning: int
    """How many tokens that is."""
    expected: list[torch.Tensor]
    """Per sequence, the logits of its beginning's last token and of those behind it, [tokens, vocabulary] float32."""
    block_tokens: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, beginning: tuple[int, ...], *, blocks: int, block_tokens: int, longest: int
    ) -> EncoderDecoderProof:
        """Runs the model as transformers does, on sequences that fit the cache and the context."""
        prompts = probe_prompts(model, longest)
        tails = probe_prompts(model, min(_TAIL, longest - len(beginning)))
        answers = [[*beginning, *tail[which:]] for which, tail in enumerate(tails)]
        needed = max(-(-(len(p) + len(a)) // block_tokens) for p, a in zip(prompts, answers, strict=True))
        if blocks < len(prompts) * needed:
            prompts, answers = prompts[-1:], answers[-1:]
        expected = [_own_logits(model, *pair)[len(beginning) - 1 :] for pair in zip(prompts, answers, strict=True)]
        return cls(prompts, answers, len(beginning), expected, block_tokens)

    def difference(self, runner: Provable) -> float:
        """How far a runner's logits are from the model's own, |difference| / |expected|.

        The second sequence joins the first one a step later, and the first chunk of its prompt before that.
        """
        steps: list[list[Chunk]] = [[] for _ in range(len(self.prompts) + _TAIL)]
        expected: list[list[torch.Tensor]] = [[] for _ in steps]
        first = 0
        for which, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            tokens = prompt + answer
            blocks = range(first, first + -(-len(tokens) // self.block_tokens))
            first = blocks.stop
            begun = len(prompt) // 2 if which else 0
            chunk = partial(Chunk, f"probe-{which}", blocks=blocks, encoder_tokens=len(prompt))
            if begun:
                steps[which - 1].append(chunk(tokens[:begun], 0, draw=None))
            ends = range(len(prompt) + self.beginning, len(tokens) + 1)
            for place, (start, end) in enumerate(pairwise([begun, *ends])):
                steps[which + place].append(chunk(tokens[start:end], start, draw=DRAW))
                expected[which + place].append(self.expected[which][place])
        return relative(logits_of(runner, steps), torch.stack([row for rows in expected for row in rows]))


@torch.inference_mode()
def _own_logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits of an answer's tokens, [tokens, vocabulary] float32."""
    device = input_device(model)
    ids, answered = (torch.tensor([tokens], device=device) for tokens in (prompt, answer))
    logits: torch.Tensor = model(input_ids=ids, decoder_input_ids=answered, use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def _cached_layers(model: PreTrainedModel, proof: EncoderDecoderProof) -> list[LayerShape]:
    """What each layer of the decoder keeps per token; raises LoadError where the pages cannot hold it."""
    name = architecture_of(model)
    prompt, answer = proof.prompts[-1], proof.answers[-1]
    device = input_device(model)
    ids, answered = (torch.tensor([tokens], device=device) for tokens in (prompt, answer))
    try:
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        own, crossed = (DynamicCache(config=decoder.config) for _ in range(2))
        cache = EncoderDecoderCache(own, crossed)
        model(input_ids=ids, decoder_input_ids=answered, use_cache=True, **{cache_argument(model): cache})
        layers, read = cached_shapes(own, len(answer)), cached_shapes(crossed, len(prompt))
    except Exception as error:
        raise LoadError(f"{name} cannot be served: it failed with a cache ({type(error).__name__}: {error})") from error
    if not layers or layers != read:
        raise LoadError(
            f"{name} cannot be served: its layers do not cache the same for a token of the prompt and of the answer; "
            "accepted are encoder-decoders with keys and values of equal shapes, such as T5 and BART"
        )
    return layers
