"""The catalog as Markdown tables: `python -m server.metrics.table` prints what docs/metrics.md holds of it."""

from __future__ import annotations

from collections.abc import Sequence

from server.metrics.catalog import METRICS
from server.metrics.vllm import ALIASES, VLLM_PREFIX


def metrics_table() -> str:
    """Every metric: name, kind, labels, help."""
    rows = [(f"`{m.exposed_name}`", m.kind, ", ".join(m.labels), m.help) for m in METRICS]
    return _table(("name", "kind", "labels", ""), rows)


def vllm_table() -> str:
    """vLLM's names and ours."""
    rows = []
    for alias in ALIASES:
        total = "_total" if alias.spec.kind == "counter" else ""
        labels = [f"`{ours}` is `{theirs}`" for ours, theirs in alias.labels.items()]
        only = [f"of its values only {', '.join(alias.only)}"] if alias.only else []
        name = f"`{VLLM_PREFIX}{alias.name}{total}`"
        rows.append((name, f"`{alias.spec.exposed_name}`", "; ".join(labels + only)))
    return _table(("vLLM's name", "ours", "other labels"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines).replace("|  |", "| |")


if __name__ == "__main__":
    print(metrics_table())
    print(vllm_table(), end="")
