"""The plan against the measurement: for every architecture of the tests in every format, and for a billion parameters.

    python -m benchmarks.memory_table [--directory DIR] [--only tiny|large]

Writes the tables of docs/memory.md, between its marks. Tiny models say whether the bytes are right: weights and cache,
as planned and as the loaded tensors have them. One of 1.1 billion random parameters (TinyLlama's shape, written once
under DIR) says where everything else is: each format is loaded in a process of its own, looked at before and after
traffic.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import transformers

from benchmarks.load_memory import make_checkpoint
from quant.config import PRESETS
from quant.errors import QuantError
from server.errors import ServerError
from server.memory.components import ESTIMATED, KV_CACHE, exact
from server.memory.ledger import measure
from server.memory.plan import make_plan
from server.metrics import unaccounted
from server.model.load import load_model
from server.model.probe import choose_runner
from server.records import KV_BLOCK_TOKENS, MemoryReport, ModelSpec
from tests.tiny_models import CONFIGS, MORE_CONFIGS, save_tiny

DOCS: Final = Path(__file__).parent.parent / "docs" / "memory.md"
ARCHITECTURES: Final = (*CONFIGS, *MORE_CONFIGS)
TINY: Final = "tiny"
LARGE: Final = "large"
NOT_SERVED: Final = "not served"
LARGEST_STEP: Final = 2048
TRAFFIC: Final = ((20, 4, 1), (300, 4, 6), (2000, 2, 1))
"""Tokens of prompt, tokens drawn, and sequences at once."""

CHILD: Final = """
import json, sys
import msgspec
from benchmarks.memory_table import report_of
print(json.dumps([msgspec.to_builtins(report) for report in report_of(sys.argv[1], sys.argv[2])]))
"""


def tiny_rows() -> Iterator[list[str]]:
    """Architecture, format, runner; weights planned and measured; cache planned and measured, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            path = save_tiny(architecture, Path(folder) / architecture)
            for form in PRESETS:
                yield [architecture, form, *_tiny_figures(path, form)]


def _tiny_figures(path: Path, form: str) -> list[str]:
    spec = ModelSpec("m", str(path), quantization=form, device="cpu", kv_cache_tokens=1024, max_model_len=256)
    try:
        plan = make_plan(spec)
        model = load_model(spec, lambda done, total: None).model
        blocks = plan.kv_tokens // KV_BLOCK_TOKENS
        runner = choose_runner(model, spec, blocks=blocks, max_model_len=plan.max_model_len)
    except (ServerError, QuantError):
        return [NOT_SERVED, "", "", "", ""]
    planned, measured = exact(plan.components), measure(model, runner.kv_tensors)
    cache, found = planned.pop(KV_CACHE), measured.pop(KV_CACHE)
    equal = "" if planned == measured else " (by component: not equal)"
    sizes = (sum(planned.values()), sum(measured.values()), cache, found)
    return [type(runner).__name__ + equal, *(f"{size:,}" for size in sizes)]


def report_of(path: str, form: str) -> tuple[MemoryReport, MemoryReport]:
    """An engine's ledger when it has loaded, and after traffic; for a process of its own."""
    import server.engine.process  # noqa: F401  it is part of what an engine takes
    from server.memory import allocator
    from server.memory.ledger import Baseline, Ledger
    from server.model.batch import Batch, Chunk, Draw
    from server.model.probe import warm_up
    from server.records import SamplingParams

    limits = {"kv_cache_tokens": 16384, "max_batch_tokens": LARGEST_STEP, "max_sequences": 16}
    spec = ModelSpec("m", path, quantization=form, device="cpu", **limits)
    plan = make_plan(spec)
    baseline = Baseline.take("cpu")
    model = load_model(spec, lambda done, total: None).model
    blocks = plan.kv_tokens // KV_BLOCK_TOKENS
    runner = choose_runner(model, spec, blocks=blocks, max_model_len=plan.max_model_len)
    warm_up(runner)
    allocator.keep_much()
    ledger = Ledger(model, runner, "cpu", plan.components, baseline)
    ledger.begin()
    first = ledger.report()
    room = plan.max_model_len // KV_BLOCK_TOKENS
    params = SamplingParams(max_tokens=4096, temperature=1.0, top_p=0.9)
    for prompt, drawn, sequences in TRAFFIC:
        names = [str(which) for which in range(sequences)]
        table = {name: list(range(room * which, room * which + room)) for which, name in enumerate(names)}
        fitting = max(1, LARGEST_STEP // prompt)
        for begin in range(0, sequences, fitting):
            draw = Draw(params, seed=begin, index=0)
            tokens = [7 + 31 * index % 20000 for index in range(prompt)]
            some = names[begin : begin + fitting]
            runner.step(Batch(tuple(Chunk(name, tokens, 0, table[name], draw) for name in some)))
        for at in range(prompt, prompt + drawn):
            draw = Draw(params, seed=1, index=at)
            runner.step(Batch(tuple(Chunk(name, (5,), at, table[name], draw) for name in names)))
    ledger.settle()
    return first, ledger.report()


def large_table(directory: Path) -> list[str]:
    """A column per format, a row per component: as planned, and as measured after traffic."""
    checkpoint = make_checkpoint(directory)
    forms = list(PRESETS)
    reports: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for form in forms:
        command = [sys.executable, "-c", CHILD, str(checkpoint), form]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        reports[form] = tuple(json.loads(result.stdout.splitlines()[-1]))
    names = dict.fromkeys(name for _, after in reports.values() for name in (*after["planned"], *after["peak"]))
    lines = [f"| MB | {' | '.join(forms)} |", f"|---|{'---:|' * len(forms)}"]
    for name in names:
        lines.append(f"| `{name}` | {' | '.join(_pair(reports[form][1], name) for form in forms)} |")
    for title, which in (("loaded", 0), ("after traffic", 1)):
        figures = [_rest(reports[form][which]) for form in forms]
        lines.append(f"| `unaccounted`, {title} | {' | '.join(figures)} |")
    return lines


def _pair(report: dict[str, Any], name: str) -> str:
    planned, measured = report["planned"].get(name), report["peak"].get(name, 0)
    if name not in ESTIMATED:
        same = (planned or 0) == measured
        return f"{(planned or 0) / 1e6:.1f}" if same else f"{(planned or 0) / 1e6:.1f} / {measured / 1e6:.1f}"
    return f"{'-' if planned is None else f'{planned / 1e6:.1f}'} / {measured / 1e6:.1f}"


def _rest(fields: dict[str, Any]) -> str:
    report = MemoryReport(**fields)
    rest = unaccounted(report)
    own = sum(size for name, size in report.measured.items() if name not in ESTIMATED)
    return "unknown" if rest is None else f"{rest / 1e6:.1f} ({100 * rest / own:.1f} %)"


def write(mark: str, lines: list[str]) -> None:
    """Puts a table between `<!-- mark -->` and `<!-- /mark -->`."""
    text = DOCS.read_text(encoding="utf-8")
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    table = "\n".join(lines)
    changed, count = re.subn(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{DOCS} has {count} places for {mark!r}; it must have one")
    DOCS.write_text(changed, encoding="utf-8")


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", choices=[TINY, LARGE])
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if arguments.only != LARGE:
        head = ["architecture", "format", "runner", "weights planned", "measured", "cache planned", "measured"]
        rows = [f"| {' | '.join(row)} |" for row in tiny_rows()]
        write(TINY, [f"| {' | '.join(head)} |", "|---|---|---|---:|---:|---:|---:|", *rows])
    if arguments.only != TINY:
        write(LARGE, large_table(arguments.directory))


if __name__ == "__main__":
    main()
