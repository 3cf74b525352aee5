"""The HTTP process's end of one engine's life: starts its process, sends requests, hands each request its tokens.

One asyncio task reads the socket and owns all changing state; everything else sends records. The socket's end-of-file
is how a dead engine is noticed: every open request then ends with EngineUnavailableError, none is left waiting. Whether
another life follows is the supervisor's to decide, how many requests may be open api/admission.py's. No torch here, and
no text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from server.engine.room import Claim, Room
from server.engine.stream import Origin, OutputStream
from server.errors import EngineUnavailableError, LoadError, ServerError, load_failure
from server.metrics import ModelMetrics
from server.records import (
    LENGTH_PREFIX_BYTES,
    SCRATCH_PREFIX,
    Abort,
    FromEngine,
    Generate,
    Loaded,
    LoadFailed,
    LoadModel,
    LoadProgress,
    MemoryChanged,
    ModelSpec,
    Planned,
    Record,
    RoomWanted,
    SamplingParams,
    Shortage,
    Shutdown,
    StepReport,
    decode_from_engine,
    encode_frame,
    frame_length,
)

EngineState = Literal["loading", "ready", "dead"]
DeathReason = Literal["exit", "signal", "protocol", "stuck"]
"""How a life ended: by itself, by a signal, by a frame that is no record, or killed because it did not move."""
log = logging.getLogger(__name__)

SHUTDOWN_SECONDS: Final = 5.0
"""How long an engine may take to end after a Shutdown record; a step is expected to be shorter."""
_KILL_SECONDS: Final = 2.0
SHUTTING_DOWN: Final = "the server is shutting down"


class Cut(NamedTuple):
    """What was ended early: requests, and the tokens they had been given."""

    requests: int
    tokens: int


def engine_command(descriptor: int) -> list[str]:
    """The command of an engine process; `-P` keeps modules in the working directory from being found first."""
    return [sys.executable, "-P", "-m", "server.engine.process", str(descriptor)]


class EngineClient:
    """One model's engine. `start`, then `wait_loaded`; `generate` while ready; `shutdown` in the end."""

    def __init__(
        self,
        spec: ModelSpec,
        metrics: ModelMetrics,
        *,
        command: Callable[[int], list[str]] = engine_command,
        claim: Claim | None = None,
    ) -> None:
        self.spec = spec
        self.state: EngineState = "loading"
        self.progress = LoadProgress("start")
        self.loaded: Loaded | None = None
        self._metrics = metrics
        self._command = command
        self._claim = claim or Room().claim(spec.name)
        self._asking: asyncio.Task[None] | None = None
        self.death: DeathReason | None = None
        self._requests: dict[str, OutputStream] = {}
        self._owed: set[str] = set()
        """Requests whose end the engine has not reported, whether somebody still waits for it or not."""
        self._moved = time.monotonic()
        """When the engine last reported, or got something to do."""
        self._ended = asyncio.Event()
        self._verdict = ""
        self._load_result: asyncio.Future[Loaded] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._scratch: Path | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._parting = ""
        """Why the process is being ended, once it is."""
        self._obituary = ""

    @property
    def open_requests(self) -> int:
        return len(self._requests)

    @property
    def owed_requests(self) -> int:
        """How many the engine has not reported the end of, whether somebody still waits for it or not."""
        return len(self._owed)

    @property
    def process_id(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Starts the process and sends it LoadModel; returns at once, loading goes on by itself."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise LoadError(self._unstarted(error)) from error
        try:
            self._scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
            self._process = await asyncio.create_subprocess_exec(
                *self._command(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env=os.environ | {"TMPDIR": str(self._scratch)},  # a killed engine can't clean up after itself
                start_new_session=True,  # Ctrl-C is for the server, which then tells the engine
            )
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException as error:
            ours.close()
            self._remove_scratch()
            if isinstance(error, OSError):
                raise LoadError(self._unstarted(error)) from error
            raise
        finally:
            theirs.close()
        self._load_result = asyncio.get_running_loop().create_future()
        self._claim.begin(self._process.pid)
        self._send(LoadModel(self.spec))
        self._reading = asyncio.create_task(self._read(reader), name=f"engine {self.spec.name}")

    async def wait_loaded(self) -> Loaded:
        """The Loaded record; raises what a LoadFailed record stands for, or LoadError when the engine died."""
        if self._load_result is None:
            raise RuntimeError("wait_loaded was called before start")
        return await asyncio.shield(self._load_result)

    async def wait_ended(self) -> None:
        """Returns when the process is gone and every request has been told; `death` then says how."""
        await self._ended.wait()

    @property
    def last_moved(self) -> float:
        """When the engine last reported, or got the first request after a rest; by time.monotonic."""
        return self._moved

    @property
    def stalled_seconds(self) -> float:
        """How long the engine has reported nothing while it owes somebody an end; 0 while it owes nobody."""
        return time.monotonic() - self._moved if self._owed and self.state == "ready" else 0.0

    @property
    def how_it_died(self) -> str:
        """A sentence without its full stop; empty while the engine lives."""
        return self._obituary

    def require_ready(self) -> Loaded:
        """What was loaded; raises EngineUnavailableError with the reason when no request can be served."""
        if self.state == "ready" and not self._parting and self.loaded is not None:
            return self.loaded
        raise self._unavailable()

    def generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str = "",
        origin: Origin | None = None,
    ) -> OutputStream:
        """Sends a request, whose parts are those of Generate; the outputs come from the stream, which must be closed.
        Its times count from its origin, or from now.

        Raises EngineUnavailableError when the engine is not ready.
        """
        self.require_ready()
        stream = OutputStream(request_id, len(prompt), self._metrics, self._forget, origin, deadline)
        self._requests[request_id] = stream
        if not self._owed:
            self._moved = time.monotonic()
        self._owed.add(request_id)
        self._send(Generate(request_id, tuple(prompt), sampling, priority, deadline, cache_salt))
        return stream

    def _unstarted(self, error: OSError) -> str:
        return f"the engine of model {self.spec.name!r} could not be started: {error}"

    def _forget(self, request_id: str, abort: bool) -> None:
        """Called by a stream that is closed: it gets no more outputs."""
        if self._requests.pop(request_id, None) is not None and abort:
            self._send(Abort(request_id))

    async def shutdown(self, why: str = SHUTTING_DOWN) -> None:
        """Ends the process: a Shutdown record, then end-of-file, then SIGTERM, then SIGKILL. Safe to call twice.

        `why` is what requests are told that are still open, and who waits for it to be loaded.
        """
        self._parting = self._parting or why
        process = self._process
        if process is None:
            return
        if self.state == "ready":
            self._send(Shutdown())
            await self._gone_within(SHUTDOWN_SECONDS)
        if self._writer is not None:
            self._writer.close()
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                self.kill(number)
            if await self._gone_within(_KILL_SECONDS):
                break
        await process.wait()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        self._claim.ended()
        await asyncio.to_thread(self._remove_scratch)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the engine's process group at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def condemn(self, verdict: str) -> None:
        """Kills an engine that does not move; `verdict` says why, where it would else say which signal it was."""
        self._verdict = verdict
        self.kill()

    def end_requests(self, sentence: str) -> Cut:
        """Ends every open request with an error, and says what that cut; the engine forgets them at its next step."""
        cut = self.open_work
        for request_id, stream in self._requests.items():
            stream.deliver(EngineUnavailableError(sentence))
            self._send(Abort(request_id))
        return cut

    @property
    def open_work(self) -> Cut:
        """What would be cut if all ended now."""
        open_streams = [stream for request_id, stream in self._requests.items() if request_id in self._owed]
        return Cut(len(open_streams), sum(stream.tokens for stream in open_streams))

    def _remove_scratch(self) -> None:
        """Removes what the engine kept on disk. What has been written there is its own, and it is gone."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    async def _gone_within(self, seconds: float) -> bool:
        if self._process is None:
            return True
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _send(self, record: Record) -> None:
        """Queues a frame. No waiting: what is open is bounded, and so is what can be queued for a slow engine."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(record))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Takes in records until the end-of-file, or until a frame makes no sense; either way the engine is gone."""
        problem = ""
        try:
            while True:
                length = frame_length(await reader.readexactly(LENGTH_PREFIX_BYTES))
                self._take(decode_from_engine(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (ValueError, msgspec.DecodeError) as error:
            self.death = "protocol"
            problem = f" after sending a record that can't be read ({error})"
            log.error("engine of model %r: %s", self.spec.name, problem.strip())
        finally:
            await self._died(problem)

    def _take(self, record: FromEngine) -> None:
        match record:
            case LoadProgress():
                if not record.bytes_total:  # a phase that reads nothing; what was read stays read
                    record = LoadProgress(record.phase, self.progress.bytes_loaded, self.progress.bytes_total)
                self.progress = record
                self._metrics.loading(record)
            case RoomWanted(shortage=shortage):
                self._asking = asyncio.create_task(self._ask(shortage), name=f"room {self.spec.name}")
            case Planned():
                self._claim.planned(record)
            case Loaded():
                self._claim.loaded(record.memory)
                self.loaded = record
                self.state = "ready"
                self.progress = LoadProgress("ready", self.progress.bytes_total, self.progress.bytes_total)
                self._metrics.loaded(record)
                self._settle(record)
            case MemoryChanged(memory=memory) if self.loaded is not None:
                self.loaded = msgspec.structs.replace(self.loaded, memory=memory)
                self._metrics.memory_changed(memory)
            case LoadFailed():
                self._settle(load_failure(record))
            case StepReport(outputs=outputs):
                self._moved = time.monotonic()
                self._metrics.step(record)
                generated = 0
                for output in outputs:
                    if output.finish_reason is not None:
                        self._owed.discard(output.request_id)
                    stream = self._requests.get(output.request_id)
                    if stream is not None:  # else it was aborted a moment ago
                        stream.deliver(output)
                        generated += len(output.token_ids)
                self._metrics.generated(generated)

    async def _ask(self, shortage: Shortage | None) -> None:
        self._send(await self._claim.ask(shortage))

    def _settle(self, result: Loaded | ServerError) -> None:
        future = self._load_result
        if future is None or future.done():
            return
        if isinstance(result, Loaded):
            future.set_result(result)
        else:
            future.set_exception(result)
            future.exception()  # somebody may have stopped waiting; that is no reason for a warning

    async def _died(self, problem: str) -> None:
        """The process has closed its end: finds out how it ended, and tells everyone who waits."""
        if self._writer is not None:
            self._writer.close()
        if self._asking is not None:
            self._asking.cancel()
        if not self._parting and not await self._gone_within(_KILL_SECONDS):
            self.kill()
            await self._gone_within(_KILL_SECONDS)
        self._obituary = f"the engine of model {self.spec.name!r} {self._how_it_ended()}{problem}"
        self.state = "dead"
        self._metrics.died()
        if self.loaded is not None and not self._parting:
            log.error("%s; %d requests were open, which had got %d tokens", self._obituary, *self.open_work)
        self._settle(self._unavailable() if self._parting else LoadError(f"{self._obituary} while loading"))
        self._owed.clear()
        for stream in self._requests.values():
            stream.deliver(self._unavailable())
        if not self._parting:  # else the process may still run; shutdown waits for it
            await asyncio.to_thread(self._remove_scratch)
            self._claim.ended()
        self._ended.set()

    def _how_it_ended(self) -> str:
        """Says it in words, and keeps the reason."""
        code = self._process.returncode if self._process else None
        if self._verdict:
            self.death = "stuck"
            return self._verdict
        self.death = self.death or ("signal" if code is not None and code < 0 else "exit")
        if code is None:
            return "does not answer"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
            return f"was killed by signal {-code} ({name})"
        return f"ended with exit code {code}"

    def _unavailable(self) -> EngineUnavailableError:
        if self._parting:
            return EngineUnavailableError(self._parting)
        if self.state == "dead":
            return EngineUnavailableError(self._obituary)
        return EngineUnavailableError(
            f"model {self.spec.name!r} is still loading (phase {self.progress.phase!r}, "
            f"{self.progress.bytes_loaded} of {self.progress.bytes_total} bytes)"
        )
