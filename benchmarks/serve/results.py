"""What has been measured, on disk after every step, and the tables made from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.hardware import describe
from benchmarks.serve.load import Level
from benchmarks.serve.prefix import SharedPrefix

TITLE: Final = "# Servers under load on a CPU, one 1.1-billion-parameter Llama"
HOW: Final = (
    "Closed loop, streamed greedy completions of {tokens} tokens for prompts of {words} words, no two of which begin "
    "alike. Servers take turns, one at a time on the whole machine, and medians of {rounds} rounds are reported; the "
    "client's processes run beside them. The first requests of a load, as many as there are at a time, come at once; "
    "each of the others when one ends. Made by `python -m benchmarks.serve`."
)


@dataclass
class Results:
    """Everything measured so far, in `file`; `settings` must be the same for a run to go on with it."""

    file: Path
    settings: dict[str, Any]
    machine: dict[str, str] = field(default_factory=describe)
    levels: list[Level] = field(default_factory=list)
    prefixes: list[SharedPrefix] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """By server: why it could not be measured, or not wholly."""

    @classmethod
    def resume(cls, file: Path, settings: dict[str, Any]) -> Results:
        """What an earlier run has left; nothing where there is no file. Raises ValueError for other settings."""
        results = cls(file, settings)
        if file.is_file():
            record = json.loads(file.read_text())
            if record["settings"] != settings or record["machine"] != results.machine:
                raise ValueError(f"{file} is of another machine or has other settings; without --resume it is replaced")
            results.levels = [Level(**level) for level in record["levels"]]
            results.prefixes = [SharedPrefix(**prefix) for prefix in record["prefixes"]]
        return results

    def has(self, server: str, concurrency: int, number: int) -> bool:
        return any((x.server, x.concurrency, x.round) == (server, concurrency, number) for x in self.levels)

    def has_prefix(self, server: str, number: int) -> bool:
        return any((x.server, x.number) == (server, number) for x in self.prefixes)

    def add(self, level: Level) -> None:
        self.levels.append(level)
        print(level, flush=True)
        self.save()

    def add_prefix(self, prefix: SharedPrefix) -> None:
        self.prefixes.append(prefix)
        print(prefix, flush=True)
        self.save()

    def fail(self, server: str, why: str) -> None:
        self.failures[server] = why
        print(f"{server} failed: {why}", flush=True)
        self.save()

    def save(self) -> None:
        """The record, and the tables beside it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "machine": self.machine,
            "settings": self.settings,
            "levels": [asdict(level) for level in self.levels],
            "prefixes": [asdict(prefix) for prefix in self.prefixes],
            "failures": self.failures,
        }
        self.file.write_text(json.dumps(record) + "\n")
        self.file.with_suffix(".md").write_text(tables(self))


def tables(results: Results) -> str:
    """The page: a table per question, then the shared prefix, then what could not be measured."""
    rounds = len({level.round for level in results.levels})
    lines = [TITLE, "", HOW.format(rounds=rounds, **results.settings)]
    lines += _by_level("Output tokens a second", results.levels, lambda level: f"{level.tokens_per_second:.1f}")
    lines += _by_level("Seconds to the first token under load, p50 / p95", results.levels, _first_token)
    lines += _by_level("Seconds to the first token where all come at once, p50 / p95", results.levels, _burst)
    lines += _by_level("Milliseconds between pieces of text, p50 / p95", results.levels, _gaps)
    lines += _by_level("Proportional memory (PSS) of all processes, MB", results.levels, lambda x: f"{x.memory_mb:.0f}")
    lines += _by_level("Cores the client took", results.levels, lambda level: f"{level.client_cpu:.2f}")
    lines += _by_server(results.levels)
    if results.prefixes:
        lines += _prefix_table(results.prefixes)
    if results.failures:
        lines += ["", "## Not measured", ""]
        lines += [f"- {server}: {why.splitlines()[0]}" for server, why in results.failures.items()]
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    return "\n".join([*lines, "", f"Machine: {machine}."]) + "\n"


def _median(levels: Iterable[Level], server: str, concurrency: int) -> Level | None:
    """Every number's median over the rounds."""
    found = [asdict(x) for x in levels if (x.server, x.concurrency) == (server, concurrency)]
    if not found:
        return None
    numbers = {
        key: statistics.median(one[key] for one in found)
        for key, value in found[0].items()
        if not isinstance(value, str)
    }
    return Level(**(found[0] | numbers))


def _by_level(title: str, levels: list[Level], cell: Callable[[Level], str]) -> list[str]:
    servers = list(dict.fromkeys(level.server for level in levels))
    loads = sorted({level.concurrency for level in levels})
    lines = ["", f"## {title}", "", f"| concurrency | {' | '.join(map(str, loads))} |"]
    lines.append("|---|" + "---:|" * len(loads))
    for server in servers:
        medians = [_median(levels, server, load) for load in loads]
        lines.append(f"| {server} | {' | '.join('' if median is None else cell(median) for median in medians)} |")
    return lines


def _burst(level: Level) -> str:
    return f"{level.burst_p50:.2f} / {level.burst_p95:.2f}"


def _first_token(level: Level) -> str:
    return f"{level.first_token_p50:.2f} / {level.first_token_p95:.2f}"


def _gaps(level: Level) -> str:
    several = f" ({level.tokens_per_piece:.1f} tokens each)" if level.tokens_per_piece > 1.05 else ""
    return f"{1000 * level.gap_p50:.0f} / {1000 * level.gap_p95:.0f}{several}"


def _by_server(levels: list[Level]) -> list[str]:
    lines = ["", "## Seconds from the start of the process to a first answer", "", "| | |", "|---|---:|"]
    for server in dict.fromkeys(level.server for level in levels):
        seconds = statistics.median(level.ready_seconds for level in levels if level.server == server)
        lines.append(f"| {server} | {seconds:.1f} |")
    return lines


def _prefix_table(prefixes: list[SharedPrefix]) -> list[str]:
    lines = [
        "",
        f"## A shared prefix of {prefixes[0].prompt_tokens} tokens in {prefixes[0].requests} requests",
        "",
        "One request at a time; prompts end in words of their own. Seconds to the first token.",
        "",
        "| | first | later, p50 | later, p95 | later, longest | longest of the first | fewest cached tokens |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in prefixes:
        part = f"{one.later_most / one.first:.3f}"
        later = f"{one.later_p50:.3f} | {one.later_p95:.3f} | {one.later_most:.3f}"
        lines.append(f"| {one.server}, {one.number} | {one.first:.3f} | {later} | {part} | {one.cached_tokens} |")
    return lines
