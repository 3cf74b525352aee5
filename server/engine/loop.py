"""The engine's loop: drain the inbox, schedule, run, apply, report; over and over until told to stop.

One thread owns all state; requests and aborts reach it through a queue and take effect between steps. It knows no
sockets (process.py) and no tensors (the runner). Whatever goes wrong in a step ends the requests of that step, each
with a sentence, and the loop goes on.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from server.engine.scheduler import Scheduler
from server.errors import RequestError
from server.model.batch import Batch, Runner, StepError, StepResult, failure_sentence
from server.records import Abort, Generate, LoadModel, RoomGranted, SequenceOutput, Shutdown, StepReport, ToEngine

log = logging.getLogger(__name__)

REST_SECONDS: Final = 1.0
"""How long there must have been nothing to do before an engine tidies up; a client that asks again at once waits for
nothing."""


class Upkeep(Protocol):
    """What an engine does beside its steps (server/memory/upkeep.py)."""

    def at_rest(self) -> None: ...

    def after_step(self) -> None: ...


class EngineLoop:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        inbox: queue.SimpleQueue[ToEngine],
        report: Callable[[StepReport], None],
        *,
        vocab_size: int,
        upkeep: Upkeep | None = None,
    ) -> None:
        scheduler.prefix_caching &= runner.shares_blocks  # a runner that can't would compute nonsense
        if runner.fixed_rows is None:
            scheduler.speculative_tokens = 0
        else:
            scheduler.fixed_rows = runner.fixed_rows
        scheduler.switch_length = runner.switch_length
        self._scheduler = scheduler
        self._runner = runner
        self._inbox = inbox
        self._report = report
        self._vocab_size = vocab_size
        self._upkeep = upkeep
        self._rested = True
        """Whether the upkeep has been told that nothing is left to do."""
        self._steps = 0
        self._outputs: list[SequenceOutput] = []
        """Ends that no step brought about (refused, aborted, too late); they go out with the next report."""
        self._arrived: dict[str, float] = {}
        """When the requests came that have not been in a step yet."""

    def run(self) -> None:
        """Serves until a Shutdown arrives; blocks while there is nothing to do."""
        while self._drain():
            self._step()

    def _drain(self) -> bool:
        """Takes in everything that has arrived, waiting for it when idle; False once a Shutdown is among it."""
        wait = not self._scheduler.has_work
        while True:
            try:
                record = self._next() if wait else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if isinstance(record, Shutdown):
                return False
            self._take(record)
            wait = False

    def _next(self) -> ToEngine:
        """The next record, however long it takes to come."""
        if self._upkeep is not None and not self._rested:
            try:
                return self._inbox.get(timeout=REST_SECONDS)
            except queue.Empty:
                self._upkeep.at_rest()
                self._rested = True
        return self._inbox.get()

    def _take(self, record: ToEngine) -> None:
        match record:
            case Generate(request_id=request_id) if self._scheduler.holds(request_id):
                log.error("request id %r is in use; the second request of that id was dropped", request_id)
            case Generate(request_id=request_id):
                try:
                    self._check_tokens(record)
                    self._scheduler.add(self._as_the_runner_has_it(record), time.monotonic())
                    self._arrived[request_id] = time.perf_counter()
                except RequestError as error:
                    refusal = SequenceOutput(request_id, finish_reason="error", error=error.message, refused=True)
                    self._outputs.append(refusal)
            case Abort(request_id=request_id):
                ended = self._scheduler.abort(request_id)
                if ended is not None:
                    self._ended(ended)
            case LoadModel() | RoomGranted() | Shutdown():
                log.error("a %s record arrived in the middle of serving and was dropped", type(record).__name__)

    def _ended(self, output: SequenceOutput) -> None:
        """Forgets a request that ended between steps, and lets the next report say so."""
        self._arrived.pop(output.request_id, None)
        self._runner.release(output.request_id)
        self._outputs.append(output)

    def _check_tokens(self, request: Generate) -> None:
        """Only ids the embedding has: one that it has not would end the whole step, or on a GPU the whole process."""
        for where, tokens in (("prompt holds", request.prompt), ("sampling names", request.sampling.edited_token_ids)):
            bad = next((token for token in tokens if not 0 <= token < self._vocab_size), None)
            if bad is not None:
                raise RequestError(f"the {where} token id {bad}; accepted are 0 to {self._vocab_size - 1}")

    def _as_the_runner_has_it(self, request: Generate) -> Generate:
        """With what the answer begins after, where it does not continue its prompt."""
        beginning = self._runner.decoder_prompt
        if not beginning:
            return request
        if request.sampling.prompt_logprobs is not None:
            raise RequestError("an encoder-decoder has no logprobs of its prompt; accepted is to ask for none")
        prompt = request.prompt + beginning
        return msgspec.structs.replace(request, prompt=prompt, encoder_tokens=len(request.prompt))

    def _step(self) -> None:
        started = time.perf_counter()
        for late in self._scheduler.expire(time.monotonic()):
            self._ended(late)
        batch = self._scheduler.schedule()
        for request_id in self._scheduler.preempted:
            self._runner.release(request_id)
        outputs, self._outputs = self._outputs, []
        passes = 0
        queued: list[float] = []
        if batch is not None:
            if self._arrived:
                arrivals = (self._arrived.pop(chunk.request_id, None) for chunk in batch.chunks)
                queued = [started - arrival for arrival in arrivals if arrival is not None]
            computed, passes = self._compute(batch)
            for output in computed:
                if output.finish_reason is not None:
                    self._runner.release(output.request_id)
            outputs += computed
        elif not outputs:
            return  # an abort for what had just ended: no step, nothing to say
        self._steps += batch is not None
        self._report(self._summary(batch, outputs, time.perf_counter() - started, passes, tuple(queued)))
        self._rested = False
        if self._upkeep is not None:
            self._upkeep.after_step()

    def _compute(self, batch: Batch) -> tuple[list[SequenceOutput], int]:
        """Runs a batch and takes in its result; a failure of the whole step ends the batch's requests, no others."""
        try:
            result: StepResult = self._runner.step(batch)
        except StepError as error:
            log.error("a step of %d tokens failed: %s", batch.tokens, error)
            return self._scheduler.fail(batch, str(error)), 0
        except Exception as error:
            log.exception("a step of %d tokens failed", batch.tokens)
            return self._scheduler.fail(batch, failure_sentence(error)), 0
        return self._scheduler.apply(batch, result), result.forward_passes

    def _summary(
        self,
        batch: Batch | None,
        outputs: list[SequenceOutput],
        seconds: float,
        passes: int,
        queue_seconds: tuple[float, ...],
    ) -> StepReport:
        scheduler = self._scheduler
        tokens, decodes, drafts = 0, 0, 0
        if batch is not None:
            tokens, decodes, drafts = batch.tokens, batch.decode_tokens, batch.drafted_tokens
        return StepReport(
            step=self._steps,
            outputs=tuple(outputs),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            prefill_tokens=tokens - decodes - drafts,
            decode_tokens=decodes,
            seconds=seconds,
            kv_blocks_used=scheduler.pool.used,
            kv_blocks_total=scheduler.pool.total,
            forward_passes=passes,
            queue_seconds=queue_seconds,
            kv_blocks_cached=scheduler.pool.cached,
            prefix_query_tokens=scheduler.queried_tokens,
            prefix_hit_tokens=scheduler.hit_tokens,
            preemptions=len(scheduler.preempted),
            draft_tokens=drafts,
            accepted_draft_tokens=scheduler.accepted_tokens,
        )
