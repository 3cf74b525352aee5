"""Seconds and memory of quantizing a 1.1-billion-parameter checkpoint to NF4 with double quantization.

    python -m benchmarks.quantize_speed [--bitsandbytes DIR] [--repeats 3 1] [--directory DIR]

Three things are timed, each run in a process of its own: *quantizing*, which reads the weight of every linear layer
but the output head from the mapped file and packs it, one after the other, keeping the packed ones; *searching*, the
same with `bnb_4bit_search`, which bitsandbytes does not have; and *loading*, the whole of transformers'
from_pretrained. Runs of Halfbyte and of bitsandbytes alternate and medians are reported; the seconds of processor time
beside them do not count waiting for a busy machine. The file is read before each run, so that both find it in the page
cache. Memory is the highest anonymous memory above what the process held before.

bitsandbytes is found in this environment or in DIR (`pip install --no-deps --target DIR bitsandbytes==0.50.2`); without
it the table says so. Results: benchmarks/results/quantize_speed.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks import RESULTS
from benchmarks.hardware import describe
from benchmarks.load_memory import MB, SAMPLE_SECONDS, make_checkpoint, sample

LIBRARIES: Final = ("halfbyte", "bitsandbytes")
TASKS: Final = {"quantizing": LIBRARIES, "searching": LIBRARIES[:1], "loading": LIBRARIES}
"""What is timed, and by which libraries."""
ABSENT: Final = "not installed"
TARGET_SECONDS: Final = 4.0
"""For quantizing, on two cores."""

CHILD: Final = """
import sys, time, torch, transformers
task, library, path = sys.argv[1:]
transformers.logging.disable_progress_bar()
if library == "halfbyte":
    import quant
    from quant.state import Packed4bit
    Config = quant.BitsAndBytesConfig
    pack = lambda weight: Packed4bit.quantize(weight, "nf4", double_quant=True, search=task == "searching")
else:
    import bitsandbytes
    Config = transformers.BitsAndBytesConfig
    pack = lambda weight: bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4")
config = Config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16)

def quantizing():
    from safetensors import safe_open
    with safe_open(path + "/model.safetensors", "pt") as file:
        return [pack(file.get_tensor(name)) for name in file.keys() if name.endswith("_proj.weight")]

def loading():
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}, local_files_only=True)

pack(torch.randn(64, 64, dtype=torch.bfloat16))  # what is loaded or started on first use
print("ready", flush=True)
sys.stdin.readline()
wall, processor = time.monotonic(), time.process_time()
kept = {"quantizing": quantizing, "searching": quantizing, "loading": loading}[task]()
print(time.monotonic() - wall, time.process_time() - processor, flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Run:
    """One child process."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    """Anonymous memory at its highest, above the start."""


@dataclass(frozen=True)
class Result:
    """The medians of one task by one library."""

    task: str
    library: str
    seconds: float
    processor_seconds: float
    peak_bytes: int
    runs: list[Run]


def run(task: str, library: str, checkpoint: Path, search_path: Path | None) -> Run:
    """Times one task in a process of its own, whose memory is sampled from here."""
    environment = os.environ | ({} if search_path is None else {"PYTHONPATH": str(search_path)})
    command = [sys.executable, "-c", CHILD, task, library, str(checkpoint)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        if child.stdin is None or child.stdout is None or child.stderr is None:
            raise RuntimeError("the child process was started without the pipes that were asked for")
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"{library} did not start: {child.stderr.read()[-2000:]}")
        before, _ = sample(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        peak = before
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not selector.select(timeout=SAMPLE_SECONDS):
                peak = max(peak, sample(child.pid)[0])
        line = child.stdout.readline().split()
        if len(line) != 2:
            raise RuntimeError(f"{task} by {library} failed: {child.stderr.read()[-2000:]}")
        peak = max(peak, sample(child.pid)[0])
        child.stdin.write("end\n")
    return Run(round(float(line[0]), 3), round(float(line[1]), 3), peak - before)


def is_installed(search_path: Path | None) -> bool:
    """Whether a child finds bitsandbytes."""
    environment = os.environ | ({} if search_path is None else {"PYTHONPATH": str(search_path)})
    command = [
        sys.executable,
        "-c",
        "import importlib.util as u; raise SystemExit(u.find_spec('bitsandbytes') is None)",
    ]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def read(path: Path) -> None:
    """Brings a file into the page cache."""
    with path.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def table(results: list[Result], has_bitsandbytes: bool) -> str:
    """The medians as Markdown, the machine and its load named below them."""
    lines = [
        "# Quantizing 1.1 billion parameters to NF4 with double quantization",
        "",
        "bfloat16, Llama shape, 154 linear layers; medians of alternating runs, file in the page cache. "
        "Made by `python -m benchmarks.quantize_speed`.",
        "",
        "| task | library | runs | seconds | processor seconds | peak memory above the start |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for task in TASKS:
        for result in (each for each in results if each.task == task):
            lines.append(
                f"| {task} | {result.library} | {len(result.runs)} | {result.seconds:.2f} "
                f"| {result.processor_seconds:.2f} | {result.peak_bytes / MB:.0f} MB |"
            )
        if not has_bitsandbytes and LIBRARIES[1] in TASKS[task]:
            lines.append(f"| {task} | {LIBRARIES[1]} | {ABSENT} | | | |")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines += [
        "",
        f"Target for quantizing on two cores: {TARGET_SECONDS:g} seconds.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in describe().items()) + ".",
        f"Load averages at the end, over 1, 5 and 15 minutes: {load}; above about 1 others were using the machine.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes the two result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitsandbytes", type=Path, help="where bitsandbytes was installed with pip's --target")
    parser.add_argument("--repeats", type=int, nargs=2, default=(3, 1), metavar=LIBRARIES, help="default: 3 1")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    checkpoint = make_checkpoint(arguments.directory)
    has_bitsandbytes = is_installed(arguments.bitsandbytes)
    runs: dict[tuple[str, str], list[Run]] = {}
    repeats = dict(zip(LIBRARIES, arguments.repeats, strict=True))
    for turn in range(max(repeats.values())):
        for task, libraries in TASKS.items():
            for library in (each for each in libraries if turn < repeats[each]):
                if library == LIBRARIES[1] and not has_bitsandbytes:
                    continue
                read(checkpoint / "model.safetensors")
                one = run(task, library, checkpoint, arguments.bitsandbytes if library == LIBRARIES[1] else None)
                runs.setdefault((task, library), []).append(one)
                print(f"{task} {library:14}{one.seconds:8.2f} s", flush=True)
    results = [
        Result(
            task,
            library,
            statistics.median(each.seconds for each in group),
            statistics.median(each.processor_seconds for each in group),
            max(each.peak_bytes for each in group),
            group,
        )
        for (task, library), group in runs.items()
    ]
    text = table(results, has_bitsandbytes)
    print("\n" + text)
    content = {"machine": describe(), "load": os.getloadavg(), "results": [asdict(result) for result in results]}
    (RESULTS / "quantize_speed.json").write_text(json.dumps(content) + "\n")
    (RESULTS / "quantize_speed.md").write_text(text)


if __name__ == "__main__":
    main()
