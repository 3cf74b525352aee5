"""The ledger of the server's engine over a soak: each component where it began and ended, and what none explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.soak.watch import MB, Sample
from server.memory.components import exact
from server.metrics import catalog


@dataclass(frozen=True)
class Unaccounted:
    """What no component explains, in bytes, relative to the model's own: its weights and its cache."""

    own: int
    least: int
    most: int
    end: int


def own_bytes(sample: Sample) -> int:
    """Weights and cache: what a plan knows to the byte."""
    return sum(exact(sample.components).values())


def shown(rest: int, own: int) -> str:
    """What is unaccounted, with its share of the model's own bytes."""
    return f"{rest / MB:.2f} MB ({100 * rest / own:+.2f} %)"


def last_life(samples: Sequence[Sample]) -> list[Sample]:
    """Those of the engine that was there last, as far as its ledger was known."""
    known = [one for one in samples if one.engine and one.components]
    return [one for one in known if one.engine == known[-1].engine]


def unaccounted(samples: Sequence[Sample]) -> Unaccounted | None:
    """Of all engines; None where no ledger was ever known."""
    rests = [one.unaccounted_bytes for one in samples if one.engine and one.components]
    if not rests:
        return None
    return Unaccounted(own_bytes(last_life(samples)[-1]), min(rests), max(rests), rests[-1])


def lines(samples: Sequence[Sample]) -> list[str]:
    """The page's section; empty where no ledger was ever known."""
    rest, life = unaccounted(samples), last_life(samples)
    if rest is None:
        return []
    least, most, end = (shown(size, rest.own) for size in (rest.least, rest.most, rest.end))
    found = [
        "",
        "## The engine's ledger",
        "",
        f"`unaccounted` is `{catalog.MEMORY_UNACCOUNTED.exposed_name}`; its share is that of the model's own bytes,",
        f"weights and cache, {rest.own / MB:.1f} MB. It was {least} at least, {most} at most, and {end} at the end.",
        "The last engine, MB:",
        "",
        "| | first seen | least | most | end |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(name for one in life for name in one.components):
        found.append(_row(f"`{name}`", [one.components.get(name, 0) for one in life]))
    found.append(_row("unaccounted", [one.unaccounted_bytes for one in life]))
    found.append(_row("the process (PSS)", [one.pss_bytes for one in life]))
    return found


def _row(name: str, sizes: Sequence[int]) -> str:
    figures = (sizes[0], min(sizes), max(sizes), sizes[-1])
    return f"| {name} | {' | '.join(f'{size / MB:.2f}' for size in figures)} |"
