"""deploy/prometheus: promtool accepts it, every alert has unit tests that can fail, and every name in it exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from server.metrics.catalog import METRICS
from tests.deploy.boards import PROMETHEUS, RULE_TESTS, RULES, Rule, metric_names, rules, without_threshold

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)
ALERTS = [rule for rule in rules() if rule.kind == "alert"]
RECORDS = [rule for rule in rules() if rule.kind == "record"]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def exposed_names() -> set[str]:
    """Every series of ours that Prometheus can have."""
    found = set()
    for spec in METRICS:
        suffixes = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
        found |= {spec.exposed_name + suffix for suffix in suffixes}
    return found


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    result = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(RULES)} rule files found" in result.stdout


@needs_promtool
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_the_rules_pass_their_unit_tests(path: Path) -> None:
    result = promtool("test", "rules", path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_firing_and_silent() -> None:
    fires, silent = set(), set()
    for path in RULE_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test.get("alert_rule_test", ()):
                (fires if case["exp_alerts"] else silent).add(case["alertname"])
    names = {alert.name for alert in ALERTS}
    assert fires == names
    without_delay = {"HalfbyteMemoryMispredicted"}  # true from the first sample or never; a model beside it is silent
    assert silent == names - without_delay


@needs_promtool
@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_the_unit_tests_notice_an_alert_that_never_fires(alert: Rule, tmp_path: Path) -> None:
    copy = tmp_path / "prometheus"
    shutil.copytree(PROMETHEUS, copy)
    for path in (copy / "rules").glob("*.yml"):
        document = yaml.safe_load(path.read_text())
        for group in document["groups"]:
            for rule in group["rules"]:
                if rule.get("alert") == alert.name:
                    rule["expr"] = f"({alert.expression}) > +Inf"
        path.write_text(yaml.safe_dump(document))
    result = promtool("test", "rules", copy / "tests" / RULE_TESTS[0].name)
    assert result.returncode != 0
    assert alert.name in result.stdout + result.stderr


def test_the_docs_list_the_alerts() -> None:
    page = (PROMETHEUS.parent.parent / "docs" / "dashboards.md").read_text()
    found = dict(re.findall(r"^\| `(Halfbyte\w+)` \| (\w+) \|", page, re.MULTILINE))
    severities = {}
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            severities |= {rule["alert"]: rule["labels"]["severity"] for rule in group["rules"] if "alert" in rule}
    assert found == severities


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_every_name_exists(rule: Rule) -> None:
    known = exposed_names() | {record.name for record in RECORDS}
    assert metric_names(rule.expression) <= known


@pytest.mark.parametrize("record", RECORDS, ids=lambda rule: rule.name)
def test_recorded_names_say_what_they_hold(record: Rule) -> None:
    level, metric, operation = record.name.split(":")
    assert re.fullmatch(r"[a-z_]+", level)
    assert metric.startswith("halfbyte_")
    assert ("5m" in operation) == ("[5m]" in record.expression)


@pytest.mark.parametrize(
    ("expression", "left"),
    [
        ("up == 0", "up"),
        ('a{b="x > 1"} - c > 5 * 2', 'a{b="x > 1"} - c'),
        ("sum(a > 3) >= 1", "sum(a > 3)"),
        ("a{b!='c'} < 2", "a{b!='c'}"),
    ],
)
def test_thresholds_are_found(expression: str, left: str) -> None:
    assert without_threshold(expression) == left
    with pytest.raises(ValueError, match="compares nothing"):
        without_threshold(left)
