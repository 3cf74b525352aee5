"""Every panel, rule and alert of deploy/ has data from a real server under load, scraped by a real Prometheus."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from server.metrics.catalog import METRICS, PREFIX
from server.metrics.vllm import ALIASES, VLLM_PREFIX
from tests.deploy.boards import DASHBOARDS, dashboard, panels, queries, rules, without_threshold
from tests.deploy.monitored import Prometheus, load, prometheus, server, wait_for
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
EXPECTED_EMPTY = Path(__file__).parent / "expected_empty.yml"
MOST_EMPTY = 5
RATE_INTERVAL = "20s"
"""In the place of Grafana's $__rate_interval: a few scrapes of one second."""
CONTEXT = 256


def expressions() -> dict[str, str]:
    """By what it is: every panel's target, every rule, and every alert's expression without its threshold."""
    found = {}
    for path in DASHBOARDS:
        for panel in panels(dashboard(path)):
            for number, query in enumerate(queries(panel), start=1):
                found[f"{path.stem}: {query.panel}, {number}"] = query.promql(RATE_INTERVAL)
    for rule in rules():
        text = rule.expression if rule.kind == "record" else without_threshold(rule.expression)
        found[f"{rule.kind} {rule.name}"] = text
        if rule.kind == "record":
            found[f"recorded {rule.name}"] = rule.name
    return found


def expected_empty() -> dict[str, str]:
    return {entry["expression"]: entry["reason"] for entry in yaml.safe_load(EXPECTED_EMPTY.read_text())}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Two tiny models, one in 4 and one in 8 bits, with room for two long sequences and a queue for four."""
    directory = tmp_path_factory.mktemp("watched")
    models = [
        {
            "name": name,
            "path": str(save_tiny(architecture, directory / name)),
            "quantization": quantization,
            "max_model_len": CONTEXT,
            "max_sequences": 8,
            "kv_cache": {"tokens": 2 * CONTEXT},
            "threads": 1,
        }
        for name, architecture, quantization in (("four-bits", "llama", "nf4-dq"), ("eight-bits", "gpt2", "int8"))
    ]
    with (
        server(models, directory, max_queued_requests=4, vllm_metrics=True) as running,
        prometheus(running, directory) as scraper,
        load(running, [str(model["name"]) for model in models], longest=CONTEXT),
    ):
        yield scraper


def test_the_list_of_the_expected_empty_is_short_and_has_reasons() -> None:
    empty = expected_empty()
    assert len(empty) <= MOST_EMPTY
    assert set(empty) <= set(expressions())
    assert all(reason.endswith(".") for reason in empty.values())


def test_everything_has_data_under_load(watched: Prometheus) -> None:
    missing = expressions()
    empty = {name: missing.pop(name) for name in expected_empty()}

    def look() -> bool:
        for name, expression in list(missing.items()):
            if watched.query(expression):
                del missing[name]
        return not missing

    wait_for(look, "no data", lambda: missing)
    unexpected = [name for name, expression in empty.items() if watched.query(expression)]
    assert unexpected == [], "these have data after all; take them out of expected_empty.yml"


def test_the_load_reaches_what_it_is_for(watched: Prometheus) -> None:
    """Else a panel might show nothing but zeros and nobody would notice."""
    missing = {
        name: name
        for name in (
            "halfbyte_engine_preemptions_total",
            'halfbyte_requests_rejected_total{reason="overloaded"}',
            'halfbyte_requests_total{finish_reason="abort"}',
            'halfbyte_requests_total{finish_reason="timeout"}',
            'halfbyte_request_errors_total{error="invalid_request_error"}',
            "halfbyte_prefix_cache_hit_tokens_total",
            "halfbyte_kv_blocks_used",
            "halfbyte_requests_waiting",
            "halfbyte_quantization_outlier_ratio",
        )
    }

    def look() -> bool:
        for name in list(missing):
            if watched.query(f"max_over_time({name}[5m]) > 0"):
                del missing[name]
        return not missing

    wait_for(look, "always 0", lambda: missing)


def test_prometheus_gets_every_metric_of_the_list_and_each_of_vllms_names(watched: Prometheus) -> None:
    """In the format that Prometheus chooses; a histogram by its count."""
    missing = {
        prefix + name + ("_total" if spec.kind == "counter" else "_count" if spec.kind == "histogram" else "")
        for prefix, name, spec in (
            *((PREFIX, spec.name, spec) for spec in METRICS),
            *((VLLM_PREFIX, alias.name, alias.spec) for alias in ALIASES),
        )
    }

    def look() -> bool:
        missing.difference_update([name for name in missing if watched.query(name)])
        return not missing

    wait_for(look, "no series", lambda: missing)


def test_prometheus_evaluates_every_rule(watched: Prometheus) -> None:
    wait_for(
        lambda: {rule["health"] for rule in watched.rules()} == {"ok"},
        "rules that can't be evaluated",
        lambda: [rule for rule in watched.rules() if rule["health"] != "ok"],
    )
    assert {rule["name"] for rule in watched.rules()} == {rule.name for rule in rules()}
