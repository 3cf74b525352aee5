"""What the CUDA kernels were written to reach on an H200, beside what a run of cuda_operators.py measured.

A target is reached where it is at each of its row counts that were measured; the worst of them is shown. Each 4-bit
kernel stands for itself: which of them is the default is decided by this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.cuda_contenders import TORCH
from benchmarks.cuda_measuring import Result

SHAPE: Final = "14336x4096"
COPYING: Final = "copying"
DEQUANTIZING: Final = "dequantizing"
BITSANDBYTES: Final = "bitsandbytes nf4"
NF4: Final = ("nf4", "nf4-dq", "nf4 hopper", "nf4-dq hopper")
FEW: Final = (1, 2, 3, 4)
MANY: Final = (256, 512, 2048)
ERROR_ROUNDING: Final = 0.005
"""Errors are compared to two decimals: sums in another order fall either way at a tie."""


@dataclass(frozen=True)
class Target:
    contenders: tuple[str, ...]
    rows: tuple[int, ...]
    over: str
    """Whose time is divided by ours; COPYING: of whose bytes a second a share; DEQUANTIZING: whose error by ours."""
    least: float


TARGETS: Final = (
    Target(NF4, FEW, COPYING, 0.8),
    Target(NF4, FEW, TORCH, 2.8),
    Target(NF4, (16,), TORCH, 2.5),
    Target(NF4, (64,), TORCH, 2.0),
    Target(NF4, (64,), BITSANDBYTES, 3.0),
    Target(NF4, MANY, TORCH, 0.95),
    Target(("int8",), FEW, TORCH, 1.6),
    Target(("int8",), MANY, TORCH, 1.5),
    Target((*NF4, "fp4", "fp4 hopper", "int8 weights only"), (*FEW, 16, 64, *MANY), DEQUANTIZING, 1 - ERROR_ROUNDING),
)


def verdicts(results: list[Result], bandwidth: float) -> list[str]:
    """A Markdown table; bandwidth: of copying, in bytes a second."""
    own = {(result.contender, result.rows): result for result in results if result.shape == SHAPE}
    lines = [
        f"Targets at {SHAPE}, each at its worst number of rows. They are meant for an H200.",
        "",
        "| kernel | rows | over | at least | measured | reached |",
        "|---|---|---|---:|---:|---|",
    ]
    for target in TARGETS:
        for contender in target.contenders:
            found = [_measured(target.over, own, contender, rows, bandwidth) for rows in target.rows]
            known = [value for value in found if value is not None]
            rows = f"{target.rows[0]} to {target.rows[-1]}" if len(target.rows) > 1 else str(target.rows[0])
            cells = [contender, rows, target.over, f"{target.least:.2f}"]
            cells += ["not measured", ""] if not known else [f"{min(known):.2f}", _yes(min(known) >= target.least)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _measured(
    over: str, own: dict[tuple[str, int], Result], contender: str, rows: int, bandwidth: float
) -> float | None:
    ours = own.get((contender, rows))
    if ours is None:
        return None
    if over == DEQUANTIZING:
        return ours.dequantized_error / ours.error if ours.error and ours.dequantized_error else None
    if not ours.microseconds:
        return None
    if over == COPYING:
        return ours.bytes / ours.microseconds * 1e6 / bandwidth if bandwidth else None
    theirs = own.get((over, rows))
    return theirs.microseconds / ours.microseconds if theirs is not None and theirs.microseconds else None


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"
