"""cluster/kuberay: valid by the published schemas, and secure, probed and consistent with each other."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml
from ray._private import ray_constants

from pipelines.full import main as full
from pipelines.run.driver import _parser
from pipelines.serving.config_file import config_problems
from pipelines.serving.graph import DRAIN_SPARE_S
from pipelines.serving.http.guard import ApiLimits
from tests.cluster.files import CLUSTER, KUBERAY, changed, kuberay, leaves, ray_cluster_spec
from tests.conftest import ROOT
from tests.docs import kuberay as generated
from tests.docs.recipes import write_or_check

CRDS = ROOT.parent / "shared" / "data" / "kuberay-crds"
RAY_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
RUNTIME_ENV = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, which a Kubernetes API server would drop without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not open_ended:
        result["additionalProperties"] = False
    return result


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema.Draft7Validator]:
    """By kind, from the CustomResourceDefinitions that KubeRay 1.7.0 publishes."""
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is not there")
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        (version,) = [v for v in definition["versions"] if v["name"] == "v1"]
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["apiVersion"] = {"const": f"{definition['group']}/v1"}
        found[definition["names"]["kind"]] = jsonschema.Draft7Validator(schema)
    return found


def problems(validator: jsonschema.Draft7Validator, raw: dict[str, Any]) -> list[str]:
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(raw)]


def documents() -> list[dict[str, Any]]:
    return [*map(kuberay, KUBERAY), *yaml.safe_load_all((CLUSTER / "kuberay" / "storage.yaml").read_text())]


@pytest.mark.parametrize("name", KUBERAY)
def test_files_match_the_published_schemas(name: str, validators: dict[str, Any]) -> None:
    raw = kuberay(name)
    assert problems(validators[raw["kind"]], raw) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "ray.io/v2"),
        ("spec/autoscalerOption", {}),
        ("spec/headGroupSpec", None),
        ("spec/autoscalerOptions/version", "v3"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("spec/workerGroupSpecs/0/maxReplicas", "4"),
        ("spec/workerGroupSpecs/0/template/spec/container", []),
        ("spec/workerGroupSpecs/1/template/spec/containers/0/name", None),
        ("spec/workerGroupSpecs/1/template/spec/containers/0/resources/limits/cpu", "14 cores"),
    ],
)
def test_mistakes_are_seen(path: str, value: Any, validators: dict[str, Any]) -> None:
    changes = problems(validators["RayCluster"], changed(kuberay("raycluster"), path, value))
    assert len(changes) == 1 and path.split("/")[-1] in changes[0], changes


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_restricted_probed_and_asked_for_a_token(name: str) -> None:
    spec = ray_cluster_spec(kuberay(name))
    assert spec["authOptions"] == {"mode": "token", "secretName": "rcd-token"}
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    contexts = [spec["autoscalerOptions"]["securityContext"]]
    for group in [head, *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        contexts.append(container["securityContext"])
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False and context["runAsNonRoot"] is True
        assert context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("name", KUBERAY)
def test_groups_start_empty(name: str) -> None:
    for group in ray_cluster_spec(kuberay(name))["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0) and group["maxReplicas"] > 0


def test_what_the_pods_name_is_in_storage_yaml() -> None:
    there = {(raw["kind"], raw["metadata"]["name"]) for raw in documents()}
    named = dict(leaves([kuberay(name) for name in KUBERAY]))
    claims = {value for path, value in named.items() if path.endswith("claimName")}
    accounts = {value for path, value in named.items() if path.endswith("serviceAccountName")}
    assert claims and {("PersistentVolumeClaim", name) for name in claims} <= there
    assert accounts and {("ServiceAccount", name) for name in accounts} <= there
    secrets = {value for path, value in named.items() if path.endswith(("secretName", "secretKeyRef/name"))}
    secrets |= {there for path, there in named.items() if path.endswith("secretKeyRef/name") and there}
    told = "".join((CLUSTER / "kuberay" / f"{name}.yaml").read_text() for name in ("storage", "rayservice"))
    assert secrets and all(f"kubectl create secret generic {name} " in told for name in secrets)
    fault_tolerance = ray_cluster_spec(kuberay("raycluster"))["gcsFaultToleranceOptions"]
    host, _, port = fault_tolerance["redisAddress"].partition(":")
    (redis,) = [raw for raw in documents() if raw["kind"] == "StatefulSet"]
    assert {("Service", host), ("StatefulSet", host)} <= there and redis["spec"]["serviceName"] == host
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert container["ports"] == [{"name": "redis", "containerPort": int(port)}]
    (password,) = container["env"]
    assert password["valueFrom"] == fault_tolerance["redisPassword"]["valueFrom"]


@pytest.mark.parametrize("template", generated.templates(), ids=lambda path: path.name)
def test_files_are_current(template: Any) -> None:
    assert write_or_check(generated.file_of(template), generated.rendered(template), ["--check"]) == 0, "`make docs`"


def test_a_stale_file_is_seen(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "raycluster.yaml"
    page.write_text((CLUSTER / "kuberay" / "raycluster.yaml").read_text().replace("maxReplicas: 4", "maxReplicas: 5"))
    assert write_or_check(page, generated.rendered(generated.TEMPLATES / "raycluster.yaml.j2"), ["--check"]) == 1
    assert "raycluster.yaml" in capsys.readouterr().err


def test_other_objects_match_kubernetes_schemas() -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    raw = list(yaml.safe_load_all((CLUSTER / "kuberay" / "storage.yaml").read_text()))
    for one in raw:
        schemas.validate(one, schemas.latest_version(), strict=True)
    for path in ("spec/template/spec/containers/0/readinessProb", "spec/replicas"):
        with pytest.raises(schemas.ValidationError):
            schemas.validate(changed(raw[-1], path, "x"), schemas.latest_version(), strict=True)


def test_monitoring_matches_the_operator_s_schemas() -> None:
    models = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
    raw = list(yaml.safe_load_all((CLUSTER / "kuberay" / "monitoring.yaml").read_text()))
    assert [one["kind"] for one in raw] == ["PodMonitor", "PodMonitor", "PrometheusRule"]
    for one in raw:  # unknown fields are dropped
        parsed = getattr(models, one["kind"]).model_validate(one)
        assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == one
    with pytest.raises(ValueError, match="podMetricsEndpoints"):
        models.PodMonitor.model_validate(changed(raw[0], "spec/podMetricsEndpoints", "metrics"))


def test_monitored_ports_and_alerts_are_those_of_the_pods() -> None:
    nodes, ingress, rules = yaml.safe_load_all((CLUSTER / "kuberay" / "monitoring.yaml").read_text())
    for name in KUBERAY:
        spec = ray_cluster_spec(kuberay(name))
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        ports = [{port["name"] for port in g["template"]["spec"]["containers"][0]["ports"]} for g in groups]
        assert all({e["port"] for e in nodes["spec"]["podMetricsEndpoints"]} <= names for names in ports)
        assert {e["port"] for e in ingress["spec"]["podMetricsEndpoints"]} <= ports[0]
    assert rules["spec"] == yaml.safe_load((CLUSTER / "grafana" / "alerts.yaml").read_text())


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_time_to_drain(name: str) -> None:
    """Requests may take their deadline and a spare (graph.py), Ray waits as long, and Kubernetes a little longer."""
    requests = ApiLimits().timeout_s + DRAIN_SPARE_S
    spec = ray_cluster_spec(kuberay(name))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (ray_s,) = [float(v["value"]) for v in pod["containers"][0]["env"] if v["name"] == RAY_DRAIN]
        assert requests <= ray_s < pod["terminationGracePeriodSeconds"]
    assert hasattr(ray_constants, RAY_DRAIN), "Ray has renamed it"
    if name == "rayservice":
        service = kuberay(name)["spec"]
        assert service["rayClusterDeletionDelaySeconds"] >= requests
        (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
        assert application["args"]["ingress"] == {"replicas": 2, "resources": None, "drain_s": requests}


def test_the_job_runs_on_the_same_cluster() -> None:
    assert ray_cluster_spec(kuberay("rayjob")) == ray_cluster_spec(kuberay("raycluster"))


def test_the_job_s_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job = kuberay("rayjob")["spec"]
    python, m, module, *arguments = job["entrypoint"].split()
    assert (python, m, module) == ("python", "-m", "pipelines.full")
    options = _parser().parse_args(arguments)
    assert options.storage == "/mnt/rcd" and "deploy" not in options.stages, "its cluster ends with it"
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": RUNTIME_ENV["env_vars"]}
    # The stages are those of the recipe: an unknown one is refused.
    assert full(["--recipe", options.recipe, "--storage", str(tmp_path), "--stages", options.stages + ",nope"]) == 2
    assert "nope" in capsys.readouterr().err


def test_the_service_s_application() -> None:
    config = yaml.safe_load(kuberay("rayservice")["spec"]["serveConfigV2"])
    assert list(config_problems(config)) == []
    containers = [
        group["template"]["spec"]["containers"][0]
        for group in ray_cluster_spec(kuberay("rayservice"))["workerGroupSpecs"]
    ]
    for container in containers:  # open within Kubernetes: keys in every pod, and requests only to pods with a proxy
        assert "RCD_API_KEYS" in {variable["name"] for variable in container["env"]}
        assert container["readinessProbe"]["httpGet"]["port"] == config["http_options"]["port"]
