"""The node image: its Dockerfile and the lock files of its packages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.lock import EXTRAS
from tests.cluster.files import CLUSTER
from tests.conftest import ROOT

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
LOCKS = ("requirements.lock", "requirements-flash.lock")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def ignored(pattern_file: Path, path: str) -> bool:
    """For an ignore file that ignores everything and lists exceptions."""
    kept = [line[1:] for line in pattern_file.read_text().splitlines() if line.startswith("!")]
    return not any(path == name or path.startswith(f"{name}/") for name in kept)


def problems(text: str) -> list[str]:
    found, stages, user = [], set(), None
    for keyword, rest in instructions(text):
        if keyword == "FROM":
            image, _, name = rest.partition(" AS ")
            ours = image in stages or image == "${PACKAGES}"
            if not ours and not re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image):
                found.append(f"FROM {image}: no version with its digest")
            stages.add(name)
            user = None
        elif keyword == "USER":
            user = rest
        elif keyword == "ADD":
            found.append("ADD: COPY says what is meant")
        elif keyword == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                if not (ROOT / source).exists() or ignored(CLUSTER / "Dockerfile.dockerignore", source):
                    found.append(f"COPY {source}: not there")
        elif keyword == "RUN":
            found += _run(rest)
        elif keyword in ("ENV", "ARG") and re.search(r"(TOKEN|SECRET|PASSWORD|KEY)\w*=", rest):
            found.append(f"{keyword} {rest}: a secret stays in the image")
        elif keyword == "SHELL" and "pipefail" not in rest:
            found.append("SHELL: a failure within a pipe is not seen")
    if not user or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
        found.append(f"USER {user}: must be a number that is not 0")
    return found


def _run(line: str) -> list[str]:
    found = []
    for command in line.split(" && "):
        words = command.split()
        if words[:2] == ["pip", "install"]:
            locked = "--require-hashes" in words or ("--no-deps" in words and words[-1].startswith("/build/"))
            if not locked or "--no-cache-dir" not in words:
                found.append(f"{command}: packages without hashes, or a cache that stays")
            if "--no-build-isolation" not in words and "setuptools" not in command:
                found.append(f"{command}: what builds it comes without a hash")
        if words[:2] == ["apt-get", "install"] and not {"--yes", "--no-install-recommends"} <= set(words):
            found.append(f"{command}: installs more than it says")
        if words[0] in ("curl", "wget", "sudo"):
            found.append(f"{command}: from anywhere, or as anybody")
    if "apt-get install" in line and not line.endswith("rm -rf /var/lib/apt/lists/*"):
        found.append(f"{line}: leaves the package lists")
    return found


def test_nothing_is_wrong_with_the_dockerfile() -> None:
    assert problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("@sha256:b18992999dbe", ":b18992999dbe", "no version with its digest"),
        ("USER 1000:1000", "USER root", "USER root: must be"),
        ("USER 1000:1000\n", "", "USER None: must be"),
        ("--require-hashes --no-build", "--no-build", "packages without hashes"),
        ("--no-build-isolation -r /build/requirements.lock", "-r /build/requirements.lock", "what builds it"),
        (" \\\n    && rm -rf /var/lib/apt/lists/*", "", "leaves the package lists"),
        ("COPY pipelines ", "COPY pipeline ", "COPY pipeline: not there"),
        ("COPY pipelines ", "COPY tests ", "COPY tests: not there"),
        ("ENV HOME=/home/ray", "ENV RCD_API_KEYS=x HOME=/home/ray", "a secret stays"),
        ("RUN python -m venv", "RUN curl x && python -m venv", "from anywhere"),
    ],
)
def test_mistakes_are_seen(old: str, new: str, says: str) -> None:
    assert old in DOCKERFILE
    found = problems(DOCKERFILE.replace(old, new))
    assert any(says in line for line in found), found


# -- the lock files


def locked(name: str) -> dict[str, str]:
    """Package -> version. Every line must have a version and exactly one hash."""
    found = {}
    for line in (CLUSTER / name).read_text().splitlines()[1:]:
        match = re.fullmatch(r"([a-z0-9-]+)==([\w.!]+) --hash=sha256:([0-9a-f]{64})", line)
        assert match, line
        assert match[1] not in found
        found[match[1]] = match[2]
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


def needed(*requirements: str) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def test_the_image_has_the_versions_that_the_tests_run_with() -> None:
    packages, tested = locked("requirements.lock"), pins()
    assert len(set(packages) & set(tested)) > 100
    assert {name: packages[name] for name in set(packages) & set(tested)} == {
        name: tested[name] for name in set(packages) & set(tested)
    }


def test_all_that_the_package_needs_is_locked() -> None:
    extras = PROJECT["optional-dependencies"]
    ours = [*PROJECT["dependencies"], *(r for extra in EXTRAS for r in extras[extra])]
    assert needed(*ours) | {"setuptools", "boto3", "google-api-python-client"} <= set(locked("requirements.lock"))
    assert set(locked("requirements-flash.lock")) == needed(*extras["flash"])
    for name, version in locked("requirements.lock").items():
        for requirement in map(Requirement, ours):
            if canonicalize_name(requirement.name) == name:
                assert version in requirement.specifier


def test_torch_comes_with_the_cuda_release_of_the_compiler() -> None:
    """flash-attn is compiled against torch, by the toolkit of the Dockerfile."""
    release = locked("requirements.lock")["cuda-toolkit"].split(".")[:2]
    assert re.findall(r"nvidia/cuda:(\d+)\.(\d+)\.", DOCKERFILE) == [tuple(release)]
    assert f"/usr/local/cuda-{'.'.join(release)} " in DOCKERFILE


def test_one_python() -> None:
    from cluster import lock  # noqa: F401  # a program, imported for what it would resolve for

    (image,) = re.findall(r"FROM python:(\d+\.\d+)\.", DOCKERFILE)
    heads = {re.findall(r"for Python (\d+\.\d+) on", (CLUSTER / name).read_text())[0] for name in LOCKS}
    assert heads == {image} == {lock.PYTHON}
    assert PROJECT["requires-python"] == f">={image}"
