"""An engine process: `python -P -m server.engine.process FD`, one model behind one end of a socketpair.

    1. a reader thread starts: frames become records in the inbox; end-of-file ends the process at once, also in
       the middle of loading, because then nobody is left to serve
    2. the first record is LoadModel: the plan from headers, then weights, cache, a first step; progress goes out
    3. Loaded, and the loop runs until a Shutdown - or LoadFailed with one sentence, and exit code 1

SIGINT is ignored: Ctrl-C reaches the whole terminal group, and the HTTP process decides what it means. SIGTERM ends
the process. Torch is imported late, so that end-of-file is heard from the first millisecond on.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from server.engine.blocks import BlockPool
from server.engine.loop import EngineLoop
from server.engine.scheduler import Scheduler
from server.errors import ConfigError, DoesNotFitError, LoadError
from server.records import (
    KV_BLOCK_TOKENS,
    LENGTH_PREFIX_BYTES,
    SCRATCH_PREFIX,
    FailureKind,
    GroupQuality,
    LayerMemory,
    Loaded,
    LoadFailed,
    LoadModel,
    LoadPhase,
    LoadProgress,
    ModelSpec,
    Plan,
    Record,
    RoomGranted,
    RoomWanted,
    Shortage,
    Shutdown,
    ToEngine,
    decode_to_engine,
    encode_frame,
    frame_length,
)

if TYPE_CHECKING:
    from server.model.load import LoadedModel

log = logging.getLogger(__name__)

EXIT_FINE: Final = 0
EXIT_LOAD_FAILED: Final = 1
_PROGRESS_SECONDS: Final = 0.05
QUIET: Final = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
OPENMP_WAITING: Final = ("GOMP_SPINCOUNT", "20000")
"""How often a thread that torch and our kernels share looks for work before it sleeps: some 0.3 milliseconds, longer
than Python takes from one operator of a step to the next. By default it is fifteen times as long, which takes the cores
from the HTTP process and from other engines; without any, each operator wakes its threads."""
OPENMP_WAITING_BY_USER: Final = "OMP_WAIT_POLICY"
"""Where this is set, it decides."""


class Connection:
    """The engine's end of the socket: one thread reads, the main thread writes."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self.serving = False
        """Once true, a Shutdown waits for the current step; before, it ends the process at once."""
        self.loaded: LoadedModel | None = None
        """Once there, so that what it keeps on disk goes when the process does."""

    def start_reading(self) -> None:
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()

    def send(self, record: Record) -> None:
        try:
            self._socket.sendall(encode_frame(record))
        except OSError:
            self.leave(EXIT_FINE)  # the other end is gone, which the reader is about to learn too

    def ask(self, wanted: RoomWanted) -> RoomGranted:
        """The answer; it may take as long as others load."""
        self.send(wanted)
        answer = self.inbox.get()
        if not isinstance(answer, RoomGranted):
            raise LoadError(f"the HTTP process answered a RoomWanted with a {type(answer).__name__}")
        return answer

    def leave(self, code: int) -> NoReturn:
        """Ends the process from whichever thread, without the interpreter's farewell to gigabytes of tensors."""
        if self.loaded is not None and self.loaded.offload is not None:
            self.loaded.offload.cleanup()
        scratch = Path(tempfile.gettempdir())
        if scratch.name.startswith(SCRATCH_PREFIX):  # else it is everybody's
            shutil.rmtree(scratch, ignore_errors=True)
        logging.shutdown()
        os._exit(code)

    def _read(self) -> None:
        try:
            while (record := self._receive()) is not None:
                if isinstance(record, Shutdown) and not self.serving:
                    self.leave(EXIT_FINE)
                self.inbox.put(record)
        except ConnectionResetError:
            pass  # the other end went with reports unread: end of file all the same
        except (ValueError, msgspec.DecodeError, OSError):
            log.exception("the connection to the HTTP process broke")
            self.leave(EXIT_LOAD_FAILED)
        self.leave(EXIT_FINE)

    def _receive(self) -> ToEngine | None:
        """The next record; None at end-of-file."""
        prefix = self._exactly(LENGTH_PREFIX_BYTES)
        if prefix is None:
            return None
        body = self._exactly(frame_length(prefix))
        return None if body is None else decode_to_engine(body)

    def _exactly(self, count: int) -> bytes | None:
        received = bytearray()
        while len(received) < count:
            part = self._socket.recv(count - len(received))
            if not part:
                return None
            received += part
        return bytes(received)


def main(descriptor: int) -> NoReturn:
    """Runs one engine on an open socket's descriptor; ends the process itself, with 0 or 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(QUIET)
    if OPENMP_WAITING_BY_USER not in os.environ:
        os.environ.setdefault(*OPENMP_WAITING)
    end = socket.socket(fileno=descriptor)
    end.setblocking(True)
    connection = Connection(end)
    connection.start_reading()
    first = connection.inbox.get()
    spec = first.spec if isinstance(first, LoadModel) else ModelSpec(name="(none)", path="")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{spec.name}: %(levelname)s: %(message)s")
    try:
        if not isinstance(first, LoadModel):
            raise ConfigError(f"the first record must be LoadModel and was {type(first).__name__}")
        loop = load_engine(spec, connection)
    except Exception as error:
        connection.send(explain(error, spec))
        connection.leave(EXIT_LOAD_FAILED)
    try:
        loop.run()
    except BaseException:
        log.exception("the engine's loop ended by an error of its own")
        connection.leave(EXIT_LOAD_FAILED)
    connection.leave(EXIT_FINE)


def load_engine(spec: ModelSpec, connection: Connection) -> EngineLoop:
    """From a spec to a loop that is ready to run, with progress and finally Loaded sent on the way."""
    started = time.monotonic()
    _phase(connection, "start")
    gc.disable()  # 2,500 modules come and stay: looking for garbage among them is a twelfth of their time
    import torch  # here, because it takes a second or more, in which end-of-file must already be heard

    from quant.memory import measure_layers
    from quant.native import set_batch_invariant
    from server.memory import allocator
    from server.memory.ledger import Baseline, Ledger
    from server.memory.upkeep import Upkeep
    from server.model.load import check_path, load_model
    from server.model.probe import choose_runner, warm_up

    gc.enable()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    set_batch_invariant(spec.batch_invariant)
    check_path(spec)
    _phase(connection, "plan")
    plan = plan_in_turn(spec, connection)
    spec = msgspec.structs.replace(spec, max_batch_tokens=plan.max_batch_tokens)
    pool = BlockPool(plan.kv_tokens // KV_BLOCK_TOKENS)
    scheduler = Scheduler(
        pool,
        max_batch_tokens=plan.max_batch_tokens,
        max_sequences=spec.max_sequences,
        max_model_len=plan.sequence_tokens,
        prefix_caching=spec.prefix_caching,
        speculative_tokens=spec.speculative_tokens,
    )
    baseline = Baseline.take(plan.device)
    loaded = connection.loaded = load_model(spec, _Progress(connection))
    _phase(connection, "cache")
    runner = choose_runner(loaded.model, spec, blocks=pool.total, max_model_len=plan.max_model_len)
    _phase(connection, "warmup")
    warm_up(runner)
    gc.collect()
    gc.freeze()  # what is loaded stays loaded: the collector need not walk a model's modules again and again
    allocator.keep_much()
    ledger = Ledger(loaded.model, runner, plan.device, plan.components, baseline)
    ledger.begin()
    loop = EngineLoop(
        scheduler,
        runner,
        connection.inbox,
        connection.send,
        vocab_size=loaded.vocab_size,
        upkeep=Upkeep(ledger, connection.send),
    )
    layers = tuple(LayerMemory(*each) for each in measure_layers(loaded.model))
    memory = ledger.report()
    _phase(connection, "ready")
    connection.serving = True
    info = loaded.info(
        plan.max_model_len,
        prefix_caching=scheduler.prefix_caching,
        speculative_tokens=scheduler.speculative_tokens,
        batching=runner.batching,
        decoder_prompt_tokens=len(runner.decoder_prompt),
    )
    quality = tuple(
        GroupQuality(one.group, one.format, one.relative_error, one.outlier_share) for one in loaded.quality
    )
    seconds = time.monotonic() - started
    connection.send(Loaded(info, memory, load_seconds=seconds, kv_blocks=pool.total, quality=quality, layers=layers))
    return loop


def plan_in_turn(spec: ModelSpec, connection: Connection) -> Plan:
    """The plan, once it is this engine's turn and what others have been promised is left to them."""
    from server.memory.machine import Share, anonymous_bytes
    from server.memory.plan import make_plan, promise, require_fit, runtime_of

    runtime: Share | None = None
    shortage: Shortage | None = None
    while True:
        granted = connection.ask(RoomWanted(shortage))
        promised = {device: sum(models.values()) for device, models in granted.promised.items()}
        plan = make_plan(spec, promised=promised, runtime=runtime)
        runtime = runtime_of(plan)  # the same in each try
        try:
            require_fit(plan)
        except DoesNotFitError as error:
            if granted.more and error.shortage is not None:
                shortage = error.shortage
                continue
            raise DoesNotFitError(f"{error}{_promises(granted, error.shortage)}", error.shortage) from error
        connection.send(promise(plan, anonymous_bytes(os.getpid()) or 0))
        return plan


def _promises(granted: RoomGranted, shortage: Shortage | None) -> str:
    """What a refusal adds where memory looks free and is not."""
    models = granted.promised.get(shortage.device, {}) if shortage is not None else {}
    if not models:
        return ""
    parts = ", ".join(f"{name!r} {size:,}" for name, size in models.items())
    return f"; what other models have been promised and have not taken yet does not count as free: {parts}"


def explain(error: Exception, spec: ModelSpec) -> LoadFailed:
    """An error of loading as the record that the HTTP process shows: its kind, and one sentence without a traceback."""
    try:
        from quant.errors import CheckpointError, QuantConfigError, QuantError
    except ImportError:
        log.exception("quant cannot be imported")
        return LoadFailed("internal", f"the engine's packages are not in order: {_one_line(error)}")
    kind: FailureKind
    match error:
        case ConfigError() | QuantConfigError():
            kind = "config"
        case DoesNotFitError():
            return LoadFailed("does_not_fit", _one_line(error), error.shortage)
        case LoadError() | CheckpointError():
            kind = "checkpoint"
        case QuantError():
            kind = "internal"
        case _:
            log.error("model %r did not load", spec.name, exc_info=error)
            return LoadFailed(
                "internal",
                f"model {spec.name!r} did not load because of an error that nobody foresaw "
                f"({type(error).__name__}: {_one_line(error)}); the engine's log has the details",
            )
    return LoadFailed(kind, _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _phase(connection: Connection, phase: LoadPhase) -> None:
    connection.send(LoadProgress(phase))


class _Progress:
    """Sends bytes loaded, now and then: a checkpoint may have ten thousand tensors, and nobody reads that fast."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = -_PROGRESS_SECONDS

    def __call__(self, loaded: int, total: int) -> None:
        now = time.monotonic()
        if loaded >= total or now - self._last >= _PROGRESS_SECONDS:
            self._last = now
            self._connection.send(LoadProgress("weights", loaded, total))


if __name__ == "__main__":
    main(int(sys.argv[1]))
