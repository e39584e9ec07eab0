"""cluster/kuberay: the fields that Kubernetes would drop or refuse, and what the files promise besides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from pipelines.full import main as full
from pipelines.run.driver import _parser
from pipelines.serving.config_file import config_problems
from tests.cluster.files import CLUSTER, KUBERAY, changed, kuberay, leaves, ray_cluster_spec
from tests.cluster.kuberay_fields import QUANTITY, SPECS, VERSIONS

RUNTIME_ENV = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())


def wrong(value: Any, fields: Any, where: str) -> Iterator[str]:
    """What does not have the form of `fields`."""
    if isinstance(fields, dict):
        if not isinstance(value, dict):
            yield f"{where}: {value!r} is no mapping"
        elif ... in fields:
            for key, inner in value.items():
                yield from wrong(inner, fields[...], f"{where}.{key}")
        else:
            known = {key.rstrip("!"): inner for key, inner in fields.items()}
            yield from (f"{where}.{key}: unknown" for key in set(value) - set(known))
            needed = {key[:-1] for key in fields if key.endswith("!")}
            yield from (f"{where}.{key}: missing" for key in needed - set(value))
            for key in set(value) & set(known):
                yield from wrong(value[key], known[key], f"{where}.{key}")
    elif isinstance(fields, list):
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
        else:
            for number, inner in enumerate(value):
                yield from wrong(inner, fields[0], f"{where}.{number}")
    elif fields is QUANTITY:
        if not isinstance(value, str) or not re.fullmatch(r"\d+(m|Mi|Gi|Ti)?", value):
            yield f"{where}: {value!r} is no quantity in quotes"
    elif isinstance(fields, tuple):
        if value not in fields:
            yield f"{where}: {value!r} is none of {fields}"
    elif type(value) is not fields:
        yield f"{where}: {value!r} is no {fields.__name__}"


def problems(raw: dict[str, Any]) -> list[str]:
    kind = raw.get("kind")
    if raw.get("apiVersion") != VERSIONS.get(str(kind), "v1"):
        return [f"apiVersion: {raw.get('apiVersion')!r}"]
    found = list(wrong(raw["metadata"], {"name!": str}, "metadata"))
    found += [f"{key}: unknown" for key in set(raw) - {"apiVersion", "kind", "metadata", "spec"}]
    return found + (list(wrong(raw["spec"], SPECS[kind], "spec")) if kind in SPECS else [])


def documents() -> list[dict[str, Any]]:
    return [*map(kuberay, KUBERAY), *yaml.safe_load_all((CLUSTER / "kuberay" / "storage.yaml").read_text())]


@pytest.mark.parametrize("raw", documents(), ids=lambda raw: raw["kind"])
def test_all_fields_exist(raw: dict[str, Any]) -> None:
    assert problems(raw) == []


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("apiVersion", "ray.io/v2", "apiVersion: 'ray.io/v2'"),
        ("spec/autoscalerOption", {}, "spec.autoscalerOption: unknown"),
        ("spec/headGroupSpec", None, "spec.headGroupSpec: missing"),
        ("spec/autoscalerOptions/version", "v3", "spec.autoscalerOptions.version: 'v3' is none of"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "spec.headGroupSpec.rayStartParams.num-cpus: 0 is no str"),
        ("spec/workerGroupSpecs/0/maxReplicas", "4", "spec.workerGroupSpecs.0.maxReplicas: '4' is no int"),
        ("spec/workerGroupSpecs/0/template/spec/container", [], "template.spec.container: unknown"),
        ("spec/workerGroupSpecs/1/template/spec/containers/0/image", None, "containers.0.image: missing"),
        ("spec/workerGroupSpecs/1/template/spec/containers/0/resources/limits/cpu", "14 cores", "limits.cpu: '14 c"),
    ],
)
def test_mistakes_are_seen(path: str, value: Any, says: str) -> None:
    found = problems(changed(kuberay("raycluster"), path, value))
    assert len(found) == 1 and says in found[0], found


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
    told = "".join((CLUSTER / "kuberay" / f"{name}.yaml").read_text() for name in ("storage", "rayservice"))
    assert secrets and all(f"kubectl create secret generic {name} " in told for name in secrets)


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
