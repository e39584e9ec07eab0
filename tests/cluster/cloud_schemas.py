"""What the clouds accept as a node's configuration, from their own published descriptions: botocore's model of EC2's
API, the list of EC2's machines that moto ships, and the discovery document of Compute Engine in
google-api-python-client."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import moto

GOOGLE = importlib.util.find_spec("googleapiclient") is not None  # in the image, not among the packages of the tests


def node_config_problems(kind: str, config: dict[str, Any]) -> Iterator[str]:
    """Unknown keys, wrong types and values that the cloud would refuse when a node starts. Ray accepts them all."""
    if kind == "aws":
        call, arguments = _run_instances(), {**config, "MinCount": 1, "MaxCount": 1}
        yield from botocore.validate.ParamValidator().validate(arguments, call).generate_report().splitlines()
        yield from _not_in_enum(arguments, call, "")
    elif GOOGLE:
        yield from _google(config, {"$ref": "Instance"}, "")


def machine(kind: str, config: dict[str, Any]) -> tuple[int | None, int]:
    """(CPUs, GPUs) of a node. On Compute Engine, from the name; CPUs None where it does not tell them."""
    if kind == "aws":
        published = _instance_types().get(config["InstanceType"], {})
        gpus = published.get("GpuInfo", {}).get("Gpus", [])
        return published.get("VCpuInfo", {}).get("DefaultVCpus"), sum(gpu["Count"] for gpu in gpus)
    family, _, size = config["machineType"].rpartition("-")
    if match := re.fullmatch(r"(\d+)g", size):  # a3-highgpu-8g
        return None, int(match[1])
    return int(size), 1 if family.startswith("g2-") and int(size) <= 16 else 0


@cache
def _run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


@cache
def _instance_types() -> dict[str, Any]:
    path = Path(moto.__file__).parent / "ec2" / "resources" / "instance_types.json.gz"
    return dict(json.loads(gzip.decompress(path.read_bytes())))


def _not_in_enum(value: Any, shape: Any, where: str) -> Iterator[str]:
    """botocore leaves the values of enumerations to the service."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for key in value.keys() & shape.members.keys():
            yield from _not_in_enum(value[key], shape.members[key], f"{where}.{key}".lstrip("."))
    elif shape.type_name == "list" and isinstance(value, list):
        for one in value:
            yield from _not_in_enum(one, shape.member, where)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{where}: {value!r} is none of EC2's values"


@cache
def _google_schemas() -> dict[str, Any]:
    import googleapiclient

    path = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    return dict(json.loads(path.read_text())["schemas"])


def _google(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    """The discovery format: JSON schema, with `$ref` to a name, and 64-bit integers as strings."""
    schema = _google_schemas()[schema["$ref"]] if "$ref" in schema else schema
    types: dict[str, Any] = {"object": dict, "array": list, "string": (str, int), "integer": int, "boolean": bool}
    if not isinstance(value, types.get(schema["type"], object)):
        yield f"{where}: {value!r} is no {schema['type']}"
    elif schema["type"] == "array":
        for one in value:
            yield from _google(one, schema["items"], where)
    elif "properties" in schema:
        for key, inner in value.items():
            if key not in schema["properties"]:
                yield f"{where}.{key}: unknown key".lstrip(".")
            else:
                yield from _google(inner, schema["properties"][key], f"{where}.{key}".lstrip("."))
    elif value not in schema.get("enum", [value]):
        yield f"{where}: {value!r} is none of {', '.join(schema['enum'])}"
