"""Fixtures of the tests of the stages `signals` and `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import precompute
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.signals.actor import SignalActor
from pipelines.signals.plan import SignalJob
from tests.pipelines.calibration_run import run_job, save_models
from tests.pipelines.signal_run import Result, context, make_recipe, prepare_run, shards_of


@pytest.fixture
def prepared(tmp_path: Path) -> Recipe:
    recipe = make_recipe(tmp_path)
    prepare_run(recipe)
    return recipe


@pytest.fixture(scope="session")
def undisturbed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The signals of two actors without any fault."""
    recipe = make_recipe(tmp_path_factory.mktemp("undisturbed"))
    prepare_run(recipe)
    ctx = context(recipe)
    summary = precompute.run(ctx)
    return Result(ctx, summary, shards_of(ctx))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Computes signals in this process instead of on Ray. Returns the list of computed shards."""
    computed: list[int] = []

    def compute(ctx: StageContext, job: SignalJob, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        actor = SignalActor(job) if shards else None
        for shard in shards:
            assert actor is not None
            sidecar = actor.compute(shard)
            computed.append(shard)
            yield shard, sidecar

    monkeypatch.setattr(precompute, "_compute", compute)
    return computed


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_models(directory)
    return directory


@pytest.fixture(scope="session")
def calibration(tiny_models: Path) -> dict[str, Any]:
    """The result of calibrating the tiny target."""
    return run_job(tiny_models)
