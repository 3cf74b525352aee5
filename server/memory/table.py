"""The plan as a person reads it: one table of components in bytes and both units. It computes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from server.memory.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """One model's plan; GB are 10^9 bytes, GiB are 2^30."""
    table = Table(title=f"{plan.model}: {plan.quantization} on {plan.device}", title_justify="left")
    table.add_column("component")
    for unit in ("bytes", "GB", "GiB"):
        table.add_column(unit, justify="right")
    for name, size in plan.components.items():
        table.add_row(name, *_figures(size))
    table.add_section()
    table.add_row("total", *_figures(plan.total_bytes), style="bold")
    table.add_row("more while loading", *_figures(plan.loading_bytes))
    table.add_row("free on the device", *_figures(plan.available_bytes))
    console.print(table)
    console.print(
        f"KV cache: {plan.kv_tokens:,} tokens of {plan.kv_bytes_per_token:,} bytes; "
        f"longest sequence {plan.max_model_len:,} tokens; checkpoint on disk {plan.checkpoint_bytes:,} bytes"
    )


def plan_json(plans: list[Plan]) -> str:
    """All plans as one JSON document, every figure in bytes or tokens."""
    return json.dumps(
        {"models": [asdict(plan) | {"total_bytes": plan.total_bytes, "peak_bytes": plan.peak_bytes} for plan in plans]},
        indent=2,
    )


def _figures(size: int) -> tuple[str, str, str]:
    return f"{size:,}", f"{size / 1e9:.3f}", f"{size / 2**30:.3f}"
