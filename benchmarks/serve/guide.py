"""The same load by guidellm, a client that is not ours: do both see the same server?

    python -m benchmarks.serve.guide --guidellm BINARY [--llama-server BINARY --gguf-python PYTHON]
        [--concurrency 1 4 16] [--directory DIR]

guidellm lives in an environment of its own (`pip install guidellm`). It counts tokens by the usage that every chunk
carries. Results: benchmarks/results/serve_guidellm.*.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import RESULTS
from benchmarks.hardware import describe, machine_line
from benchmarks.serve.checkpoint import make_checkpoint, make_gguf
from benchmarks.serve.load import ready
from benchmarks.serve.prompts import prompt
from benchmarks.serve.servers import COMPLETIONS, HOST, OURS, Contestant, Running, llama_server, ours

REQUESTS: Final = {1: 4, 4: 8, 16: 32}
"""By concurrency; twice the concurrency where nothing is said."""
WORDS: Final = 100
TOKENS: Final = 64
LIMIT_SECONDS: Final = 900


@dataclass(frozen=True)
class Seen:
    """One server under one load, as guidellm saw it."""

    server: str
    concurrency: int
    requests: int
    tokens_per_second: float
    first_token_p50_ms: float
    first_token_p95_ms: float
    gap_p50_ms: float
    """Between two tokens of an answer, its mean, the median of all answers."""


def measure(guidellm: Path, running: Running, loads: list[int], directory: Path) -> list[Seen]:
    """One run of guidellm, over all loads. Raises RuntimeError where a request failed."""
    counts = [REQUESTS.get(load, 2 * load) for load in loads]
    prompts, report = directory / "prompts.jsonl", directory / "report.json"
    lines = [{"prompt": prompt(WORDS, f"guide {i}"), "output_tokens_count": TOKENS} for i in range(sum(counts))]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target = f"http://{HOST}:{running.port}"
    backend = f"kind=openai_http,target={target},model={running.contestant.model},request_format={COMPLETIONS}"
    command = [guidellm, "run", "--backend", backend, "--data", f"kind=json_file,path={prompts}"]
    command += ["--profile", json.dumps({"kind": "concurrent", "streams": loads})]
    command += ["--constraint", json.dumps({"kind": "max_requests", "count": counts})]
    command += ["--output", f"kind=json,path={report}", "--disable-console-interactive"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=offline, cwd=directory, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    if done.returncode or not report.is_file():
        raise RuntimeError(f"guidellm ended with {done.returncode}: {done.stderr[-2000:]}")
    runs = json.loads(report.read_text())["benchmarks"]
    return [_seen(running.contestant.name, load, run["metrics"]) for load, run in zip(loads, runs, strict=True)]


def _seen(server: str, concurrency: int, metrics: dict[str, Any]) -> Seen:
    totals = metrics["request_totals"]
    tokens = metrics["output_token_count"]["successful"]
    if totals["successful"] != totals["total"] or tokens["min"] != TOKENS or tokens["max"] != TOKENS:
        raise RuntimeError(
            f"of {totals['total']} requests {totals['successful']} were answered, with {tokens['min']:.0f} to "
            f"{tokens['max']:.0f} tokens where {TOKENS} were asked for"
        )

    def percentile(name: str, which: str) -> float:
        return round(metrics[name]["successful"]["percentiles"][which], 1)

    return Seen(
        server=server,
        concurrency=concurrency,
        requests=totals["total"],
        tokens_per_second=round(metrics["output_tokens_per_second"]["successful"]["mean"], 1),
        first_token_p50_ms=percentile("time_to_first_token_ms", "p50"),
        first_token_p95_ms=percentile("time_to_first_token_ms", "p95"),
        gap_p50_ms=percentile("inter_token_latency_ms", "p50"),
    )


def table(seen: list[Seen], version: str) -> str:
    """The page."""
    lines = [
        "# The same servers, seen by guidellm",
        "",
        f"{version}, closed loop, streamed completions of {TOKENS} tokens for prompts of {WORDS} words. Made by "
        "`python -m benchmarks.serve.guide`.",
        "",
        "| server | concurrency | requests | tokens/s | first token p50 / p95, s | between tokens p50, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.server} | {one.concurrency} | {one.requests} | {one.tokens_per_second:.1f} "
        f"| {one.first_token_p50_ms / 1000:.2f} / {one.first_token_p95_ms / 1000:.2f} | {one.gap_p50_ms:.0f} |"
        for one in seen
    ]
    return "\n".join([*lines, "", machine_line()]) + "\n"


def version_of(guidellm: Path) -> str:
    done = subprocess.run([guidellm, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().replace(" version:", "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve.guide",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--guidellm", type=Path, required=True, metavar="BINARY")
    parser.add_argument("--llama-server", type=Path, metavar="BINARY")
    parser.add_argument("--gguf-python", type=Path, metavar="PYTHON", help="an interpreter that has gguf and numpy")
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(REQUESTS))
    parser.add_argument("--directory", type=Path, help="where the checkpoint is made, and kept")
    arguments = parser.parse_args()
    if (arguments.llama_server is None) != (arguments.gguf_python is None):
        parser.error("--llama-server and --gguf-python come together")
    seen: list[Seen] = []
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = make_checkpoint(arguments.directory or Path(temporary))
        servers: list[Contestant] = [ours(label, checkpoint, quantization) for label, quantization in OURS.items()]
        if arguments.llama_server is not None:
            file = make_gguf(checkpoint, "q4_0", arguments.gguf_python)
            servers.append(llama_server(arguments.llama_server, file, len(os.sched_getaffinity(0))))
        for server in servers:
            with ready(server) as (running, _):
                found = measure(arguments.guidellm, running, arguments.concurrency, Path(temporary))
            print(*found, sep="\n", flush=True)
            seen += found
    record = {"machine": describe(), "results": [asdict(one) for one in seen]}
    (RESULTS / "serve_guidellm.json").write_text(json.dumps(record) + "\n")
    page = table(seen, version_of(arguments.guidellm))
    (RESULTS / "serve_guidellm.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
