"""A small engine process without a model, for testing what talks to one. Not a test.

Speaks the records of server/records.py over the descriptor in argv[1]. It answers every request with its own prompt,
one token per step and request, and draws none: of the sampling parameters it honours the limits and the logprobs. A
request ends at its deadline, and a prompt that its tenant has sent before is said to be cached. What else it does comes
as ModelSpec.quantization:

    {"fail": [kind, message]}     answers LoadModel with LoadFailed
    {"die_while_loading": CODE}   exits with that code before Loaded
    {"load_seconds": S}           takes that long to load, in slices, reporting progress
    {"device_used": N}            is on a device of which the driver says that so many bytes came into use
    {"step_seconds": S}           takes that long per step
    {"die_after_steps": N}        kills itself with SIGKILL after N steps
    {"exit_after_steps": N}       ends with exit code 3 after N steps
    {"hang_after_steps": N}       stops reading and answering after N steps
    {"refuse": SENTENCE}          ends every request with that error; {0.priority} in it is the request's
    {"garbage_after_steps": N}    sends a frame that is no record
    {"litter": NAME}              leaves a file of that name in its temporary directory
    {"lives": [FILE, [SCRIPT, ...]]}  the first engine with this FILE does the first script, the next one the next, ...
    {"plan": {"device": D, "capacity": C, "peak": P, "kept": K}}  asks for P bytes on a device that has C
    {"max_model_len": N}, {"eos": [ids]}, {"vocab_size": N}, {"sampling_defaults": {...}}
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from server.records import (
    LENGTH_PREFIX_BYTES,
    Abort,
    Generate,
    LayerMemory,
    Loaded,
    LoadFailed,
    LoadModel,
    LoadProgress,
    MemoryReport,
    ModelInfo,
    Planned,
    Record,
    RoomWanted,
    SequenceOutput,
    Shortage,
    Shutdown,
    StepReport,
    TokenLogprobs,
    decode_to_engine,
    encode_frame,
    frame_length,
)


def command(descriptor: int) -> list[str]:
    """How a test starts this engine: the `command` of EngineClient and create_app."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {_START}", str(descriptor)]


ROOT = Path(__file__).parent.parent.parent
_START = "import tests.server.scripted_engine as engine; engine.main(int(sys.argv[1]))"
BLOCKS = 100


def logprobs(token: int, top: int) -> TokenLogprobs:
    """Numbers that say which token was scored: -1/8 of its id; the likeliest are that token and those after it."""
    return TokenLogprobs(
        -token / 8, tuple(token + place for place in range(top)), tuple(-(token + place) / 8 for place in range(top))
    )


def one_of_many_lives(file: str, scripts: list[dict[str, Any]]) -> dict[str, Any]:
    """The script of this life; the file holds a byte for each one before."""
    with Path(file).open("ab") as lived:
        before = lived.tell()
        lived.write(b".")
    return scripts[min(before, len(scripts) - 1)]


class Engine:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.script: dict[str, Any] = {}
        self.running: dict[str, tuple[Generate, int]] = {}
        self.ended: list[SequenceOutput] = []
        self.seen: set[tuple[str, tuple[int, ...]]] = set()
        self.steps = 0

    def send(self, record: Record) -> None:
        self.connection.sendall(encode_frame(record))

    def receive(self) -> Any:
        prefix = self._exactly(LENGTH_PREFIX_BYTES)
        return decode_to_engine(self._exactly(frame_length(prefix)))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.connection.recv(count - len(data))
            if not part:
                sys.exit(0)
            data += part
        return data

    def load(self) -> None:
        spec = self.receive().spec
        self.script = spec.quantization if isinstance(spec.quantization, dict) else {}
        if "lives" in self.script:
            self.script = one_of_many_lives(*self.script["lives"])
        if "litter" in self.script:
            Path(tempfile.gettempdir(), self.script["litter"]).write_bytes(b"gigabytes")
        if "plan" in self.script:
            self.plan(**self.script["plan"])
        self.send(LoadProgress("weights", 0, 1000))
        if "fail" in self.script:
            self.send(LoadFailed(*self.script["fail"]))
            sys.exit(1)
        if "die_while_loading" in self.script:
            sys.exit(self.script["die_while_loading"])
        for part in range(10):
            self.send(LoadProgress("weights", 100 * part, 1000))
            if select.select([self.connection], [], [], self.script.get("load_seconds", 0) / 10)[0]:
                sys.exit(0)
        self.send(LoadProgress("weights", 1000, 1000))
        self.send(LoadProgress("warmup"))
        info = ModelInfo(
            max_model_len=self.script.get("max_model_len", 512),
            vocab_size=self.script.get("vocab_size", 320),
            eos_token_ids=tuple(self.script.get("eos", [2])),
            architecture="ScriptedForCausalLM",
            dtype="float32",
            device="cpu",
            quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            prefix_caching=True,
            decoder_prompt_tokens=self.script.get("decoder_prompt_tokens", 0),
            sampling_defaults=self.script.get("sampling_defaults", {}),
        )
        used = self.script.get("device_used")
        memory = MemoryReport(
            device="cpu" if used is None else "test:0",
            planned={"packed_weights": 4096, "kv_cache": 1024},
            measured={"packed_weights": 4096, "kv_cache": 1024},
            process={"pss": 6000} if used is None else {"device_used": used},
        )
        layers = (LayerMemory("model.layers.0", "nf4", {"packed_weights": 4096}),)
        self.send(Loaded(info, memory, 0.25, layers=layers))

    def plan(self, device: str, capacity: int, peak: int, kept: int) -> None:
        shortage = None
        while True:
            self.send(RoomWanted(shortage))
            granted = self.receive()
            available = capacity - sum(granted.promised.get(device, {}).values())
            shortage = Shortage(device, peak, available)
            if peak <= available:
                break
            if not granted.more:
                self.send(LoadFailed("does_not_fit", f"it needs {peak} bytes, but {available} are free", shortage))
                sys.exit(1)
        self.send(Planned({device: peak}, {device: kept}))

    def serve(self) -> None:
        while True:
            while select.select([self.connection], [], [], 0 if self.running or self.ended else None)[0]:
                record = self.receive()
                match record:
                    case Generate() if "refuse" in self.script or "fault" in self.script:
                        refused = "refuse" in self.script
                        sentence = str(self.script["refuse" if refused else "fault"]).format(record)
                        self.ended.append(
                            SequenceOutput(record.request_id, finish_reason="error", error=sentence, refused=refused)
                        )
                    case Generate():
                        self.running[record.request_id] = (record, 0)
                    case Abort(request_id=request_id):
                        if self.running.pop(request_id, None) is not None:
                            self.ended.append(SequenceOutput(request_id, finish_reason="abort"))
                    case Shutdown():
                        sys.exit(0)
                    case LoadModel():
                        sys.exit(9)
            self.step()

    def step(self) -> None:
        outputs = [*self.ended]
        self.ended.clear()
        running = len(self.running)
        for request_id, (request, done) in list(self.running.items()):
            if request.deadline is not None and request.deadline <= time.monotonic():
                del self.running[request_id]
                outputs.append(SequenceOutput(request_id, finish_reason="timeout", error="the time was up"))
                continue
            sent_before = (request.cache_salt, request.prompt) in self.seen and request.sampling.prompt_logprobs is None
            cached = len(request.prompt) - 1 if sent_before and not done else 0
            self.seen.add((request.cache_salt, request.prompt))
            token = request.prompt[done % len(request.prompt)]
            finish = None
            if token in request.sampling.stop_token_ids:
                finish = "stop"
            elif done + 1 == request.sampling.max_tokens:
                finish = "length"
            self.running[request_id] = (request, done + 1)
            if finish is not None:
                del self.running[request_id]
            sampling, rest = request.sampling, request.prompt[1:] if done == 0 else ()
            scored = (
                tuple(logprobs(one, top) for one in tokens) if top is not None else ()
                for tokens, top in (((token,), sampling.logprobs), (rest, sampling.prompt_logprobs))
            )
            outputs.append(SequenceOutput(request_id, (token,), finish, None, False, *scored, cached_tokens=cached))  # type: ignore[arg-type]
        time.sleep(self.script.get("step_seconds", 0))
        self.steps += 1
        self.send(StepReport(self.steps, tuple(outputs), running, 0, 0, running, 0.01, len(self.running), BLOCKS))
        self.misbehave()

    def misbehave(self) -> None:
        if self.steps == self.script.get("die_after_steps"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == self.script.get("exit_after_steps"):
            sys.exit(3)
        if self.steps == self.script.get("hang_after_steps"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(60)
        if self.steps == self.script.get("garbage_after_steps"):
            self.connection.sendall(b"\x02\x00\x00\x00{}")


def main(descriptor: int) -> None:
    engine = Engine(socket.socket(fileno=descriptor))
    try:
        engine.load()
        engine.serve()
    except ConnectionError:
        sys.exit(0)
