"""Reads what deploy/ holds for Prometheus and Grafana: rules, dashboards, and the PromQL in them. Not a test."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))

VARIABLES: Mapping[str, str] = {"job": "halfbyte", "instance": ".*", "model": ".*"}
"""What Grafana puts in the place of $job and so on where "All" is chosen."""
_COMPARISONS = ("==", "!=", "<=", ">=", "<", ">")


@dataclass(frozen=True)
class Query:
    """One target of a panel."""

    panel: str
    expression: str
    legend: str

    def promql(self, rate_interval: str) -> str:
        """With Grafana's variables filled in."""
        text = self.expression.replace("$__rate_interval", rate_interval)
        for name, value in VARIABLES.items():
            text = text.replace(f"${name}", value)
        return text


@dataclass(frozen=True)
class Rule:
    """A recording rule (`record`) or an alert (`alert`)."""

    kind: str
    name: str
    expression: str


def dashboard(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text())
    return board


def panels(board: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels but rows."""
    for panel in board["panels"]:
        if panel["type"] != "row":
            yield panel


def queries(panel: Mapping[str, Any]) -> list[Query]:
    return [Query(panel["title"], target["expr"], target["legendFormat"]) for target in panel["targets"]]


def rules() -> list[Rule]:
    found = []
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                kind = "record" if "record" in rule else "alert"
                found.append(Rule(kind, rule[kind], rule["expr"]))
    return found


def without_threshold(expression: str) -> str:
    """What an alert compares: its expression up to the last comparison outside of all brackets."""
    depth, quote, last = 0, "", -1
    for place, char in enumerate(expression):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif depth == 0 and expression.startswith(_COMPARISONS, place) and expression[place - 1] not in "=!<>":
            last = place
    if last < 0:
        raise ValueError(f"the alert's expression compares nothing: {expression}")
    return expression[:last].strip()


def metric_names(expression: str) -> set[str]:
    """The names of our series in an expression, those of recording rules with their prefix."""
    outside_quotes = re.sub(r"\"[^\"]*\"|'[^']*'", '""', expression)
    return set(re.findall(r"(?:[a-z_]+:)?halfbyte_[a-z0-9_]+(?::[a-z0-9_]+)?", outside_quotes))
