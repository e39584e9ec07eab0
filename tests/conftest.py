"""Fixtures shared by all tests: one real Ray cluster per session, and the golden vectors."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from rcd_core.io import retries

pytest_plugins = ["tests.fault_table"]
ROOT = Path(__file__).resolve().parents[1]
# Ray reads these on import: no token in the user's home, no telemetry, no warning per worker, no watcher for nodes that
# a cloud takes away, and no lower priority for workers, which would wait for the other test process on two cores.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# The hub's client reads this on import, in Ray's workers too. Only tests/hub_server.py ever answers there.
with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_free.getsockname()[1]}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a small local Ray cluster with four logical CPUs, started once per test process.

    RAY_ADDRESS is set while it runs, so that `ray.init()` and subprocesses join it and no other cluster.
    """
    import ray

    # A short path, because it holds Unix sockets; a private one, because another Ray may run on this machine.
    temp_dir = tempfile.mkdtemp(prefix="rcd-test-", dir="/tmp")
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    context = ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        _temp_dir=temp_dir,
        namespace="rcd-tests",
        log_to_driver=False,
    )
    address = context.address_info["gcs_address"]
    patch.setenv("RAY_ADDRESS", address)
    try:
        yield address
    finally:
        ray.shutdown()
        patch.undo()
        shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(autouse=True)
def hasty_storage() -> None:
    """A job in this process, of an earlier test, has made it wait half an hour for an object store."""
    retries._job.clear()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of golden vectors."""
    path = ROOT / "tests" / "golden"
    if not path.is_dir():
        pytest.skip("tests/golden is not there")
    return path


# Files with minutes of work, the longest first.
LONGEST = (
    "test_job.py",
    "test_serve.py",
    "test_evaluate.py",
    "test_train.py",
    "test_precompute.py",
    "test_strategies.py",
    "test_plan.py",
    "test_answer_files.py",
    "test_loop.py",
)


# Files that use Ray are of one process, because an idle Ray takes a good part of a core.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The installed Chromium; without one, or without playwright, the tests that use it are skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


WITH_RAY = (
    "tests/pipelines/test_",
    "tests/pipelines/cli/test_evaluate.py",
    "tests/pipelines/evaluation/test_grading_actor.py",
    "tests/pipelines/ray_cluster/test_hardware.py",
    "tests/pipelines/recipe/test_ablations.py",
    "tests/pipelines/run/test_directory.py",
    "tests/pipelines/serving/test_metrics.py",
    "tests/pipelines/serving/test_serve_",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the files in this order, so that one of them does not end with a long file alone."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(WITH_RAY):
            raise pytest.UsageError(f"{item.nodeid} uses ray_cluster; name its file in WITH_RAY in tests/conftest.py")
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (not item.nodeid.startswith(WITH_RAY), order.get(item.path.name, len(order))))


class RayInOneProcess(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith(WITH_RAY) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayInOneProcess:
    return RayInOneProcess(config, log)
