"""The runner for architectures whose cache is more than keys and values of every token: a sequence at a time.

Layers with a window or a state of their own keep those in classes of transformers, which no page can stand in for. Each
sequence has a DynamicCache, and each chunk is a forward call of its own; the contract towards the loop is the paged
runner's. The blocks that the scheduler hands out are counted, not used: they bound how many tokens are cached at once,
as they do for everybody.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from server.model.batch import SCORED_ROWS, Batch, Chunk, StepError, StepResult, failure_sentence
from server.model.cache_runner import cache_argument
from server.model.readout import read_logits
from server.model.runner import input_device, keeps_logits, memory_guard
from server.records import Batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class SingleRunner:
    batching: Batching = "single"
    decoder_prompt: tuple[int, ...] = ()
    shares_blocks = False
    """A cache belongs to a request: no other begins where it ends."""
    checks_drafts = False
    """Nor can a cache be cut back where a guess was wrong: a window or a state has moved on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = input_device(model)
        self._keeps_logits = keeps_logits(model)
        self._cache_argument = cache_argument(model)
        self._caches: dict[str, DynamicCache] = {}

    def step(self, batch: Batch) -> StepResult:
        """One forward call per chunk; what goes wrong in one is that request's error and nobody else's."""
        result = StepResult(forward_passes=0)
        for part in batch.passes(SCORED_ROWS):
            rows: list[torch.Tensor] = []
            computed: list[Chunk] = []
            for chunk in part.chunks:
                if chunk.request_id in result.errors:
                    continue
                try:
                    with memory_guard(len(chunk.tokens)):
                        rows.append(self._forward(chunk))
                    computed.append(chunk)
                except StepError as error:
                    result.errors[chunk.request_id] = str(error)
                except Exception as error:
                    log.exception("request %s failed", chunk.request_id)
                    result.errors[chunk.request_id] = failure_sentence(error)
            if computed:
                read_logits(computed, torch.cat(rows), result)
            result.forward_passes += len(part.chunks)
        return result

    def release(self, request_id: str) -> None:
        self._caches.pop(request_id, None)

    @property
    def kv_tensors(self) -> list[torch.Tensor]:
        """What is cached at this moment; nothing is held for sequences that are not there."""
        layers = [layer for cache in self._caches.values() for layer in cache.layers]
        found = [
            tensor for layer in layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        ]
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]

    @property
    def buffers(self) -> list[torch.Tensor]:
        """None: what a call needs is made for it."""
        return []

    def logits(self, batch: Batch) -> torch.Tensor:
        """[wanted rows, vocabulary], in the order of the batch."""
        return torch.cat([self._forward(chunk) for chunk in batch.chunks])

    @torch.inference_mode()
    def _forward(self, chunk: Chunk) -> torch.Tensor:
        """The logits of a chunk's wanted rows, [wanted, vocabulary]."""
        if chunk.start == 0:
            self._caches[chunk.request_id] = DynamicCache(config=self.model.config)
        cache = self._caches.get(chunk.request_id)
        if cache is None or cache.get_seq_length() != chunk.start:
            raise StepError(f"request {chunk.request_id} continues at {chunk.start}, where its cache does not end")
        ids = torch.tensor([list(chunk.tokens)], device=self.device)
        arguments: dict[str, Any] = {self._cache_argument: cache}
        if self._keeps_logits:
            arguments["logits_to_keep"] = max(1, chunk.wanted)  # 0 would keep all
        output = self.model(input_ids=ids, use_cache=True, **arguments)
        logits: torch.Tensor = output.logits[0]
        return logits[len(logits) - chunk.wanted :]
