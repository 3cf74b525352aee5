"""The paged runner: a batch of chunks in, one packed forward call, the next token of each chunk that draws out.

Input buffers are made once and filled anew each step: token ids, positions, cache slots and block tables go to the
device in two copies, and the sampled tokens come back in one. It knows no queues: whoever calls `step` hands every
chunk its blocks. Architectures that never call our attention have a runner of their own (cache_runner.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quant import native
from server.model.attention import CONTEXT_ARGUMENT, PagedBatch, Segment
from server.model.batch import FIXED_ROWS, FIXED_ROWS_ON_TILES, SCORED_ROWS, Batch, StepError, StepResult
from server.model.paged_cache import PagedCache
from server.model.readout import read_logits
from server.model.rope import rope_switch
from server.model.steady import Steady
from server.records import Batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PagedRunner:
    """A model whose every layer calls server.model.attention, set to it, and its cache."""

    batching: Batching = "packed"
    decoder_prompt: tuple[int, ...] = ()
    shares_blocks = True

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
        batch_invariant: bool = False,
    ) -> None:
        """batch_invariant: a row's logits have the same bits in a batch of any size, or UnsteadyError is raised."""
        self.model = model
        self.cache = cache
        self.fixed_rows = _fixed_rows(cache)
        self.device = input_device(model)
        self._keeps_logits = keeps_logits(model)
        self._rope = rope_switch(model)
        self.switch_length = self._rope.length
        self._steadied: AbstractContextManager[object] = Steady() if batch_invariant else nullcontext()
        tables = (max_sequences, -(-max_model_len // cache.block_tokens))
        self._rows = _Buffer((3, max_batch_tokens), self.device)  # token ids, positions, slots
        self._tables = _Buffer(tables, self.device)

    def step(self, batch: Batch) -> StepResult:
        """One forward call for the whole batch, or a few where long prompts are scored.

        Raises StepError where memory runs out.
        """
        passes = batch.passes(SCORED_ROWS)
        result = StepResult(forward_passes=len(passes))
        with memory_guard(batch.tokens):
            for part in passes:
                read_logits(part.chunks, self.logits(part), result)
        return result

    def release(self, request_id: str) -> None:
        """Nothing to forget: what a sequence left is in its blocks, and the scheduler knows who may read them."""

    @property
    def kv_tensors(self) -> list[torch.Tensor]:
        return self.cache.tensors

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What is kept from step to step, beside the cache."""
        return [*self._rows.tensors, *self._tables.tensors]

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """[wanted rows, vocabulary] in the model's dtype, in the order of the batch."""
        context, kept = self._prepare(batch)
        ids, positions, _ = self._rows.device[:, : batch.tokens].unbind()
        arguments: dict[str, Any] = {CONTEXT_ARGUMENT: context}
        # One row at least: an empty product would ask every layer's kernel about a case nobody needs.
        wanted = torch.tensor(kept or [0], device=self.device)
        if self._keeps_logits:
            arguments["logits_to_keep"] = wanted
        switched = (chunk.switched for chunk in batch.chunks for _ in chunk.tokens)
        with self._steadied, self._rope.told(switched, (1, batch.tokens), self.device):
            output = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments)
        logits: torch.Tensor = output.logits[0]
        if not self._keeps_logits:
            logits = logits.index_select(0, wanted.to(logits.device))
        return logits[: len(kept)]

    def _prepare(self, batch: Batch) -> tuple[PagedBatch, list[int]]:
        """Fills the buffers; returns the attention's context and the rows whose logits are wanted.

        A few calls of numpy for the whole batch, and one for each sequence: a batch has hundreds of them.
        """
        chunks, size, tables = batch.chunks, self.cache.block_tokens, self._tables.host
        counts = np.array([len(chunk.tokens) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = np.cumsum(counts)
        firsts = ends - counts
        for index, chunk in enumerate(chunks):
            tables[index, : len(chunk.blocks)] = chunk.blocks
        total = int(ends[-1])
        ids, positions, slots = self._rows.host[:, :total]
        ids[:] = [token for chunk in chunks for token in chunk.tokens]
        positions[:] = np.arange(total) + np.repeat(starts - firsts, counts)
        slots[:] = tables[np.repeat(np.arange(len(chunks)), counts), positions // size] * size + positions % size
        self._rows.send(total)
        self._tables.send()
        widest = max(len(chunk.blocks) for chunk in chunks)
        blocks = self._tables.device[: len(chunks), :widest].unbind()
        segments = [
            Segment(first, len(chunk.tokens), chunk.start, row)
            for first, chunk, row in zip(firsts.tolist(), chunks, blocks, strict=True)
        ]
        kept = [row for end, chunk in zip(ends.tolist(), chunks, strict=True) for row in range(end - chunk.wanted, end)]
        return PagedBatch(self.cache, self._rows.device[2, :total], segments), kept


def _fixed_rows(cache: PagedCache) -> int | None:
    """Runner.fixed_rows of a model with this cache."""
    if not all(store.is_cpu for store in cache.tensors):
        return None  # CUDA's attention takes single rows only
    has_tiles = native.kernels("cpu").level == "amx" and all(x.computed == torch.bfloat16 for x in cache.layers)
    return FIXED_ROWS_ON_TILES if has_tiles else FIXED_ROWS


class _Buffer:
    """An int64 array that is filled on the host and read on the device; on the CPU the two are the same memory."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        on_host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.host = on_host.numpy()
        self.device = on_host if device.type == "cpu" else on_host.to(device)
        self._on_host = on_host

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self._on_host, self.device]

    def send(self, columns: int | None = None) -> None:
        """Copies the first `columns` columns to the device."""
        if self.device is not self._on_host:
            self.device[:, :columns].copy_(self._on_host[:, :columns], non_blocking=True)


@contextmanager
def memory_guard(tokens: int) -> Iterator[None]:
    """Turns an out-of-memory error of any device into a StepError's sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StepError(_out_of_memory(tokens)) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch's CPU allocator has no exception of its own
            raise StepError(_out_of_memory(tokens)) from error
        raise


def _out_of_memory(tokens: int) -> str:
    return (
        f"memory ran out in a step of {tokens} tokens that this request took part in; "
        "lower max_batch_tokens, max_sequences or kv_cache.tokens of this model"
    )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids must be: the embedding's device, or where its weights are brought to if they are offloaded."""
    weight: Any = model.get_input_embeddings().weight
    if weight.device.type != "meta":
        return torch.device(weight.device)
    places = [place for place in getattr(model, "hf_device_map", {}).values() if place not in ("cpu", "disk")]
    return torch.device(places[0] if places else "cpu")


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the forward call names this argument."""
    return argument in inspect.signature(model.forward).parameters


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the forward call can be asked for the logits of some rows only."""
    return takes(model, "logits_to_keep")
