"""deploy/grafana: dashboards as Grafana takes them, over series that exist, found by their provisioning."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.boards import DASHBOARDS, DEPLOY, RULES, dashboard, metric_names, panels, queries, rules
from tests.deploy.test_rules import exposed_names

SCHEMA = 39
"""Of Grafana 10.4 and 11, which newer ones migrate by themselves."""
WIDTH = 24
TYPES = {"timeseries", "stat", "bargauge", "table", "heatmap", "state-timeline"}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
boards = pytest.mark.parametrize("board", [dashboard(path) for path in DASHBOARDS], ids=[p.stem for p in DASHBOARDS])


def test_there_is_one_for_memory_and_one_for_serving() -> None:
    assert [path.stem for path in DASHBOARDS] == ["memory", "serving"]
    found = [dashboard(path) for path in DASHBOARDS]
    assert len({board["uid"] for board in found}) == len({board["title"] for board in found}) == 2


@boards
def test_panels_have_ids_titles_and_places_of_their_own(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] >= SCHEMA
    assert "id" not in board, "Grafana gives it"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in panels(board)]
    assert len(titles) == len(set(titles))
    places = [panel["gridPos"] for panel in board["panels"]]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= WIDTH
        assert place["y"] >= 0
        assert min(place["h"], place["w"]) > 0
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


@boards
def test_panels_ask_the_chosen_data_source_for_the_chosen_models(board: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "model"]
    assert variables["datasource"]["type"] == "datasource"
    assert "allValue" not in variables["job"], "else All would take in jobs that are not Halfbyte's"
    for name in ("job", "instance", "model"):
        assert variables[name]["datasource"] == DATASOURCE
        assert variables[name]["includeAll"]
        assert metric_names(variables[name]["query"]["query"]) <= exposed_names()
    known = exposed_names() | {rule.name for rule in rules() if rule.kind == "record"}
    for panel in panels(board):
        assert panel["type"] in TYPES
        assert panel["datasource"] == DATASOURCE
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF")[: len(panel["targets"])]
        for target, query in zip(panel["targets"], queries(panel), strict=True):
            assert target["datasource"] == DATASOURCE
            assert target["instant"] != target["range"]
            assert 'job=~"$job"' in query.expression
            names = metric_names(query.expression)
            assert names <= known
            assert names or "process_" in query.expression


def test_provisioning_finds_data_source_and_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "halfbyte.yml").read_text())["providers"]
    assert source["type"] == "prometheus"
    for path in DASHBOARDS:
        chosen = dashboard(path)["templating"]["list"][0]["current"]
        assert chosen == {"selected": False, "text": source["name"], "value": source["uid"]}
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"], "$__rate_interval depends on it"
    assert Path(provider["options"]["path"]).name == DASHBOARDS[0].parent.name


def test_recorded_series_are_used() -> None:
    """What is computed every 15 seconds is asked for by a dashboard or an alert."""
    asked: set[str] = set()
    for path in DASHBOARDS:
        for panel in panels(dashboard(path)):
            for query in queries(panel):
                asked |= metric_names(query.expression)
    for rule in rules():
        asked |= metric_names(rule.expression)
    assert RULES
    assert {rule.name for rule in rules() if rule.kind == "record"} - asked == set()
