"""The plan as a person reads it, and as a program does. It computes nothing.

A table per device, components in bytes and in both units: GB are 10^9 bytes, which is what devices are sold by, and GiB
are 2^30, which is what tools often call GB.
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from server.memory.nearest import in_words
from server.records import DevicePlan, Plan


def print_plan(plan: Plan, console: Console) -> None:
    """One model's plan: what it needs of each device, what fits, and where it does not, what would."""
    console.print(
        f"[bold]{plan.model}[/bold]: {plan.architecture}, {plan.parameters:,} parameters, {plan.quantization}, "
        f"the rest in {plan.dtype}",
        highlight=False,
    )
    for device in plan.devices:
        if device.components:
            console.print(_device_table(device))
    console.print(
        f"KV cache: {plan.kv_tokens:,} tokens of {plan.kv_bytes_per_token:,} bytes. Longest sequence: "
        f"{plan.max_model_len:,} tokens as configured, {plan.longest_context:,} would fit; of such as configured "
        f"{plan.most_sequences:,} fit at once.",
        highlight=False,
    )
    if not plan.fits:
        console.print("[bold]It does not fit.[/bold]", highlight=False)
        for alternative in plan.nearest:
            size, gb, gib = _figures(alternative.peak_bytes)
            console.print(f"  would fit: {in_words(alternative)}: {size} bytes, {gb} GB, {gib} GiB", highlight=False)
        if not plan.nearest:
            console.print("  no smaller cache, context, step or format would fit", highlight=False)


def plan_json(plans: list[Plan]) -> str:
    """All plans as one JSON document, every figure in bytes or tokens."""
    return json.dumps({"models": [plan.document() for plan in plans]}, indent=2)


def _device_table(device: DevicePlan) -> Table:
    table = Table(title=f"on {device.device}", title_justify="left")
    table.add_column("component")
    for unit in ("bytes", "GB", "GiB"):
        table.add_column(unit, justify="right")
    for name, size in device.components.items():
        table.add_row(name, *_figures(size))
    table.add_section()
    table.add_row("total", *_figures(device.total_bytes), style="bold")
    table.add_row("more while loading", *_figures(device.loading_bytes))
    table.add_row("peak", *_figures(device.peak_bytes))
    table.add_row("free", *_figures(device.free_bytes))
    if device.promised_bytes:
        table.add_row("promised to other models", *_figures(device.promised_bytes))
        table.add_row("left", *_figures(device.available_bytes))
    return table


def _figures(size: int) -> tuple[str, str, str]:
    return f"{size:,}", f"{size / 1e9:.3f}", f"{size / 2**30:.3f}"
