"""What benchmarks/cuda_operators.py has measured, as Markdown."""

from __future__ import annotations

from benchmarks.cuda_contenders import HEAD_DIM, HEADS, TORCH
from benchmarks.cuda_measuring import Result
from benchmarks.hardware import machine_line


def table(results: list[Result], attention: list[Result], bandwidth: float) -> str:
    lines = [
        "# Every operator on a GPU",
        "",
        "Microseconds in CUDA graphs, cold weights, bfloat16 activations; medians. `nf4 of roof`: bytes that have to "
        "be moved, by the copied bytes a second. Made by `python -m benchmarks.cuda_operators`.",
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
        "| sequences x tokens | paged_attention | of roof | torch | torch / paged_attention |",
        "|---|---:|---:|---:|---:|",
    ]
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        ratio = (
            ""
            if not ours.microseconds or not theirs.microseconds
            else f"{theirs.microseconds / ours.microseconds:.2f}x"
        )
        lines.append(f"| {ours.shape} | {time_of(ours)} | {_share(ours, bandwidth)} | {time_of(theirs)} | {ratio} |")
    return [*lines, ""]


def time_of(result: Result) -> str:
    return "" if result.microseconds is None else f"{result.microseconds:.1f}"


def _share(result: Result, bandwidth: float) -> str:
    if result.microseconds is None or not bandwidth:
        return ""
    return f"{result.bytes / result.microseconds * 1e6 / bandwidth:.0%}"


def _times(own: dict[str, Result], name: str) -> str:
    ours, theirs = own["nf4"].microseconds, own[name].microseconds if name in own else None
    return "" if ours is None or theirs is None else f"{theirs / ours:.2f}x"
