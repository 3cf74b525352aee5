"""deploy/kubernetes: valid for the API server, and in agreement with the image, the server and its settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.app import CLOSE_SECONDS
from server.config import load_config
from server.demo import DEMO_MODEL_NAME
from server.metrics.catalog import METRICS, PREFIX
from tests.deploy.image import DEPLOY, PORT, USER, blocks, open_routes

DIRECTORY = DEPLOY / "kubernetes"
KUSTOMIZATION = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())
RESOURCES = {name: yaml.safe_load((DIRECTORY / name).read_text()) for name in KUSTOMIZATION["resources"]}
DEPLOYMENT = RESOURCES["deployment.yaml"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
LABELS = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
PODMONITOR = yaml.safe_load((DIRECTORY / "podmonitor" / "podmonitor.yaml").read_text())
GUIDE_COMMANDS = "\n".join(blocks("sh")).replace("\\\n", " ")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


def validate(resource: dict[str, Any]) -> None:
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def kubectl(*arguments: str) -> list[dict[str, Any]]:
    """The resources that a command prints; none of these commands asks a cluster."""
    result = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


@pytest.mark.parametrize("name", RESOURCES)
def test_is_valid(name: str) -> None:
    validate(RESOURCES[name])


def test_the_validator_would_notice() -> None:
    broken = yaml.safe_load((DIRECTORY / "service.yaml").read_text())
    broken["spec"]["porst"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


@needs_kubectl
def test_kustomize_renders_it() -> None:
    rendered = kubectl("kustomize", str(DIRECTORY))
    for resource in rendered:
        validate(resource)
    (config,) = [resource for resource in rendered if resource["kind"] == "ConfigMap"]
    (deployment,) = [resource for resource in rendered if resource["kind"] == "Deployment"]
    names = [volume.get("configMap", {}).get("name") for volume in deployment["spec"]["template"]["spec"]["volumes"]]
    assert config["metadata"]["name"] in names
    assert config["data"]["models.yaml"] == (DIRECTORY / "models.yaml").read_text()


@needs_kubectl
def test_the_overlay_of_the_guide_renders(tmp_path: Path) -> None:
    (overlay,) = [block for block in blocks("yaml") if "components:" in block]
    root = os.path.relpath(DIRECTORY.parent.parent, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(overlay.replace("halfbyte/deploy", f"{root}/deploy"))
    rendered = {resource["kind"]: resource for resource in kubectl("kustomize", str(tmp_path))}
    assert rendered["PodMonitor"] == PODMONITOR
    validate(rendered["Deployment"])
    spec = rendered["Deployment"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.com/halfbyte:cuda"
    assert container["resources"]["limits"] == {**CONTAINER["resources"]["limits"], "nvidia.com/gpu": 1}
    assert spec["strategy"] == {"type": "Recreate"}


def test_probes_ask_for_routes_that_need_no_key() -> None:
    asked = {
        CONTAINER[probe]["httpGet"]["path"]: CONTAINER[probe]["httpGet"]["port"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert list(asked) == ["/startupz", "/livez", "/readyz"]
    assert set(asked) <= open_routes()
    (port,) = CONTAINER["ports"]
    assert set(asked.values()) == {port["name"]}
    assert port["containerPort"] == PORT


def test_service_and_podmonitor_find_the_pods() -> None:
    service = RESOURCES["service.yaml"]["spec"]
    (endpoint,) = PODMONITOR["spec"]["podMetricsEndpoints"]
    for labels in (DEPLOYMENT["spec"]["selector"]["matchLabels"], PODMONITOR["spec"]["selector"]["matchLabels"]):
        assert labels == LABELS
    assert service["selector"] == LABELS
    assert LABELS[PODMONITOR["spec"]["jobLabel"]] == "halfbyte", "the job that the alerts speak of"
    (together,) = POD["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert together["labelSelector"]["matchLabels"] == LABELS
    assert {service["ports"][0]["targetPort"], endpoint["port"]} == {CONTAINER["ports"][0]["name"]}


def test_runs_with_no_more_than_it_needs() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsUser"] == USER
    context = CONTAINER["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    assert [m["mountPath"] for m in CONTAINER["volumeMounts"] if not m.get("readOnly")] == ["/tmp"]


def test_the_server_accepts_its_environment_and_has_time_to_drain() -> None:
    """The variables as the kubelet makes them, with every key given, and models.yaml in place of the mounted one."""
    secrets = {
        "api-keys": "key-of-one-client,key-of-another",
        "metrics-key": "key-of-prometheus",
        "admin-key": "admins",
    }
    environment: dict[str, str] = {}
    for variable in CONTAINER["env"]:
        value = variable.get("value") or secrets[variable["valueFrom"]["secretKeyRef"]["key"]] * 2
        environment[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], value)
    mounted = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    path = Path(environment["HALFBYTE_CONFIG"])
    assert str(path.parent) in mounted
    assert KUSTOMIZATION["configMapGenerator"][0]["files"] == [path.name]
    config = load_config({}, environment | {"HALFBYTE_CONFIG": str(DIRECTORY / path.name)})
    assert [model.name for model in config.models] == [DEMO_MODEL_NAME]
    assert len(config.api_keys) == 4
    assert config.admin_key is not None
    (_, waited) = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] > int(waited) + config.drain_seconds + CLOSE_SECONDS


def test_the_guide_makes_the_secret_that_is_asked_for() -> None:
    references = [variable["valueFrom"]["secretKeyRef"] for variable in CONTAINER["env"] if "valueFrom" in variable]
    (endpoint,) = PODMONITOR["spec"]["podMetricsEndpoints"]
    references.append(endpoint["authorization"]["credentials"])
    assert len({reference["name"] for reference in references}) == 1
    (name, rest) = re.findall(r"kubectl create secret generic (\S+) (.*)", GUIDE_COMMANDS)[0]
    assert name == references[0]["name"]
    assert set(re.findall(r"--from-literal=([\w-]+)=", rest)) == {reference["key"] for reference in references}


def test_the_endpoint_picker_is_told_of_gauges_that_exist() -> None:
    (picker,) = [document for document in map(yaml.safe_load, blocks("yaml")) if "plugins" in document]
    (parameters,) = [plugin["parameters"] for plugin in picker["plugins"] if "parameters" in plugin]
    (engine,) = parameters["engineConfigs"]
    gauges = {PREFIX + spec.name for spec in METRICS if spec.kind == "gauge"}
    assert engine.pop("name") == parameters["defaultEngine"]
    assert len(engine) == 3
    assert set(engine.values()) <= gauges
