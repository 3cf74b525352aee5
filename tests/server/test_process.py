"""The engine as a process behind a real socketpair: loading, serving, aborting, dying, and every way not to load."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quant.errors import QuantError
from server.engine.process import Connection, explain, load_engine
from server.errors import ServerError
from server.memory.components import exact
from server.memory.machine import anonymous_bytes
from server.records import (
    KV_BLOCK_TOKENS,
    LENGTH_PREFIX_BYTES,
    Abort,
    FromEngine,
    Generate,
    Loaded,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelSpec,
    Planned,
    Record,
    RoomGranted,
    RoomWanted,
    SamplingParams,
    SequenceOutput,
    Shutdown,
    StepReport,
    decode_from_engine,
    encode_frame,
    frame_length,
)
from tests.tiny_models import VOCABULARY, save_tiny

SECONDS = 120
NOTHING_PROMISED = RoomGranted({}, more=False)


class Engine:
    """The HTTP side of one engine process, spelled out with a blocking socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(SECONDS)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.engine.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()

    def send(self, record: Record) -> None:
        self.socket.sendall(encode_frame(record))

    def receive(self) -> FromEngine:
        return decode_from_engine(self._exactly(frame_length(self._exactly(LENGTH_PREFIX_BYTES))))

    def _exactly(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            part = self.socket.recv(count - len(received))
            if not part:
                raise EOFError(self.stderr())
            received += part
        return received

    def load(self, spec: ModelSpec) -> tuple[Loaded | LoadFailed, list[LoadProgress]]:
        self.send(LoadModel(spec))
        progress: list[LoadProgress] = []
        while isinstance(record := self.receive(), LoadProgress | RoomWanted | Planned):
            if isinstance(record, LoadProgress):
                progress.append(record)
            elif isinstance(record, RoomWanted):
                self.send(NOTHING_PROMISED)
        assert isinstance(record, Loaded | LoadFailed)
        return record, progress

    def outputs(self) -> Iterator[SequenceOutput]:
        while True:
            report = self.receive()
            assert isinstance(report, StepReport)
            yield from report.outputs

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.socket.close()
    engine.process.kill()
    engine.process.communicate()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "model")


def spec(path: Path, /, **changes: Any) -> ModelSpec:
    return ModelSpec(**{"name": "tiny", "path": str(path), "threads": 1, "kv_cache_tokens": 2048, **changes})


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = None  # else generate would take it up again
    ids = torch.tensor([prompt])
    settings = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return list(found[0, len(prompt) :].tolist())


def test_a_model_is_loaded_serves_and_shuts_down(engine: Engine, llama: Path) -> None:
    loaded, progress = engine.load(spec(llama))
    assert isinstance(loaded, Loaded), loaded
    assert [record.phase for record in progress if record.phase != "weights"] == [
        "start",
        "plan",
        "cache",
        "warmup",
        "ready",
    ]
    weights = [record for record in progress if record.phase == "weights"]
    assert weights[-1].bytes_loaded == weights[-1].bytes_total > 0
    assert loaded.info.vocab_size == VOCABULARY
    assert loaded.info.eos_token_ids == (2,)
    assert (loaded.info.max_model_len, loaded.info.dtype, loaded.info.device) == (512, "float32", "cpu")
    assert loaded.info.quantization == {}
    assert exact(loaded.memory.planned) == exact(loaded.memory.measured)
    assert loaded.kv_blocks * KV_BLOCK_TOKENS >= loaded.info.max_model_len
    assert loaded.quality == (), "nothing was quantized"

    prompts = {f"r{i}": [random.randrange(3, VOCABULARY) for _ in range(random.randint(1, 30))] for i in range(4)}
    for name, prompt in prompts.items():
        engine.send(Generate(name, tuple(prompt), SamplingParams(max_tokens=12, temperature=0.0)))
    engine.send(Generate("endless", (5, 6), SamplingParams(max_tokens=500, seed=1)))
    answers: dict[str, list[int]] = {name: [] for name in (*prompts, "endless")}
    ends: dict[str, str] = {}
    for output in engine.outputs():
        answers[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            ends[output.request_id] = output.finish_reason
        if len(ends) == 4 and "endless" not in ends:
            engine.send(Abort("endless"))
        if len(ends) == 5:
            break
    assert ends == {**dict.fromkeys(prompts, "length"), "endless": "abort"}
    assert {name: answers[name] for name in prompts} == {name: greedy(llama, prompts[name], 12) for name in prompts}

    engine.send(Shutdown())
    assert engine.wait() == 0
    assert engine.stderr() == "", "normal operation is quiet"


@pytest.mark.parametrize(
    ("architecture", "asked", "caching"), [("llama", True, True), ("llama", False, False), ("bloom", True, True)]
)
def test_a_prompt_is_found_again_where_that_is_on(
    engine: Engine, tmp_path: Path, architecture: str, asked: bool, caching: bool
) -> None:
    loaded, _ = engine.load(spec(save_tiny(architecture, tmp_path / "model"), prefix_caching=asked))
    assert isinstance(loaded, Loaded), loaded
    assert loaded.info.prefix_caching == caching
    assert loaded.info.batching == ("packed" if architecture == "llama" else "padded")
    assert exact(loaded.memory.planned) == exact(loaded.memory.measured)
    prompt, params = tuple(range(3, 43)), SamplingParams(max_tokens=4, temperature=0.0)
    for name, salt, found in (("a", "", 0), ("b", "", 32), ("c", "another tenant", 0)):
        engine.send(Generate(name, prompt, params, cache_salt=salt))
        outputs = list(islice(engine.outputs(), 4))
        assert [output.cached_tokens for output in outputs] == [found if caching else 0, 0, 0, 0]
        assert outputs[-1].finish_reason == "length"
    engine.send(Generate("late", prompt, params, deadline=time.monotonic()))
    assert next(engine.outputs()).finish_reason == "timeout"


def test_what_is_promised_to_others_is_left_to_them(engine: Engine, llama: Path) -> None:
    engine.send(LoadModel(spec(llama)))
    while not isinstance(record := engine.receive(), RoomWanted):
        assert isinstance(record, LoadProgress)
    assert record.shortage is None
    engine.send(RoomGranted({"cpu": {"a": 2**59, "b": 2**59}, "cuda:0": {"c": 5}}, more=True))
    again = engine.receive()
    assert isinstance(again, RoomWanted)
    assert again.shortage is not None
    assert (again.shortage.device, again.shortage.available) == ("cpu", 0)
    engine.send(RoomGranted({"cpu": {"a": 2**60}}, more=False))
    failed = engine.receive()
    assert isinstance(failed, LoadFailed), failed
    assert failed.kind == "does_not_fit"
    assert failed.shortage == again.shortage
    assert failed.message.endswith(f"have not taken yet does not count as free: 'a' {2**60:,}")
    assert engine.wait() == 1


def test_the_process_takes_no_more_than_it_was_promised(engine: Engine, llama: Path) -> None:
    engine.send(LoadModel(spec(llama, kv_cache_tokens=2**16)))
    planned: Planned | None = None
    while not isinstance(record := engine.receive(), Loaded):
        if isinstance(record, RoomWanted):
            engine.send(NOTHING_PROMISED)
        elif isinstance(record, Planned):
            planned = record
    assert planned is not None
    assert planned.kept["cpu"] <= planned.peak["cpu"]
    held = anonymous_bytes(engine.process.pid)
    assert held is not None
    # The interpreter imports and compiles a little more while it loads; the cache alone is 128 MiB.
    assert abs(held - planned.kept["cpu"]) < sum(record.memory.planned.values()) / 2


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "head_bytes"),
    [("nf4-dq", "auto", 32 * 4), ("int8", "bfloat16", 32 * 2), ("nf4-dq", "int8", 32 + 4)],
)
def test_quantized_the_plan_is_what_is_measured(llama: Path, quantization: str, kv_dtype: str, head_bytes: int) -> None:
    changes = {"quantization": quantization, "kv_cache_tokens": None, "max_sequences": 3, "max_model_len": 37}
    changes["kv_cache_dtype"] = kv_dtype
    ours, theirs = socket.socketpair()
    with ours, theirs:
        load_engine(spec(llama, threads=None, **changes), granted(theirs))
        *_, loaded = records_in(ours)
    assert isinstance(loaded, Loaded)
    assert exact(loaded.memory.planned) == exact(loaded.memory.measured)
    assert loaded.memory.measured["packed_weights"] > 0
    groups = {quality.group: quality for quality in loaded.quality}
    assert {"self_attn.q_proj", "mlp.down_proj"} <= set(groups)
    assert all(quality.format == quantization and 0 < quality.relative_error < 1 for quality in loaded.quality)
    tokens = -(-3 * 37 // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
    assert loaded.memory.measured["kv_cache"] == tokens * 2 * 2 * 2 * head_bytes
    assert loaded.info.quantization["load_in_8bit"] == (quantization == "int8")


def granted(end: socket.socket) -> Connection:
    """A connection whose other side has answered already."""
    connection = Connection(end)
    connection.inbox.put(NOTHING_PROMISED)
    return connection


def records_in(end: socket.socket) -> list[FromEngine]:
    """What was sent to this end so far."""
    end.setblocking(False)
    data = end.recv(1 << 24)
    records = []
    while data:
        length = LENGTH_PREFIX_BYTES + frame_length(data[:LENGTH_PREFIX_BYTES])
        records.append(decode_from_engine(data[LENGTH_PREFIX_BYTES:length]))
        data = data[length:]
    return records


@pytest.mark.parametrize("moment", ["before the first record", "while loading", "while generating"])
def test_end_of_file_ends_the_process(engine: Engine, llama: Path, moment: str) -> None:
    if moment == "while loading":
        engine.send(LoadModel(spec(llama)))
        assert engine.receive() == LoadProgress("start")
    elif moment == "while generating":
        engine.load(spec(llama))
        engine.send(Generate("a", (5, 6), SamplingParams(max_tokens=500)))
        engine.receive()
    started = time.monotonic()
    engine.socket.close()
    assert engine.wait() == 0
    if moment != "before the first record":  # there, Python itself is still starting
        assert time.monotonic() - started < 30


def test_signals(engine: Engine, llama: Path) -> None:
    engine.load(spec(llama))
    engine.process.send_signal(signal.SIGINT)
    engine.send(Generate("a", (5,), SamplingParams(max_tokens=2)))
    assert [output.finish_reason for output in islice(engine.outputs(), 2)] == [None, "length"]
    engine.process.send_signal(signal.SIGTERM)
    assert engine.wait() == -signal.SIGTERM


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def garble(path: Path) -> None:
    (path / "model.safetensors").write_bytes(os.urandom(5000))


def keep_only_pickles(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def drop_config(path: Path) -> None:
    (path / "config.json").unlink()


def drop_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def lose_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


def nothing(path: Path) -> None:
    """The checkpoint stays as it is: the spec is at fault."""


def damaged(llama: Path, path: Path, damage: Callable[[Path], None]) -> Path:
    path.mkdir()
    for file in llama.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    damage(path)
    return path


def test_a_process_that_cannot_load_says_so_and_exits_with_1(engine: Engine, llama: Path, tmp_path: Path) -> None:
    path = damaged(llama, tmp_path / "model", truncate)
    failed, progress = engine.load(spec(path))
    assert isinstance(failed, LoadFailed), failed
    assert failed.kind == "checkpoint"
    assert f"{path}/model.safetensors is truncated" in failed.message
    assert [record.phase for record in progress] == ["start", "plan"]
    assert engine.wait() == 1
    assert engine.stderr() == "", "the sentence goes over the socket, and nothing else is said"


@pytest.mark.parametrize(
    ("damage", "changes", "kind", "words"),
    [
        (nothing, {"path": "/nowhere/at/all"}, "config", "'/nowhere/at/all', which is not a directory"),
        (drop_config, {}, "config", "has no config.json"),
        (drop_weights, {}, "checkpoint", "model.safetensors"),
        (keep_only_pickles, {}, "checkpoint", "safetensors only"),
        (truncate, {}, "checkpoint", "model.safetensors is truncated"),
        (garble, {}, "checkpoint", "model.safetensors"),
        (lose_a_tensor, {}, "checkpoint", "lacks 1 of the model's tensors: model.layers.1.mlp.up_proj.weight"),
        (change_config(model_type="t5"), {}, "checkpoint", "of the model's tensors: decoder.block.0"),
        (change_config(model_type="whisper"), {}, "checkpoint", "'whisper' is not an encoder-decoder for text"),
        (change_config(model_type="no-such-model"), {}, "checkpoint", "no-such-model"),
        (change_config(intermediate_size=256), {}, "checkpoint", "could not be loaded"),
        (change_config(num_attention_heads=0), {}, "checkpoint", "knows: ZeroDivisionError: "),
        (change_config(num_attention_heads="4"), {}, "checkpoint", "Field 'num_attention_heads' expected int, got str"),
        (change_config(max_position_embeddings=None), {}, "checkpoint", "'max_position_embeddings' expected int"),
        (change_config(max_position_embeddings=512.5), {}, "checkpoint", "'max_position_embeddings' expected int"),
        (
            change_config(vocab_size=0, pad_token_id=None),
            {},
            "checkpoint",
            "'llama' cannot be served: vocab_size is 0; accepted is 1",
        ),
        (change_config(num_hidden_layers=0), {}, "checkpoint", "num_hidden_layers is 0; accepted is 1"),
        (
            change_config(num_hidden_layers=10**30),
            {},
            "checkpoint",
            "num_hidden_layers is 1000000000000000000000000000000; a",
        ),
        (
            change_config(parts=[{"num_experts": 65537}]),
            {},
            "checkpoint",
            "num_experts is 65537; accepted is at most 65536",
        ),
        (change_config(hidden_act="nope"), {}, "checkpoint", "can build from this config: KeyError: 'nope'"),
        (change_config(rope_parameters={"rope_type": "nope"}), {}, "checkpoint", "this config: KeyError: 'nope'"),
        (change_config(dtype="float7"), {}, "checkpoint", "has no attribute 'float7'"),
        (change_config(quantization_config="nf4"), {}, "checkpoint", "config.json is not a config that transformers"),
        (nothing, {"quantization": "nf5"}, "config", "'nf5'; accepted are nf4"),
        (nothing, {"quantization": {"load_in_4bit": True, "load_in_8bit": True}}, "config", "only one of them"),
        (nothing, {"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}}, "config", "'nf3'"),
        (nothing, {"quantization": {"load_in_5bit": True}}, "config", "load_in_5bit"),
        (nothing, {"dtype": "float8"}, "config", "float8"),
        (nothing, {"device": "tpu"}, "config", "tpu"),
        (nothing, {"max_model_len": 100_000}, "config", "100000"),
        (nothing, {"max_sequences": 64, "max_batch_tokens": 8}, "config", "max_sequences is 64"),
        (nothing, {"kv_cache_tokens": 10**15}, "does_not_fit", "needs"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else str(value)),
)
def test_what_does_not_load_becomes_one_sentence(
    llama: Path, tmp_path: Path, damage: Callable[[Path], None], changes: dict[str, Any], kind: str, words: str
) -> None:
    """The same function that the process runs, without the seconds that a process takes to import torch."""
    path = damaged(llama, tmp_path / "model", damage)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises((ServerError, QuantError)) as raised:
        load_engine(spec(path, **changes), granted(theirs))
    failed = explain(raised.value, spec(path))
    assert failed.kind == kind, failed
    assert words in failed.message
    assert "\n" not in failed.message
