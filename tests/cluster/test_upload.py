"""What `ray job submit` uploads: Ray's own packing with .gitignore, .rayignore and the runtime environment."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

from tests.cluster.files import CLUSTER
from tests.conftest import ROOT

RUNTIME_ENV = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("upload") / "package.zip"
    create_package(str(ROOT), target, include_gitignore=True, excludes=RUNTIME_ENV.get("excludes", []))
    return target


def test_it_is_small(package: Path) -> None:
    assert package.stat().st_size < 5 * 2**20, "Ray takes a hundred, and every node unpacks it"


def test_it_is_the_code(package: Path) -> None:
    names = set(zipfile.ZipFile(package).namelist())
    code = [path for part in ("pipelines", "rcd_core") for path in (ROOT / part).rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in code if "__pycache__" not in path.parts} <= names
    assert {"cluster/serve.yaml", "pyproject.toml"} <= names


def test_it_is_nothing_else(package: Path) -> None:
    for name in zipfile.ZipFile(package).namelist():
        parts = Path(name).parts
        hidden = [part for part in parts if part.startswith(".") and part not in (".gitignore", ".rayignore", ".ci")]
        assert not hidden and "__pycache__" not in parts and parts[:2] != ("tests", "golden"), name
        assert Path(name).suffix not in (".safetensors", ".parquet", ".pt"), name


def test_ray_knows_the_fields_of_the_runtime_environment() -> None:
    known = RuntimeEnv(**{**RUNTIME_ENV, "working_dir": str(ROOT)})
    assert set(known) >= set(RUNTIME_ENV) == {"working_dir", "env_vars", "config"}
    assert set(RUNTIME_ENV) - {"config"} <= RuntimeEnv.known_fields
    assert RUNTIME_ENV["working_dir"] == "." and all(isinstance(v, str) for v in RUNTIME_ENV["env_vars"].values())
