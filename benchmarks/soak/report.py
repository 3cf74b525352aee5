"""A finished soak as a record and as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from benchmarks.hardware import describe
from benchmarks.load_memory import RESULTS
from benchmarks.soak.requests import KINDS
from benchmarks.soak.watch import MB, Sample
from server.metrics import catalog

if TYPE_CHECKING:
    from benchmarks.soak.__main__ import Soak

KEPT_SAMPLES: Final = 300
SHOWN_SAMPLES: Final = 12
SHOWN_PROBLEMS: Final = 20


def write(soaked: Soak, *, dry: bool) -> str:
    """The page; without `dry` also as a file, beside the record."""
    page = _page(soaked)
    if not dry:
        RESULTS.mkdir(exist_ok=True)
        record = {
            "machine": describe(),
            "requests": soaked.requests,
            "kills": soaked.killed,
            "seconds": round(soaked.seconds, 1),
            "ends": Counter(one.end for one in soaked.attempts),
            "problems": soaked.problems,
            "counts": [asdict(one) for one in soaked.counts],
            "growths": [asdict(one) for one in soaked.growths],
            "samples": [asdict(one) for one in _thinned(soaked.samples, KEPT_SAMPLES)],
        }
        (RESULTS / "soak.json").write_text(json.dumps(record) + "\n")
        (RESULTS / "soak.md").write_text(page)
    return page


def _page(soaked: Soak) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in describe().items())
    lines = [
        f"# {soaked.requests:,} requests, {soaked.killed} engine kills",
        "",
        f"{len(soaked.attempts):,} attempts in {soaked.seconds:.0f} s. Made by `python -m benchmarks.soak`.",
        *_verdict(soaked.problems),
        *_ends(soaked),
        *_counts(soaked),
        *_memory(soaked),
        "",
        f"Machine: {machine}.",
    ]
    return "\n".join(lines) + "\n"


def _verdict(problems: Sequence[str]) -> list[str]:
    if not problems:
        return ["", "No request was lost, none was answered twice, and both sides counted the same."]
    more = [f"- and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
    return ["", "## What must not be", "", *(f"- {problem}" for problem in problems[:SHOWN_PROBLEMS]), *more]


def _ends(soaked: Soak) -> list[str]:
    ends = list(dict.fromkeys(one.end for one in soaked.attempts))
    lines = ["", "## How attempts ended, by kind", "", f"| | {' | '.join(ends)} |", "|---|" + "---:|" * len(ends)]
    found = Counter((one.request.kind, one.end) for one in soaked.attempts)
    lines += [f"| {kind} | {' | '.join(str(found[kind, end]) for end in ends)} |" for kind in KINDS]
    totals = [str(sum(found[kind, end] for kind in KINDS)) for end in ends]
    return [*lines, f"| all | {' | '.join(totals)} |"]


def _counts(soaked: Soak) -> list[str]:
    lines = ["", "## Both sides' counts", "", "| | server | client |", "|---|---:|---:|"]
    for one in soaked.counts:
        client = f"{one.least:,}" if one.least == one.most else f"{one.least:,} to {one.most:,}"
        lines.append(f"| {one.what} | {one.server:,} | {client} |")
    return lines


def _memory(soaked: Soak) -> list[str]:
    lines = [
        "",
        "## Anonymous resident memory, from when a process was warm to its end, MB",
        "",
        "| | requests | start | end | bytes a request |",
        "|---|---:|---:|---:|---:|",
    ]
    for one in soaked.growths:
        grown = f"{one.start_mb:.1f} | {one.end_mb:.1f} | {one.bytes_per_request:+.0f}"
        lines.append(f"| {one.process} | {one.requests:,} | {grown} |")
    lines += [
        "",
        "## Over its time",
        "",
        f"`unaccounted` is `{catalog.MEMORY_UNACCOUNTED.exposed_name}`.",
        "",
        "| seconds | ended requests | HTTP, MB | engine, MB | unaccounted, MB | blocks used | cached | running |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for at in _thinned(soaked.samples, SHOWN_SAMPLES):
        sizes = " | ".join(f"{size / MB:.1f}" for size in (at.http_bytes, at.engine_bytes, at.unaccounted_bytes))
        rest = f"{at.blocks_used} | {at.blocks_cached} | {at.running}"
        lines.append(f"| {at.seconds:.0f} | {at.requests:,} | {sizes} | {rest} |")
    return lines


def _thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many, evenly, the last one among them."""
    if len(samples) <= most:
        return list(samples)
    return [samples[round(place * (len(samples) - 1) / (most - 1))] for place in range(most)]
