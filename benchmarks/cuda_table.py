"""What benchmarks/cuda_operators.py has measured, as Markdown."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cuda_contenders import HEAD_DIM, HEADS, TORCH
from benchmarks.cuda_measuring import Result
from benchmarks.cuda_targets import verdicts
from benchmarks.hardware import machine_line


def table(results: list[Result], attention: list[Result], bandwidth: float) -> str:
    lines = [
        "# Every operator on a GPU",
        "",
        "Microseconds in CUDA graphs, cold weights, bfloat16 activations; medians. `nf4 of roof`: bytes that have to "
        "be moved, by the copied bytes a second. Made by `python -m benchmarks.cuda_operators`.",
        "",
        *verdicts(results, bandwidth),
        "",
    ]
    for shape in dict.fromkeys(result.shape for result in results):
        products = [result for result in results if result.shape == shape and result.rows]
        names = list(dict.fromkeys(result.contender for result in products))
        lines += [f"## {shape}", "", f"| rows | {' | '.join(names)} | nf4 of roof | torch / nf4 | bitsandbytes / nf4 |"]
        lines.append("|---:|" + "---:|" * (len(names) + 3))
        for rows in dict.fromkeys(result.rows for result in products):
            own = {result.contender: result for result in products if result.rows == rows}
            cells = [time_of(own[name]) for name in names]
            cells += [_share(own["nf4"], bandwidth), _times(own, TORCH), _times(own, "bitsandbytes nf4")]
            lines.append(f"| {rows} | {' | '.join(cells)} |")
        lines += ["", "Error from float64, in units of that of torch with the weight dequantized to bfloat16:", ""]
        lines += _grid(products, _error)
        lines += ["", "MB allocated during a call, beside operands and result:", "", *_grid(products, _held)]
        lines += ["", "| conversion | microseconds | of roof |", "|---|---:|---:|"]
        for result in results:
            if result.shape == shape and not result.rows:
                lines.append(f"| {result.contender} | {time_of(result)} | {_share(result, bandwidth)} |")
        lines.append("")
    lines += attention_table(attention, bandwidth)
    lines.append(f"Copying moved {bandwidth / 1e12:.2f} TB/s. {machine_line()}")
    return "\n".join(lines) + "\n"


def attention_table(results: list[Result], bandwidth: float) -> list[str]:
    lines = [
        f"## Attention of one token a sequence, {HEADS[0]} heads over {HEADS[1]} of {HEAD_DIM} values",
        "",
        "torch: scaled_dot_product_attention over keys and values side by side, in no blocks.",
        "",
        "| sequences x tokens | kernel | microseconds | of roof | torch | torch / kernel |",
        "|---|---|---:|---:|---:|---:|",
    ]
    theirs = {result.shape: result for result in results if result.contender == TORCH}
    for ours in results:
        if ours.contender == TORCH:
            continue
        other = theirs[ours.shape]
        times = "" if not ours.microseconds or not other.microseconds else _ratio(other.microseconds, ours.microseconds)
        cells = (ours.shape, ours.contender, time_of(ours), _share(ours, bandwidth), time_of(other), times)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def time_of(result: Result) -> str:
    return "" if result.microseconds is None else f"{result.microseconds:.1f}"


def _share(result: Result, bandwidth: float) -> str:
    if result.microseconds is None or not bandwidth:
        return ""
    return f"{result.bytes / result.microseconds * 1e6 / bandwidth:.0%}"


def _times(own: dict[str, Result], name: str) -> str:
    ours, theirs = own["nf4"].microseconds, own[name].microseconds if name in own else None
    return "" if ours is None or theirs is None else _ratio(theirs, ours)


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}x"


def _grid(products: list[Result], cell: Callable[[Result], str]) -> list[str]:
    """Rows by contenders, of those that have anything to say."""
    names = list(dict.fromkeys(result.contender for result in products if cell(result)))
    if not names:
        return ["Not measured."]
    lines = [f"| rows | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
    for rows in dict.fromkeys(result.rows for result in products):
        own = {result.contender: cell(result) for result in products if result.rows == rows}
        lines.append(f"| {rows} | {' | '.join(own[name] for name in names)} |")
    return lines


def _error(result: Result) -> str:
    if result.contender == TORCH or not result.error or not result.dequantized_error:
        return ""
    return _ratio(result.error, result.dequantized_error)


def _held(result: Result) -> str:
    return "" if result.held is None else f"{result.held / 1e6:.1f}"
