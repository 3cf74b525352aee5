"""deploy/compose.yaml: valid, closed to the outside, and in agreement with the image and with the files it mounts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from server.app import CLOSE_SECONDS
from server.config import ServerSettings, load_config
from tests.deploy.image import DEPLOY, GUIDE, PORT, VARIABLES, blocks, open_routes

FILE = DEPLOY / "compose.yaml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def by_default(text: str) -> str:
    """With the defaults in place of variables."""
    return VARIABLE.sub(lambda found: found[2], text)


def mounts(service: str) -> dict[str, str]:
    """Where in the container, and what of this directory (or which volume), by default."""
    split = (by_default(volume).removesuffix(":ro").split(":") for volume in SERVICES[service].get("volumes", ()))
    return {target: source for source, target in split}


def container_port(service: str) -> int:
    (published,) = SERVICES[service]["ports"]
    return int(published.rpartition(":")[2])


def test_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_runs_with_no_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["mem_limit"]
    assert all(published.startswith("127.0.0.1:") for published in service["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str) -> None:
    for source in mounts(name).values():
        assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], source


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_other_images_are_named_in_full_with_a_version(name: str) -> None:
    assert re.fullmatch(r"docker\.io/[\w/-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_variables_are_settings() -> None:
    environment = SERVICES["halfbyte"]["environment"]
    assert set(environment) <= VARIABLES
    assert set(environment.values()) == {None}, "taken from the environment, so that an unset one stays unset"
    load_config({}, dict.fromkeys(environment, ""))


def test_the_guide_names_every_variable_and_its_default() -> None:
    text = FILE.read_text()
    used = {name: f"`{default}`" for name, default in VARIABLE.findall(text)}
    for name, default in used.items():
        (row,) = [line for line in GUIDE.splitlines() if line.startswith("| ") and f"`{name}`" in line.split("|")[1]]
        assert default in row.split("|")[2]
    for name in (*SERVICES["halfbyte"]["environment"], *SERVICES["halfbyte"]["build"]["args"]):
        assert f"`{name}`" in GUIDE


def test_the_health_check_asks_for_a_route_on_the_right_port() -> None:
    (url,) = re.findall(r"http://[^']+", SERVICES["halfbyte"]["healthcheck"]["test"][-1])
    assert urlsplit(url).path in open_routes()
    assert urlsplit(url).port == PORT == container_port("halfbyte")


def test_the_server_has_time_to_drain() -> None:
    (seconds,) = re.fullmatch(r"(\d+)s", SERVICES["halfbyte"]["stop_grace_period"]).groups()  # type: ignore[union-attr]
    assert int(seconds) > ServerSettings().drain_seconds + CLOSE_SECONDS


def test_prometheus_scrapes_the_server() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "halfbyte"]
    assert job["static_configs"][0]["targets"] == [f"halfbyte:{PORT}"]
    paths = {flag.partition("=")[0]: flag.partition("=")[2] for flag in SERVICES["prometheus"]["command"]}
    assert mounts("prometheus")[paths["--config.file"]] == "./prometheus/prometheus.yml"
    assert mounts("prometheus")[paths["--storage.tsdb.path"]] in COMPOSE["volumes"]
    for pattern in config["rule_files"]:
        assert list((DEPLOY / "prometheus").glob(pattern))
        assert mounts("prometheus")["/etc/prometheus/" + pattern.partition("/")[0]] == "./prometheus/rules"


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    assert mounts("grafana")["/etc/grafana/provisioning"] == "./grafana/provisioning"
    (sources,) = [yaml.safe_load(path.read_text()) for path in (provisioning / "datasources").iterdir()]
    (source,) = sources["datasources"]
    assert source["url"] == f"http://prometheus:{container_port('prometheus')}"
    (boards,) = [yaml.safe_load(path.read_text()) for path in (provisioning / "dashboards").iterdir()]
    (provider,) = boards["providers"]
    directory = mounts("grafana")[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"] + "/")
    assert (DEPLOY / directory / PurePosixPath(home).name).is_file()


def test_the_guide_starts_this_file() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert "cd deploy" in commands
    assert "docker compose up --build --wait" in commands
