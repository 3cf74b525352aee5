"""The runner for architectures that never call our attention: transformers' own code over its own cache classes.

BLOOM, Falcon, MPT and whatever else the probe finds. Keys and values are in the same pages as the paged runner's
(gather.py), so memory is what was planned and beginnings are shared. Rows that compute the same number of tokens, as
all do that decode, go through one forward call, the shorter ones padded on the left as transformers' `generate` pads
them. An architecture whose logits that changes gets calls of rows of one length only; the probe finds out which.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from server.model.batch import Batch, Chunk, StepError, StepResult, failure_sentence
from server.model.gather import Gather, Span
from server.model.paged_cache import PagedCache
from server.model.readout import read_logits
from server.model.rope import rope_switch
from server.model.runner import input_device, keeps_logits, memory_guard, takes
from server.model.transfer import on_device
from server.records import SCORED_ROWS, Batching, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SMALL_CALL: Final = 4096
"""Cached tokens, padding included, up to which rows of any lengths share a call: another call would cost more."""
MOST_PADDED: Final = 2
"""In larger calls, how many columns there may be for each token."""


class CallRunner(ABC):
    """What runners of whole forward calls share: a step is some calls, each with chunks and a cache of its own."""

    batching: Batching
    decoder_prompt: tuple[int, ...] = ()
    fixed_rows: int | None = None
    """Rows of unequal numbers of tokens take calls of their own: a draft would cost more than its guesses save."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = input_device(model)
        self._keeps_logits = keeps_logits(model)
        self._rope = rope_switch(model)
        self.switch_length = self._rope.length
        self._cache_argument = cache_argument(model)

    def step(self, batch: Batch) -> StepResult:
        """A forward call per group of chunks; what goes wrong in one is the error of its requests and nobody else's."""
        result = StepResult(forward_passes=0)
        for part in batch.passes(SCORED_ROWS):
            rows: Rows = defaultdict(list)
            alive = [chunk for chunk in part.chunks if chunk.request_id not in result.errors]
            for call in self._calls(alive):
                group = [chunk for chunk in call if chunk.request_id not in result.errors]
                if not group:
                    continue
                result.forward_passes += 1
                try:
                    with memory_guard(sum(len(chunk.tokens) for chunk in group)):
                        self._call(group, rows)
                except StepError as error:
                    result.errors |= {chunk.request_id: str(error) for chunk in group}
                except Exception as error:
                    log.exception("requests %s failed", ", ".join(chunk.request_id for chunk in group))
                    result.errors |= {chunk.request_id: failure_sentence(error) for chunk in group}
            computed = [chunk for chunk in alive if chunk.request_id not in result.errors and chunk.request_id in rows]
            if computed:
                read_logits(computed, _together(computed, rows), result)
        return result

    @property
    def buffers(self) -> list[torch.Tensor]:
        """None: what a call needs is made for it."""
        return []

    def logits(self, batch: Batch) -> torch.Tensor:
        """[wanted rows, vocabulary], in the order of the batch."""
        rows: Rows = defaultdict(list)
        for group in self._calls(batch.chunks):
            self._call(group, rows)
        return _together([chunk for chunk in batch.chunks if chunk.request_id in rows], rows)

    def _call(self, group: Sequence[Chunk], rows: Rows) -> None:
        with self._rope.told((chunk.switched for chunk in group), (len(group), 1), self.device):
            self._forward(group, rows)

    @abstractmethod
    def _calls(self, chunks: Sequence[Chunk]) -> list[list[Chunk]]:
        """The chunks of each forward call; a chunk may be cut into several, whose order is kept."""

    @abstractmethod
    def _forward(self, group: Sequence[Chunk], rows: Rows) -> None:
        """One call; adds the logits of each chunk's wanted rows."""


Rows = defaultdict[str, list[torch.Tensor]]
"""By request, what each call gave for it: [wanted rows, vocabulary]."""


def _together(chunks: Sequence[Chunk], rows: Rows) -> torch.Tensor:
    """[wanted rows, vocabulary], in the order of the chunks."""
    return torch.cat([logits for chunk in chunks for logits in rows[chunk.request_id]])


class CacheRunner(CallRunner):
    def __init__(self, model: PreTrainedModel, cache: PagedCache, batching: Batching) -> None:
        """batching: which chunks share a call; "padded", "equal" lengths only, or "single".

        "single" is for `batch_invariant`: each token has a call of its own, whose shape only its position decides. So
        it has the same bits whoever computed it, in whatever chunks, and blocks are shared as ever.
        """
        super().__init__(model)
        self.cache = cache
        self.batching = batching
        self.shares_blocks = True
        self._takes_positions = takes(model, "position_ids")

    def release(self, request_id: str) -> None:
        """Nothing to forget: what a sequence left is in its blocks, and the scheduler knows who may read them."""

    @property
    def kv_tensors(self) -> list[torch.Tensor]:
        return self.cache.tensors

    def _calls(self, chunks: Sequence[Chunk]) -> list[list[Chunk]]:
        return groups(chunks, self.batching)

    @torch.inference_mode()
    def _forward(self, group: Sequence[Chunk], rows: Rows) -> None:
        spans = [Span(chunk.blocks, 0, chunk.start, chunk.end) for chunk in group]
        gather = Gather(self.cache, spans, self.device)
        arguments: dict[str, Any] = {self._cache_argument: gather.layers(), "use_cache": True}
        if gather.mask is not None:
            arguments["attention_mask"] = gather.mask
        if self._takes_positions:
            arguments["position_ids"] = gather.positions
        if self._keeps_logits:
            arguments["logits_to_keep"] = max(1, *(chunk.wanted for chunk in group))  # 0 would keep all
        ids = on_device([list(chunk.tokens) for chunk in group], self.device)
        logits: torch.Tensor = self.model(input_ids=ids, **arguments).logits
        for chunk, row in zip(group, logits, strict=True):
            rows[chunk.request_id].append(row[len(row) - chunk.wanted :])


def cache_argument(model: PreTrainedModel) -> str:
    """What the forward call names its cache; transformers 5.24 renamed it, model by model, and warns of the old one."""
    return "cache" if takes(model, "cache") else "past_key_values"


def batchings(spec: ModelSpec) -> list[Batching]:
    """The ways to share calls that a model may be served in, the best one first.

    Of a batch-invariant one there is one alone: torch's products of another shape have other last bits.
    """
    return ["single"] if spec.batch_invariant else ["padded", "equal"]


def groups(chunks: Sequence[Chunk], batching: Batching) -> list[list[Chunk]]:
    """Chunks that share a call: of one number of tokens, and not too far from each other in length.

    With "single", a call for each token.
    """
    if batching == "single":
        return [[piece] for chunk in chunks for piece in chunk.one_by_one()]
    found: list[list[Chunk]] = []
    last: list[Chunk] = []
    tokens = most_encoded = 0
    for chunk in sorted(chunks, key=lambda chunk: (len(chunk.tokens), decoded(chunk)), reverse=True):
        tokens, most_encoded = tokens + chunk.end, max(most_encoded, chunk.encoder_tokens)
        fits = last and len(chunk.tokens) == len(last[0].tokens)
        if batching == "equal":
            fits = fits and decoded(chunk) == decoded(last[0])
        columns = (len(last) + 1) * (decoded(last[0]) + most_encoded) if fits else 0
        if not fits or columns > max(SMALL_CALL, MOST_PADDED * tokens):
            last, tokens, most_encoded = [], chunk.end, chunk.encoder_tokens
            found.append(last)
        last.append(chunk)
    return found


def decoded(chunk: Chunk) -> int:
    """How many tokens of its sequence the chunk's last one sees in self-attention."""
    return chunk.end - chunk.encoder_tokens
