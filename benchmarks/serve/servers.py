"""Who is measured, and how each one is started, made ready and ended. One at a time; each has the whole machine.

All load the same checkpoint and hold CACHE_TOKENS tokens of keys and values. Peers are left out where they are not
installed: their interpreters and binaries come from the command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.serve.processes import tree

HOST: Final = "127.0.0.1"
COMPLETIONS: Final = "/v1/completions"
CACHE_TOKENS: Final = 16384
CONTEXT_TOKENS: Final = 2048
LLAMA_SLOTS: Final = 16
VLLM_DTYPES: Final = {"bf16": "bfloat16", "fp32": "float32"}
"""What vLLM can be given: not every processor has instructions for bfloat16."""
READY_SECONDS: Final = 600.0
STOP_SECONDS: Final = 60.0
HALFBYTE: Final = Path(sys.executable).parent / "halfbyte"

NF4: Final[dict[str, Any]] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
PACKED: Final[dict[str, Any]] = NF4 | {
    "quantize_embeddings": True,
    "module_overrides": {"lm_head": {"load_in_8bit": True, "llm_int8_outliers": "all"}},
}
OURS: Final[dict[str, dict[str, Any]]] = {
    "halfbyte nf4-dq": NF4,
    "halfbyte nf4-dq, embedding nf4, head int8": PACKED,
    "halfbyte nf4-dq, embedding nf4, head int8, int8 activations": PACKED | {"bnb_4bit_activations": "int8"},
}
"""The last one rounds activations to int8, as llama.cpp does; the others compute in bfloat16, as the other peers do."""


@dataclass(frozen=True)
class Contestant:
    """A server that can be measured; `{port}` in the command is replaced."""

    name: str
    command: list[str]
    model: str
    """What requests name."""
    environment: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    """What its requests have beside the common fields."""


@dataclass(frozen=True)
class Running:
    contestant: Contestant
    port: int
    process: subprocess.Popen[bytes]


def ours(name: str, checkpoint: Path, quantization: dict[str, Any], *more: str) -> Contestant:
    """Our server with one quantization config; `more` are further flags."""
    command = [str(HALFBYTE), "serve", str(checkpoint), "--name", "measured", "--port", "{port}", "--host", HOST]
    command += ["--quantization", json.dumps(quantization), "--kv-cache-tokens", str(CACHE_TOKENS)]
    return Contestant(name, [*command, *more], "measured", fields={"ignore_eos": True})


def llama_server(binary: Path, file: Path, threads: int) -> Contestant:
    """llama.cpp's server; it divides its cache among its slots."""
    command = [str(binary), "--model", str(file), "--host", HOST, "--port", "{port}", "--threads", str(threads)]
    command += ["--parallel", str(LLAMA_SLOTS), "--ctx-size", str(CACHE_TOKENS), "--no-webui"]
    return Contestant("llama-server Q4_0, 16 slots", command, "measured", fields={"ignore_eos": True})


def vllm(python: Path, checkpoint: Path, threads: int, dtype: str) -> Contestant:
    """vLLM's CPU build; it is given all cores, of which it would keep one for its HTTP process."""
    command = [str(python.parent / "vllm"), "serve", str(checkpoint), "--served-model-name", "measured"]
    command += ["--host", HOST, "--port", "{port}", "--dtype", VLLM_DTYPES[dtype]]
    command += ["--max-model-len", str(CONTEXT_TOKENS)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Contestant(f"vllm-cpu {dtype}", command, "measured", environment, {"ignore_eos": True})


def transformers_serve(python: Path, checkpoint: Path) -> Contestant:
    """transformers' own server with bitsandbytes; its blocks hold 32 tokens."""
    command = [str(python.parent / "transformers"), "serve", str(checkpoint), "--host", HOST, "--port", "{port}"]
    command += ["--continuous-batching", "--quantization", "bnb-4bit", "--dtype", "bfloat16", "--device", "cpu"]
    command += ["--cb-block-size", "32", "--cb-num-blocks", str(CACHE_TOKENS // 32)]
    return Contestant("transformers serve bnb-4bit", command, str(checkpoint), {"HF_HUB_OFFLINE": "1"})


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(contestant: Contestant) -> Iterator[Running]:
    """The server's process, in a session of its own; at the end it is stopped with everything that it started."""
    port = free_port()
    command = [part.replace("{port}", str(port)) for part in contestant.command]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | contestant.environment, start_new_session=True
        )
        try:
            yield Running(contestant, port, process)
        except Exception as error:
            raise RuntimeError(f"{error}\nThe end of its log:\n{_end(log)}") from error
        finally:
            _stop(process)


def _end(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-3000:].decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    descendants = tree(process.pid)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    for pid in descendants:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + STOP_SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in descendants) and time.monotonic() < deadline:
        time.sleep(0.05)  # until the memory is back: the next one is measured on an empty machine
