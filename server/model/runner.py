"""The paged runner: a batch of chunks in, one packed forward call, the next token of each chunk that draws out.

Input buffers are made once and filled anew each step: token ids, positions, cache slots and block tables go to the
device in two copies, and the sampled tokens come back in one. Where recordings were made (graphs.py), a batch of single
rows replays one instead of calling the model. It knows no queues: whoever calls `step` hands every chunk its blocks.
Architectures that never call our attention have a runner of their own (cache_runner.py).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quant import native
from server.memory.workspace import ROWS_PER_TOKEN, most_rows, most_tables, table_sizes
from server.model.attention import CONTEXT_ARGUMENT, Context, PagedBatch, Segment, Segments, Tables
from server.model.batch import FIXED_ROWS, FIXED_ROWS_ON_TILES, Batch, Chunk, StepError, StepResult
from server.model.graphs import Graphs, Recorder, SingleRows, Size
from server.model.paged_cache import PagedCache
from server.model.readout import read_logits
from server.model.rope import rope_switch
from server.model.steady import Steady
from server.model.transfer import on_device
from server.records import SCORED_ROWS, Batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from server.model.shortcut import Shortcut


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
        _look_for_no_padding(model)
        self.fixed_rows = _fixed_rows(cache)
        self.device = input_device(model)
        self._keeps_logits = keeps_logits(model)
        self._rope = rope_switch(model)
        self.switch_length = self._rope.length
        self._steadied: AbstractContextManager[object] = Steady() if batch_invariant else nullcontext()
        self._most_blocks = -(-max_model_len // cache.block_tokens)
        self._most_single = min(max_sequences, max_batch_tokens)
        self._rows = StepBuffer(most_rows(max_batch_tokens), self.device)  # token ids, positions, slots
        self._tables = StepBuffer(most_tables(max_sequences, self._most_blocks), self.device)
        self._recorded: _Recorded | None = None
        self.shortcut: Shortcut | None = None
        """The model's parts alone, where they have been proven to be all of it."""
        self._is_sealed = False

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

    def seal(self) -> None:
        """From now on nobody changes the model's modules. It is not asked in every step whether they still are what
        addresses were taken from, which takes as long as ten small kernels."""
        self._is_sealed = True

    @property
    def kv_tensors(self) -> list[torch.Tensor]:
        return self.cache.tensors

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What is kept from step to step, beside the cache."""
        return [*self._rows.tensors, *self._tables.tensors, *(self._recorded.tensors if self._recorded else ())]

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """From now on batches of single rows replay what is recorded here. Raises whatever the recorder does, and then
        all is as it was.

        Not for a model that computes long sequences in another way, nor while there are sequences.
        """
        offsets = torch.arange(self._most_single + 1, device=self.device)
        for buffer in (self._rows, self._tables):
            buffer.device.zero_()  # rows of one token that lie in the first block
        one = self._call(offsets, Size(width=1, rows=1))
        logits = one.new_zeros(self._most_single, one.shape[1])

        def work(size: Size) -> None:
            logits[: size.rows].copy_(self._call(offsets, size))

        self._recorded = _Recorded(Graphs(work, self._most_single, self._most_blocks, recorder), logits, offsets)

    @torch.inference_mode()
    def replayed_and_called(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each recording the logits that it gives of some rows, and those that calling the model gives of them. To
        be run while there are no sequences."""
        if self._recorded is not None:
            graphs, logits, offsets = self._recorded
            for size in graphs.sizes:
                self._send(self._rows_that_differ(size), size)
                graphs.replay(size)
                yield logits[: size.rows], self._call(offsets, size)

    def _call(self, offsets: torch.Tensor, size: Size) -> torch.Tensor:
        """The logits of as many single rows as the buffers have."""
        ids, positions, slots = self._rows.on_device(ROWS_PER_TOKEN, size.rows)
        tables = Tables(self._tables.on_device(size.rows, size.width), offsets[: size.rows + 1], positions)
        return self._forward(ids, positions, SingleRows(self.cache, slots, tables))

    def _rows_that_differ(self, size: Size) -> Batch:
        """Tokens, positions, blocks: no two rows have the same, as far as there are so many."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        chunks = []
        for row in range(size.rows):
            turn, block = divmod(row, self.cache.blocks)
            place = turn % self.cache.block_tokens
            chunks.append(Chunk(f"row-{row}", (row % vocabulary,), place, [block] * size.width, None))
        return Batch(tuple(chunks))

    def forget_recordings(self) -> None:
        """From now on every batch calls the model."""
        self._recorded = None

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """[wanted rows, vocabulary] in the model's dtype, in the order of the batch; until the next call."""
        rows, widest = batch.tokens, max(len(chunk.blocks) for chunk in batch.chunks)
        if self._recorded is not None and rows == len(batch.chunks):
            size = self._recorded.graphs.fitting(rows, widest)
            if size is not None:
                return self._replayed(self._recorded, batch, size)
        ends = self._send(batch, Size(widest, rows))
        ids, positions, slots = self._rows.on_device(ROWS_PER_TOKEN, rows)
        kept = _wanted_rows(batch, ends)
        # One row at least: an empty product would ask every layer's kernel about a case nobody needs.
        wanted = on_device(kept or [0], self.device)
        switched = (chunk.switched for chunk in batch.chunks for _ in chunk.tokens)
        with self._steadied, self._rope.told(switched, (1, rows), self.device):
            logits = self._forward(ids, positions, self._context(batch, ends, slots, widest, kept), wanted)
        return logits[: len(kept)]

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, context: Context, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The model on packed rows; logits of all of them, or of `wanted` ones."""
        shortcut = self.shortcut
        if shortcut is not None and wanted is not None and isinstance(context, PagedBatch) and shortcut.is_good():
            return shortcut(ids[None], positions[None], context, wanted)
        arguments: dict[str, Any] = {CONTEXT_ARGUMENT: context}
        if wanted is not None and self._keeps_logits:
            arguments["logits_to_keep"] = wanted
        output = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments)
        logits: torch.Tensor = output.logits[0]
        if wanted is not None and not self._keeps_logits:
            logits = logits.index_select(0, wanted.to(logits.device))
        return logits

    def _replayed(self, recorded: _Recorded, batch: Batch, size: Size) -> torch.Tensor:
        """The logits of a batch of single rows, by the recording of this size."""
        kept = _wanted_rows(batch, self._send(batch, size))
        recorded.graphs.replay(size)
        logits = recorded.logits[: batch.tokens]
        return logits if len(kept) == len(logits) else logits.index_select(0, on_device(kept, logits.device))

    def _send(self, batch: Batch, size: Size) -> list[int]:
        """Fills the buffers with a batch, which is made up to this size's rows, if it has fewer, by copies of its last.
        Returns where each chunk's rows end.

        A few calls of numpy for the whole batch, and one for each sequence: a batch has hundreds of them.
        """
        chunks, rows, block_tokens = batch.chunks, size.rows, self.cache.block_tokens
        counts = np.array([len(chunk.tokens) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = np.cumsum(counts)
        total, more = int(ends[-1]), rows - int(ends[-1])
        sequences = len(chunks) + more
        sizes = table_sizes(sequences, size.width)
        tables, offsets, first = self._tables.parts_on_host(*sizes)
        tables = tables.reshape(sequences, size.width)
        for index, chunk in enumerate(chunks):
            tables[index, : len(chunk.blocks)] = chunk.blocks
        offsets[0], offsets[1 : len(chunks) + 1], first[: len(chunks)] = 0, ends, starts
        ids, positions, slots = self._rows.on_host(ROWS_PER_TOKEN, rows)
        ids[:total] = [token for chunk in chunks for token in chunk.tokens]
        positions[:total] = np.arange(total) + np.repeat(starts - (ends - counts), counts)
        own = tables[np.repeat(np.arange(len(chunks)), counts), positions[:total] // block_tokens]
        slots[:total] = own * block_tokens + positions[:total] % block_tokens
        if more:
            for filled in (ids, positions, slots):
                filled[total:] = filled[total - 1]
            tables[len(chunks) :] = tables[len(chunks) - 1]
        self._rows.send(ROWS_PER_TOKEN * rows)
        self._tables.send(sum(sizes))
        found: list[int] = ends.tolist()
        return found

    def _context(self, batch: Batch, ends: list[int], slots: torch.Tensor, width: int, wanted: list[int]) -> PagedBatch:
        """The attention's context of a batch that has been sent with tables of this width."""
        sequences = len(batch.chunks)
        flat, offsets, starts = self._tables.parts_on_device(*table_sizes(sequences, width))
        blocks = flat.view(sequences, width)

        def segments() -> list[Segment]:
            return [
                Segment(end - len(chunk.tokens), len(chunk.tokens), chunk.start, row)
                for end, chunk, row in zip(ends, batch.chunks, blocks.unbind(), strict=True)
            ]

        tables = Tables(blocks, offsets, starts)
        return PagedBatch(self.cache, slots, Segments(segments), wanted, tables, is_sealed=self._is_sealed)


def _look_for_no_padding(model: PreTrainedModel) -> None:
    """Some models look for padding in the ids of every call, to warn of it, which waits for the device. There is none
    here."""
    for module in model.modules():
        if callable(getattr(module, "warn_if_padding_and_no_attention_mask", None)):
            vars(module)["warn_if_padding_and_no_attention_mask"] = lambda *_: None


def _wanted_rows(batch: Batch, ends: list[int]) -> list[int]:
    """Rows whose logits are wanted; they are the last ones of each chunk, which end there."""
    if ends[-1] == len(ends):  # each has one
        return [row for row, chunk in enumerate(batch.chunks) if chunk.wanted]
    return [row for end, chunk in zip(ends, batch.chunks, strict=True) for row in range(end - chunk.wanted, end)]


def _fixed_rows(cache: PagedCache) -> int | None:
    """Runner.fixed_rows of a model with this cache."""
    if not all(store.is_cpu for store in cache.tensors):
        return None  # CUDA's attention takes single rows only
    has_tiles = native.kernels("cpu").level == "amx" and all(x.computed == torch.bfloat16 for x in cache.layers)
    return FIXED_ROWS_ON_TILES if has_tiles else FIXED_ROWS


class _Recorded(NamedTuple):
    """Recordings, and what they read and write beside the step's buffers."""

    graphs: Graphs
    logits: torch.Tensor  # [rows, vocabulary]
    offsets: torch.Tensor  # [rows + 1]: every sequence has one row

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.logits, self.offsets]


class StepBuffer:
    """Numbers in int64 that are filled on the host and read on the device; on the CPU the two are the same memory.

    A step sees as many of them as it needs, from the first on, so that they are sent as one piece.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.device = self._on_host if device.type == "cpu" else self._on_host.to(device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self._on_host, self.device]

    def on_host(self, *shape: int) -> npt.NDArray[np.int64]:
        """To be filled; what was sent before has been read. A step of which nobody wants a token does not wait for its
        end, so its copy may still be on its way."""
        if self._sent is not None:
            self._sent.synchronize()
        array: npt.NDArray[np.int64] = self._on_host.numpy()[: math.prod(shape)]
        return array.reshape(shape)

    def on_device(self, *shape: int) -> torch.Tensor:
        return self.device[: math.prod(shape)].view(shape)

    def parts_on_host(self, *sizes: int) -> list[npt.NDArray[np.int64]]:
        """The same of several pieces, one behind the other."""
        whole, ends = self.on_host(sum(sizes)), accumulate(sizes)
        return [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def parts_on_device(self, *sizes: int) -> tuple[torch.Tensor, ...]:
        return torch.split(self.on_device(sum(sizes)), list(sizes))

    def send(self, size: int) -> None:
        """Copies the first `size` numbers to the device."""
        if self.device is not self._on_host:
            self.device[:size].copy_(self._on_host[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self.device.device))


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
