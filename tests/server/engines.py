"""A whole engine in this process, without sockets: scheduler, loop and a real runner. Not a test.

Requests arrive when a script says so: before the first step, or in the report of a given one.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Mapping, Sequence

from server.engine.blocks import BlockPool
from server.engine.loop import EngineLoop
from server.engine.scheduler import Scheduler
from server.model.batch import Runner
from server.records import FinishReason, Generate, SamplingParams, Shutdown, StepReport, ToEngine, TokenLogprobs


def generate(name: str, prompt: Sequence[int], max_tokens: int, **sampling: object) -> Generate:
    """A request; greedy unless told otherwise."""
    settings = {"temperature": 0.0, **sampling}
    return Generate(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **settings))  # type: ignore[arg-type]


class Engine:
    """Serves scripts of requests, one after the other, and keeps what came out."""

    def __init__(
        self,
        runner: Runner,
        *,
        blocks: int = 64,
        max_batch_tokens: int = 64,
        max_sequences: int = 16,
        max_model_len: int = 256,
        vocab_size: int = 320,
        prefix_caching: bool = True,
        speculative_tokens: int = 0,
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(
            BlockPool(blocks),
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
            speculative_tokens=speculative_tokens,
        )
        self.reports: list[StepReport] = []
        self.answers: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.ends: dict[str, tuple[FinishReason, str | None]] = {}
        self._later: dict[int, list[ToEngine]] = {}
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._loop = EngineLoop(self.scheduler, runner, self._inbox, self._take, vocab_size=vocab_size)

    def serve(
        self, now: Iterable[Generate], later: Mapping[int, Sequence[ToEngine]] | None = None
    ) -> dict[str, list[int]]:
        """Runs until all is answered; `later` arrives in the report of that many steps from now. Tokens by request."""
        self.answers, self.ends = {}, {}
        self.logprobs, self.prompt_logprobs = {}, {}
        before = len(self.reports)
        self._later = {before + step: list(records) for step, records in (later or {}).items()}
        for request in now:
            self._inbox.put(request)
        self._loop.run()
        return self.answers

    def _take(self, report: StepReport) -> None:
        self.reports.append(report)
        for output in report.outputs:
            assert output.request_id not in self.ends
            self.answers.setdefault(output.request_id, []).extend(output.token_ids)
            self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
            self.prompt_logprobs.setdefault(output.request_id, []).extend(output.prompt_logprobs)
            if output.finish_reason is not None:
                self.ends[output.request_id] = (output.finish_reason, output.error)
        for record in self._later.pop(len(self.reports), []):
            self._inbox.put(record)
        if not self.scheduler.has_work and self._inbox.empty() and not self._later:
            self._inbox.put(Shutdown())
