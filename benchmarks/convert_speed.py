"""Speed of packing and unpacking weights, in bytes read and written a second, beside what the memory can do.

    python -m benchmarks.convert_speed [--bitsandbytes DIR] [--repeats 9] [--values 134217728]

Every conversion of a tensor much larger than the caches, its output allocated before. In each round every row runs
once, so that a busy moment of the machine does not fall on one of them; each row's median counts. Beside it stand its
best round, which others on the machine disturb least, and the cores that it got: processor time over time. Memory
itself is measured in the same rounds: reading (torch's sum of float32), copying (torch's copy_), and torch's own
conversions between dtypes. bitsandbytes' CPU functions take seconds and allocate their results, so they are timed on
an eighth of the values, beside Halfbyte's operators as torch calls them, which allocate too. bitsandbytes is found in
this environment or in DIR (`pip install --no-deps --target DIR bitsandbytes==0.50.2`); without it the table says so.
Results: benchmarks/results/convert_speed.json and .md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import RESULTS
from benchmarks.hardware import describe
from quant import formats, native, ops

BLOCKSIZE: Final = formats.DEFAULT_BLOCKSIZE
COLUMNS: Final = 4096
DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPERATORS: Final = "halfbyte, allocating"
THEIRS: Final = "bitsandbytes, allocating"
READING: Final = "reading"
COPYING: Final = "copying"


@dataclass(frozen=True)
class Task:
    """One row of the table."""

    name: str
    group: str  # who does it, and how
    bytes: int  # read and written
    run: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One task's rounds."""

    name: str
    group: str
    bytes: int
    median: float  # GB/s
    best: float
    cores: float  # the median of processor time over time
    seconds: list[float]


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_tasks(count: int) -> list[Task]:
    """Reading, copying, and torch's own conversions."""
    values = {name: torch.randn(count).to(dtype) for name, dtype in DTYPES.items()}
    out = {name: torch.empty_like(tensor) for name, tensor in values.items()}
    full, wide = values["float32"], out["float32"]
    tasks = [
        Task(READING, "memory", size(full), full.sum),
        Task(COPYING, "memory", size(full, wide), lambda: wide.copy_(full)),
    ]
    for source, target in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")):
        moved = size(values[source], out[target])
        tasks.append(
            Task(f"{source} to {target}", "torch", moved, lambda s=source, t=target: out[t].copy_(values[s]))  # type: ignore[misc]
        )
    return tasks


def four_bit_tasks(count: int) -> list[Task]:
    """Packing from and unpacking to every dtype in NF4; in FP4 bfloat16 alone."""
    packed = torch.empty(formats.packed_bytes(count), dtype=torch.uint8)
    absmax = torch.empty(formats.block_count(count, BLOCKSIZE))
    tasks = []
    for quant_type, dtype in [*(("nf4", name) for name in DTYPES), ("fp4", "bfloat16")]:
        values = torch.randn(count).to(DTYPES[dtype])
        shared: dict[str, Any] = {
            "n": count,
            "format": native.FORMAT_CODES[quant_type],
            "blocksize": BLOCKSIZE,
            "packed": packed,
            "absmax": absmax,
        }
        code, moved = native.DTYPE_CODES[DTYPES[dtype]], size(values, packed, absmax)
        pack = entry("hb_quantize4", x=values, x_dtype=code, **shared)
        unpack = entry("hb_dequantize4", out=torch.empty_like(values), out_dtype=code, **shared)
        tasks.append(Task(f"{quant_type}: pack {dtype}", "halfbyte", moved, pack))
        tasks.append(Task(f"{quant_type}: unpack to {dtype}", "halfbyte", moved, unpack))
    return tasks


def int8_tasks(count: int) -> list[Task]:
    """Rows of int8."""
    rows = count // COLUMNS
    codes, absmax = torch.empty((rows, COLUMNS), dtype=torch.int8), torch.empty(rows)
    tasks = []
    for name, dtype in DTYPES.items():
        values = torch.randn(rows, COLUMNS).to(dtype)
        shared: dict[str, Any] = {"N": rows, "K": COLUMNS, "codes": codes, "absmax": absmax}
        code, moved = native.DTYPE_CODES[dtype], size(values, codes, absmax)
        pack = entry("hb_quantize8", w=values, w_dtype=code, **shared)
        unpack = entry("hb_dequantize8", out=torch.empty_like(values), out_dtype=code, **shared)
        tasks.append(Task(f"int8: pack {name}", "halfbyte", moved, pack))
        tasks.append(Task(f"int8: unpack to {name}", "halfbyte", moved, unpack))
    return tasks


def absmax_tasks(count: int) -> list[Task]:
    """The second level alone, of as many maxima as the others have values."""
    absmax, offset = torch.rand(count) + 0.5, torch.tensor(1.0)
    shared: dict[str, Any] = {
        "absmax": absmax,
        "blocks": count,
        "offset": offset,
        "nested_blocksize": formats.NESTED_BLOCKSIZE,
        "codes": torch.empty(count, dtype=torch.uint8),
        "nested_absmax": torch.empty(formats.block_count(count, formats.NESTED_BLOCKSIZE)),
    }
    moved = size(absmax, shared["codes"], shared["nested_absmax"])
    back = shared | {"absmax": torch.empty_like(absmax)}
    return [
        Task("second level: pack", "halfbyte", moved, entry("hb_quantize_absmax", **shared)),
        Task("second level: unpack", "halfbyte", moved, entry("hb_dequantize_absmax", **back)),
    ]


def entry(name: str, **fields: Any) -> Callable[[], None]:
    """One call of a compiled entry, which writes to tensors that are there already."""
    kernels, device = native.kernels("cpu"), torch.device("cpu")
    return lambda: kernels.call(name, device, **fields)


def allocating_tasks(count: int, directory: Path | None) -> list[Task]:
    """NF4 and bfloat16 with results allocated in the call: Halfbyte's operators, and bitsandbytes where it is."""
    values = torch.randn(count // COLUMNS, COLUMNS).to(torch.bfloat16)
    packed, absmax = ops.quantize_4bit(values, "nf4", BLOCKSIZE)
    moved = size(values, packed, absmax)
    pack, unpack = "nf4: pack bfloat16", "nf4: unpack to bfloat16"
    tasks = [
        Task(pack, OPERATORS, moved, lambda: ops.quantize_4bit(values, "nf4", BLOCKSIZE)),
        Task(
            unpack,
            OPERATORS,
            moved,
            lambda: ops.dequantize_4bit(packed, absmax, "nf4", BLOCKSIZE, values.shape, values.dtype),
        ),
    ]
    if directory is not None:
        sys.path.append(str(directory))
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ModuleNotFoundError:
        return tasks
    theirs, state = functional.quantize_4bit(values, blocksize=BLOCKSIZE, quant_type="nf4")
    return [
        *tasks,
        Task(pack, THEIRS, moved, lambda: functional.quantize_4bit(values, blocksize=BLOCKSIZE, quant_type="nf4")),
        Task(unpack, THEIRS, moved, lambda: functional.dequantize_4bit(theirs, state)),
    ]


def measure(tasks: list[Task], repeats: int) -> list[Row]:
    """Rounds over all tasks; the first, in which memory is touched for the first time, does not count."""
    seconds: dict[int, list[float]] = {index: [] for index in range(len(tasks))}
    cores: dict[int, list[float]] = {index: [] for index in range(len(tasks))}
    for turn in range(repeats + 1):
        for index, task in enumerate(tasks):
            started, processor = time.perf_counter(), time.process_time()
            task.run()
            taken, processor = time.perf_counter() - started, time.process_time() - processor
            if turn > 0:
                seconds[index].append(taken)
                cores[index].append(processor / taken)
    rows = []
    for index, task in enumerate(tasks):
        speeds = [task.bytes / each / 1e9 for each in seconds[index]]
        used = statistics.median(cores[index])
        rows.append(
            Row(task.name, task.group, task.bytes, statistics.median(speeds), max(speeds), used, seconds[index])
        )
    return rows


def table(rows: list[Row], count: int, repeats: int) -> str:
    """The medians as Markdown, the machine and its load named below them."""
    lines = [
        "# Packing and unpacking weights",
        "",
        f"{count} values, blocks of {BLOCKSIZE}, {torch.get_num_threads()} threads; bytes read and written a second, "
        f"medians of {repeats} alternating rounds, buffers larger than the caches. "
        "Made by `python -m benchmarks.convert_speed`.",
        "",
        "| what | by | cores | GB/s | of copying's | best round | of copying's |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    copying = next(row for row in rows if row.name == COPYING)
    for row in rows:
        lines.append(
            f"| {row.name} | {row.group} | {row.cores:.1f} | {row.median:.3g} | {row.median / copying.median:.0%} "
            f"| {row.best:.3g} | {row.best / copying.best:.0%} |"
        )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    if not any(row.group == THEIRS for row in rows):
        lines += ["", "bitsandbytes: not installed."]
    lines += [
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in describe().items()) + ".",
        f"Load averages at the end, over 1, 5 and 15 minutes: {load}; "
        f"above about {torch.get_num_threads()} others were using the machine.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes the two result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bitsandbytes", type=Path, help="where bitsandbytes was installed with pip's --target")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--values", type=int, default=1 << 27)
    arguments = parser.parse_args()
    count = arguments.values // COLUMNS * COLUMNS
    torch.manual_seed(0)
    tasks = memory_tasks(count) + four_bit_tasks(count) + int8_tasks(count) + absmax_tasks(count)
    tasks += allocating_tasks(count // 8, arguments.bitsandbytes)
    rows = measure(tasks, arguments.repeats)
    text = table(rows, count, arguments.repeats)
    print("\n" + text)
    content = {"machine": describe(), "load": os.getloadavg(), "values": count, "rows": [asdict(row) for row in rows]}
    (RESULTS / "convert_speed.json").write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / "convert_speed.md").write_text(text)


if __name__ == "__main__":
    main()
