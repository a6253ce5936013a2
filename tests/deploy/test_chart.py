"""The Helm chart: linted, rendered by the real engine, every manifest checked against Kubernetes' schemas."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from gateway.config.load import load_config
from gateway.config.schema import Config

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "thinkgate"
CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
OLDEST_KUBERNETES = "1.30.0"  # Chart.yaml, kubeVersion

Manifest = dict[str, Any]


def values_of(case: str) -> dict[str, Any]:
    """The values of a file under ci/, as Helm reads them."""
    return helm.values_from_yaml((CHART / "ci" / f"{case}-values.yaml").read_text())


def render(values: dict[str, Any]) -> list[Manifest]:
    """Every manifest of the chart, as an install would create it."""
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="demo", namespace="prod")
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    """The first manifest of `kind`."""
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


def pod_of(manifests: list[Manifest]) -> Manifest:
    """The pod spec of the Deployment."""
    pod: Manifest = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    return pod


def load_rendered(manifests: list[Manifest], folder: Path) -> Config:
    """The rendered configuration file, read as the gateway reads it."""
    path = folder / "thinkgate.yaml"
    path.write_text(of_kind(manifests, "ConfigMap")["data"]["thinkgate.yaml"])
    return load_config(path, env={})


@pytest.mark.parametrize("case", CASES)
def test_chart_lints_without_findings(case):
    """Lint returns findings and does not raise: both lists are looked at."""
    report = helm.lint(CHART, values_of(case), strict=True, kube_version=f"v{OLDEST_KUBERNETES}")
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] >= 2] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_every_manifest_is_valid_kubernetes(case, version):
    """No manifest has a field that the oldest or the newest Kubernetes does not know."""
    for manifest in render(values_of(case)):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_minimal_install_has_the_documented_objects():
    """A minimal install is a Deployment, two Services, a ConfigMap and a Secret."""
    kinds = sorted(manifest["kind"] for manifest in render(values_of("minimal")))
    assert kinds == ["ConfigMap", "Deployment", "Secret", "Service", "Service"]


@pytest.mark.parametrize("case", CASES)
def test_rendered_configuration_is_one_the_gateway_accepts(case, tmp_path):
    """The file in the ConfigMap validates, numbers intact, on every address and the chart's ports."""
    values = values_of(case)
    manifests = render(values)
    config = load_rendered(manifests, tmp_path)
    ports = {port["name"]: port["containerPort"] for port in pod_of(manifests)["containers"][0]["ports"]}
    assert config.server.host == "0.0.0.0"
    assert (config.server.port, config.server.metrics.port) == (ports["http"], ports["metrics"])
    assert config.server.max_body_bytes == 10485760
    assert list(config.models) == list(values["config"]["models"])


@pytest.mark.parametrize("case", CASES)
def test_grace_period_outlasts_the_drain(case, tmp_path):
    """A pod is killed only after its streams had the configured time to finish."""
    manifests = render(values_of(case))
    pod = pod_of(manifests)
    wait_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = load_rendered(manifests, tmp_path).server.timeouts.drain_s
    assert pod["terminationGracePeriodSeconds"] > wait_s + drain_s


@pytest.mark.parametrize("case", CASES)
def test_pod_runs_without_privileges(case):
    """The container is not root, cannot become root and cannot write to its image."""
    pod = pod_of(render(values_of(case)))
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]


def test_probes_tell_alive_from_ready():
    """A busy or draining pod leaves rotation; only a hung one is restarted."""
    container = pod_of(render(values_of("minimal")))["containers"][0]
    assert container["livenessProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "http"}


def test_metrics_are_never_on_the_public_service():
    """A load balancer in front of the gateway does not publish the metrics port."""
    services = {m["metadata"]["name"]: m for m in render(values_of("full")) if m["kind"] == "Service"}
    assert services["gate"]["spec"]["type"] == "LoadBalancer"
    assert [port["name"] for port in services["gate"]["spec"]["ports"]] == ["http"]
    assert services["gate-metrics"]["spec"]["type"] == "ClusterIP"


@pytest.mark.parametrize("case", CASES)
def test_services_select_the_pods(case):
    """The Deployment and both Services agree on who belongs to them."""
    manifests = render(values_of(case))
    labels = of_kind(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [m["spec"]["selector"] for m in manifests if m["kind"] == "Service"]
    selectors.append(of_kind(manifests, "Deployment")["spec"]["selector"]["matchLabels"])
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_secret_reaches_the_container_and_not_the_configuration():
    """A secret stands in the Secret alone; the file only names its variable."""
    manifests = render(values_of("minimal"))
    secret = of_kind(manifests, "Secret")
    assert base64.b64decode(secret["data"]["THINKGATE_KEY_APP"]) == b"only-for-tests"
    source = pod_of(manifests)["containers"][0]["envFrom"][0]["secretRef"]["name"]
    assert source == secret["metadata"]["name"]
    assert "only-for-tests" not in str([m for m in manifests if m["kind"] != "Secret"])


def test_existing_secret_is_used_instead_of_a_new_one():
    """With secret.existingSecret the chart makes no Secret of its own."""
    manifests = render(values_of("full"))
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    assert pod_of(manifests)["containers"][0]["envFrom"] == [{"secretRef": {"name": "gate-keys"}}]


@pytest.mark.parametrize(
    ("changed", "rolls"),
    [
        ({"config": {"routing": {"default_mode": "instant"}}}, False),
        ({"config": {"server": {"timeouts": {"total_s": 60}}}}, True),
        ({"secret": {"values": {"THINKGATE_KEY_APP": "rotated-secret"}}}, True),
    ],
)
def test_pods_roll_only_for_what_a_running_gateway_cannot_take_up(changed, rolls):
    """A new secret or server section replaces the pods; the rest of the file is reloaded in place."""

    def annotations(values):
        return of_kind(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]

    before = values_of("minimal")
    after = {**before, **{name: {**before[name], **part} for name, part in changed.items()}}
    assert (annotations(before) != annotations(after)) is rolls


def test_configuration_is_mounted_as_a_folder():
    """The file is not mounted by subPath, which would hide every later change from the gateway."""
    mounts = pod_of(render(values_of("minimal")))["containers"][0]["volumeMounts"]
    assert next(mount for mount in mounts if mount["name"] == "config") == {
        "name": "config",
        "mountPath": "/etc/thinkgate",
        "readOnly": True,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replicaCount", "three"),
        ("replicas", 3),
        ("image", {"repository": "thinkgate", "pullPolicy": "Sometimes"}),
        ("ports", {"http": 80}),
        ("service", {"type": "ExternalName"}),
        ("drainSeconds", -1),
        ("config", {"modelz": {}}),
        ("config", {"models": {"m": {"backends": []}}}),
        ("config", {"models": {"m": {"backends": [{"id": "a", "url": "vllm:8000"}]}}}),
        ("config", {"keys": [{"id": "app", "secret": "in-the-clear"}]}),
        ("config", {"keys": [{"id": "app"}]}),
        ("secret", {"values": {"NOT-A-VARIABLE": "long-enough"}}),
        ("secret", {"values": {"SHORT": "abc"}}),
    ],
)
def test_schema_refuses_bad_values(name, value):
    """values.schema.json stops a wrong value before anything is rendered, naming it."""
    values = values_of("minimal")
    merged = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmValuesError, match=name):
        chart.validate_schema({**values, name: merged})


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"config": {"models": {}}}, "name at least one model"),
        ({"config": {"keys": []}}, "config.keys is empty"),
        ({"secret": {"values": {}}}, "put it under secret.values"),
        ({"replicaCount": 2, "config": {"limits": [{"scope": "model:qwen3"}]}}, "needs a shared store"),
    ],
)
def test_values_that_would_come_up_broken_are_refused(changed, remedy):
    """What only a running pod would reveal fails at rendering, with the remedy."""
    values = values_of("minimal")
    for name, part in changed.items():
        values[name] = {**values[name], **part} if isinstance(part, dict) else part
    with pytest.raises(helm.HelmRenderError, match=remedy):
        render(values)


def test_default_values_validate_but_need_models_and_keys():
    """The chart's own values pass the schema; an install must say which models and keys there are."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema({})
        with pytest.raises(helm.HelmRenderError, match=r"config\.models is empty"):
            chart.render({}, name="demo", namespace="prod")
