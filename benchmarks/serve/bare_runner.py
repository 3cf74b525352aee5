"""Our engine's runner alone, without scheduler, sockets and HTTP: what a single stream could have at most.

    python -m benchmarks.serve.bare_runner CHECKPOINT QUANTIZATION      quantization as JSON

is the process. It says `ready`; each line on standard input is {"prompts": [text, ...], "tokens": N}, answered with a
line of Answers as a client's would be. The prompt is encoded before the time begins; greedy, like the servers' load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.serve.client import Answer
from benchmarks.serve.load import MB, ROOT, Level, pipe, summarise
from benchmarks.serve.processes import MemoryWatch
from benchmarks.serve.prompts import prompt
from benchmarks.serve.servers import CACHE_TOKENS, CONTEXT_TOKENS
from server.engine.process import OPENMP_WAITING
from server.records import KV_BLOCK_TOKENS, ModelSpec, SamplingParams


class BareRunner:
    """The process from outside."""

    def __init__(self, process: subprocess.Popen[str], ready_seconds: float) -> None:
        self._process = process
        self.ready_seconds = ready_seconds

    def measure(self, name: str, requests: int, *, words: int, tokens: int, number: int) -> Level:
        """One request after the other, as a level of concurrency 1."""
        texts = [prompt(words, f"{number} 1 {i}") for i in range(requests)]
        with MemoryWatch(self._process.pid) as watch:
            pipe(self._process.stdin).write(json.dumps({"prompts": texts, "tokens": tokens}) + "\n")
            pipe(self._process.stdin).flush()
            line = pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"{name} ended with {self._process.wait()}")
        answers = [Answer(**answer) for answer in json.loads(line)]
        return summarise(answers, 0.0, name, 1, number, watch.most / MB, self.ready_seconds)


@contextmanager
def bare_runner(checkpoint: Path, quantization: dict[str, Any]) -> Iterator[BareRunner]:
    """The process, loaded."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serve.bare_runner", str(checkpoint), json.dumps(quantization)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict([OPENMP_WAITING]),
        cwd=ROOT,
    ) as process:
        if pipe(process.stdout).readline().strip() != "ready":
            raise RuntimeError(f"the bare runner did not load: it ended with {process.wait()}")
        yield BareRunner(process, time.monotonic() - began)
        pipe(process.stdin).close()


def serve(checkpoint: Path, quantization: dict[str, Any]) -> None:
    """The process from inside."""
    import torch
    import transformers

    import quant
    from server.model.batch import Batch, Chunk, Draw
    from server.model.probe import choose_runner, warm_up
    from server.text.tokenizer import Tokenizer

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=quant.BitsAndBytesConfig(**quantization),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    blocks = CACHE_TOKENS // KV_BLOCK_TOKENS
    limit = min(CONTEXT_TOKENS, model.config.max_position_embeddings)
    spec = ModelSpec("bare", str(checkpoint), max_batch_tokens=limit)
    runner = choose_runner(model, spec, blocks=blocks, max_model_len=limit)
    warm_up(runner)
    tokenizer = Tokenizer.from_directory(checkpoint)
    own = list(range(limit // KV_BLOCK_TOKENS))

    def answer(ids: list[int], count: int) -> Answer:
        """Prefill, then a token a step."""
        result = Answer(time.monotonic(), prompt_tokens=len(ids), completion_tokens=count)
        tokens, start = tuple(ids), 0
        for index in range(count):
            draw = Draw(SamplingParams(max_tokens=count, temperature=0.0), seed=0, index=index)
            step = runner.step(Batch((Chunk("one", tokens, start, own, draw),)))
            result.pieces.append(time.monotonic())
            start += len(tokens)
            tokens = tuple(step.tokens["one"])
        runner.release("one")
        result.ended = result.pieces[-1]
        return result

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        encoded = [tokenizer.encode(text) for text in job["prompts"]]
        print(json.dumps([asdict(answer(ids, job["tokens"])) for ids in encoded]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
