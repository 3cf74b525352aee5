"""The runner for architectures that never call our attention: transformers' own cache classes, a sequence at a time.

BLOOM, Falcon, MPT and whatever else the probe finds. Each sequence has a DynamicCache, and each chunk is a
forward call of its own; the contract towards the loop is the paged runner's. The blocks that the scheduler hands out
are counted, not used: they bound how many tokens are cached at once, as they do for everybody.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from server.model.batch import Batch, Chunk, StepError, StepResult, failure_sentence
from server.model.runner import drawn, input_device, keeps_logits, memory_guard, takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class CacheRunner:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = input_device(model)
        self._keeps_logits = keeps_logits(model)
        # transformers 5.24 renamed the argument, model by model, and warns of the old name.
        self._cache_argument = "cache" if takes(model, "cache") else "past_key_values"
        self._caches: dict[str, DynamicCache] = {}

    def step(self, batch: Batch) -> StepResult:
        """One forward call per chunk; what goes wrong in one is that request's error and nobody else's."""
        errors: dict[str, str] = {}
        rows: list[torch.Tensor] = []
        drawing: list[Chunk] = []
        for chunk in batch.chunks:
            try:
                with memory_guard(len(chunk.tokens)):
                    logits = self._forward(chunk)
            except StepError as error:
                errors[chunk.request_id] = str(error)
            except Exception as error:
                log.exception("request %s failed", chunk.request_id)
                errors[chunk.request_id] = failure_sentence(error)
            else:
                if chunk.draw is not None:
                    rows.append(logits)
                    drawing.append(chunk)
        result = drawn(drawing, torch.stack(rows)) if rows else StepResult()
        result.errors |= errors
        result.forward_passes = len(batch.chunks)
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

    def logits(self, batch: Batch) -> torch.Tensor:
        """[drawing chunks, vocabulary], in the order of the batch."""
        rows = [self._forward(chunk)[None] for chunk in batch.chunks]
        return torch.cat([row if chunk.draw else row[:0] for row, chunk in zip(rows, batch.chunks, strict=True)])

    @torch.inference_mode()
    def _forward(self, chunk: Chunk) -> torch.Tensor:
        """The logits of a chunk's last token, [vocabulary]."""
        if chunk.start == 0:
            self._caches[chunk.request_id] = DynamicCache(config=self.model.config)
        cache = self._caches.get(chunk.request_id)
        if cache is None or cache.get_seq_length() != chunk.start:
            raise StepError(f"request {chunk.request_id} continues at {chunk.start}, where its cache does not end")
        ids = torch.tensor([list(chunk.tokens)], device=self.device)
        arguments: dict[str, Any] = {self._cache_argument: cache}
        if self._keeps_logits:
            arguments["logits_to_keep"] = 1
        output = self.model(input_ids=ids, use_cache=True, **arguments)
        logits: torch.Tensor = output.logits[0, -1]
        return logits
