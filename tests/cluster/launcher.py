"""Checks a file for `ray up`: Ray's own schema, and mistakes that the schema accepts."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import ray.autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.cloud_schemas import machine, node_config_problems
from tests.cluster.files import commands
from tests.cluster.parsers import problem

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
TOKEN = "~/.ray/auth_token"


def problems(raw: dict[str, Any]) -> Iterator[str]:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepared = prepare_config(raw)
            validate_config(prepared)
    except (ValueError, jsonschema.ValidationError, click.ClickException, AssertionError) as error:
        yield f"ray up: {getattr(error, 'message', error)}"
        return
    kind = raw["provider"]["type"]
    for key in set(raw["provider"]) - set(SCHEMA["properties"]["provider"]["properties"]):
        yield f"provider.{key}: unknown key"
    if kind == "local":
        if raw["max_workers"] != len(raw["provider"]["worker_ips"]):
            yield "max_workers: not as many as worker_ips"
    else:
        yield from _groups(raw, prepared, kind)
    yield from _starting(raw)


def _groups(raw: dict[str, Any], prepared: dict[str, Any], kind: str) -> Iterator[str]:
    for name, group in prepared["available_node_types"].items():
        config, offered = group["node_config"], group["resources"]
        yield from (f"{name}.node_config.{wrong}" for wrong in node_config_problems(kind, config))
        if name == raw["head_node_type"]:
            if offered.get("CPU") != 0 or set(offered) != {"CPU"}:
                yield f"{name}.resources: a head offers {{CPU: 0}}, not {offered}"
            continue
        cpus, gpus = machine(kind, config)
        if (cpus is not None and offered.get("CPU") != cpus) or offered.get("GPU", 0) != gpus:
            yield f"{name}.resources: {offered}, but the machine has {cpus} CPUs and {gpus} GPUs"
        if group["min_workers"] != 0:
            yield f"{name}.min_workers: nodes that nobody asked for"
        if not 1 <= group["max_workers"] <= raw["max_workers"]:
            yield f"{name}.max_workers: {group['max_workers']} of {raw['max_workers']}"
        if not {"min_workers", "max_workers"} <= set(raw["available_node_types"][name]):
            yield f"{name}: min_workers and max_workers are to be given"


def _starting(raw: dict[str, Any]) -> Iterator[str]:
    """Checks the commands that start Ray on a node: known flags, the token, no public port."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [words for line in raw[key] for words in commands(line) if words[:2] == ["ray", "start"]]
        if len(starts) != 1:
            yield f"{key}: {len(starts)} times `ray start`"
            continue
        for line in raw[key]:
            for words in commands(line):
                if wrong := problem(words):
                    yield f"{key}: {' '.join(words)}: {wrong}"
            if "ray start" in line and "export RAY_AUTH_MODE=token;" not in line.partition("ray start")[0]:
                yield f"{key}: no token is asked for"
        wanted = ["--head", "--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"]
        wanted = wanted if key.startswith("head") else ["--address=$RAY_HEAD_IP:6379"]
        yield from (f"{key}: {flag} is missing" for flag in wanted if flag not in starts[0])
    if raw["file_mounts"].get(TOKEN) != TOKEN:
        yield "file_mounts: the token does not reach the nodes"
    options = raw["docker"].get("run_options", [])
    for wanted_option in ("--env RAY_AUTH_MODE=token", "--security-opt no-new-privileges"):
        if wanted_option not in options:
            yield f"docker.run_options: {wanted_option} is missing"
    for option in options:
        if option.split()[0] in ("--privileged", "--publish", "-p") or "docker.sock" in option:
            yield f"docker.run_options: {option}"
