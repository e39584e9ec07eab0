"""One Ray version everywhere, and no secret in any file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement

from tests.cluster.files import CLUSTER, KUBERAY, LAUNCHED, TEXTS, kuberay, launcher, leaves, ray_cluster_spec
from tests.cluster.test_image import locked, pins
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_ray() -> None:
    """Nodes with another Ray version than the head do not join it."""
    versions = {"installed": ray.__version__, "constraints": pins()["ray"], "image": locked("requirements.lock")["ray"]}
    versions |= {name: ray_cluster_spec(kuberay(name))["rayVersion"] for name in KUBERAY}
    assert set(versions.values()) == {ray.__version__}, versions
    (wanted,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray"]
    assert ray.__version__ in wanted.specifier


def test_one_image() -> None:
    """All files name the image of this package's version."""
    images = {launcher(name)["docker"]["image"] for name in LAUNCHED}
    images |= {value for name in KUBERAY for path, value in leaves(kuberay(name)) if path.endswith("/image")}
    assert images == {f"REGISTRY/rcd-ray:{PROJECT['version']}"}
    assert f"-t {images.pop()} ." in (CLUSTER / "Dockerfile").read_text()


# Patterns of keys and tokens. File hashes in locks and image digests are excluded.
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pous]_\w{20,}|\beyJ[\w-]{20,}"
    r"|(?<!sha256:)\b(?=[A-Za-z]*\d)[A-Za-z0-9+]{32,}={0,2}(?![\w/.-])"
)
NAMED = re.compile(r"(?i)(password|secret|token|api_?key|credential)s?[\"']?\s*[:=]\s*[\"']?[\w+/=-]{12,}")


def secrets(text: str) -> list[str]:
    return [match[0] for pattern in (SECRET, NAMED) for match in pattern.finditer(text)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_no_secret(path: Path) -> None:
    assert secrets(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "AWS_ACCESS_KEY_ID: AKIAIOSFODNN7EXAMPLE",
        "auth_token: 3f0c5be2a1d94c0b8a3f9ee2",
        'RAY_AUTH_TOKEN="not-so-very-secret"',
        "keys: 9b1deb4d3b7d4bad9bdd2b0d7b3dcb6d",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "{name: HF_TOKEN, value: hf_abcdefghijklmnopqrstuvw}",
    ],
)
def test_a_secret_would_be_seen(text: str) -> None:
    assert secrets(text)
