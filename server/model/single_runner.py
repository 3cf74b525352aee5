"""The runner for architectures whose cache is more than keys and values of every token: a sequence at a time.

Layers with a window or a state of their own keep those in classes of transformers, which no page can stand in for. Each
sequence has a DynamicCache, and each chunk is a forward call of its own; the contract towards the loop is the paged
runner's. The blocks that the scheduler hands out are counted, not used: they bound how many tokens are cached at once,
as they do for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from server.model.batch import Chunk, StepError
from server.model.cache_runner import CallRunner, Rows
from server.model.transfer import on_device
from server.records import Batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SingleRunner(CallRunner):
    batching: Batching = "single"
    shares_blocks = False
    """A cache belongs to a request: no other begins where it ends. Nor can it be cut back where a guess was wrong: a
    window or a state has moved on."""

    def __init__(self, model: PreTrainedModel, *, batch_invariant: bool = False) -> None:
        """batch_invariant: each token has a call of its own, so that chunks make no difference to its bits."""
        super().__init__(model)
        self._batch_invariant = batch_invariant
        self._caches: dict[str, DynamicCache] = {}

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

    def _calls(self, chunks: Sequence[Chunk]) -> list[list[Chunk]]:
        if self._batch_invariant:
            return [[piece] for chunk in chunks for piece in chunk.one_by_one()]
        return [[chunk] for chunk in chunks]

    @torch.inference_mode()
    def _forward(self, group: Sequence[Chunk], rows: Rows) -> None:
        (chunk,) = group
        if chunk.start == 0:
            self._caches[chunk.request_id] = DynamicCache(config=self.model.config)
        cache = self._caches.get(chunk.request_id)
        if cache is None or cache.get_seq_length() != chunk.start:
            raise StepError(f"request {chunk.request_id} continues at {chunk.start}, where its cache does not end")
        ids = on_device([list(chunk.tokens)], self.device)
        arguments: dict[str, Any] = {self._cache_argument: cache}
        if self._keeps_logits:
            arguments["logits_to_keep"] = max(1, chunk.wanted)  # 0 would keep all
        output = self.model(input_ids=ids, use_cache=True, **arguments)
        logits: torch.Tensor = output.logits[0]
        rows[chunk.request_id].append(logits[len(logits) - chunk.wanted :])
