"""A finished soak as a record and as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.hardware import describe, machine_line
from benchmarks.soak import balance
from benchmarks.soak.requests import KINDS
from benchmarks.soak.watch import MB, Sample

if TYPE_CHECKING:
    from benchmarks.soak.__main__ import Soak

KEPT_SAMPLES: Final = 300
SHOWN_SAMPLES: Final = 12
SHOWN_PROBLEMS: Final = 20


def write(soaked: Soak, command: str, file: Path | None) -> str:
    """The page; where there is a file for the record, also as one beside it."""
    page = _page(soaked, command)
    if file is not None:
        record = {
            "machine": describe(),
            "command": command,
            "requests": soaked.pace.begun,
            "kills": soaked.killed,
            "seconds": soaked.seconds,
            "ends": Counter(one.end for one in soaked.attempts),
            "problems": soaked.problems,
            "counts": [asdict(one) for one in soaked.counts],
            "growths": [asdict(one) for one in soaked.growths],
            "unaccounted": asdict(rest) if (rest := balance.unaccounted(soaked.samples)) else None,
            "samples": [asdict(one) for one in _thinned(soaked.samples, KEPT_SAMPLES)],
        }
        file.write_text(json.dumps(record) + "\n")
        file.with_suffix(".md").write_text(page)
    return page


def _page(soaked: Soak, command: str) -> str:
    lines = [
        f"# {soaked.pace.begun:,} requests, {soaked.killed} engine kills",
        "",
        f"{len(soaked.attempts):,} attempts in {soaked.seconds:.0f} s. Made by `{command}`.",
        *_verdict(soaked.problems),
        *_ends(soaked),
        *_counts(soaked),
        *_memory(soaked),
        *balance.lines(soaked.samples),
        *_over_time(soaked),
        "",
        machine_line(),
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
    return lines


def _over_time(soaked: Soak) -> list[str]:
    lines = [
        "",
        "## Over its time",
        "",
        "| seconds | ended requests | HTTP, MB | engine, MB | its PSS | unaccounted | blocks used | cached | running |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for at in _thinned(soaked.samples, SHOWN_SAMPLES):
        sizes = " | ".join(f"{size / MB:.1f}" for size in (at.http_bytes, at.engine_bytes, at.pss_bytes))
        own = balance.own_bytes(at)
        rest = f"{balance.shown(at.unaccounted_bytes, own) if own else '-'} | {at.blocks_used} | {at.blocks_cached}"
        lines.append(f"| {at.seconds:.0f} | {at.requests:,} | {sizes} | {rest} | {at.running} |")
    return lines


def _thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many, evenly, the last one among them."""
    if len(samples) <= most:
        return list(samples)
    return [samples[round(place * (len(samples) - 1) / (most - 1))] for place in range(most)]
