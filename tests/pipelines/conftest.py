"""Fixtures of the tests of the stage `signals`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import precompute
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.signals.actor import SignalActor
from pipelines.signals.plan import SignalJob
from tests.pipelines.signal_run import Result, context, prepared, recipe, shards_of


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    made = recipe(tmp_path)
    prepared(made)
    return made


@pytest.fixture(scope="session")
def undisturbed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What two actors make when nothing goes wrong."""
    made = recipe(tmp_path_factory.mktemp("undisturbed"))
    prepared(made)
    ctx = context(made)
    summary = precompute.run(ctx)
    return Result(ctx, summary, shards_of(ctx))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An actor in this process instead of Ray, where the test is about files; the shards it was asked for."""
    asked: list[int] = []

    def compute(ctx: StageContext, job: SignalJob, shards: list[int]) -> Iterator[int]:
        actor = SignalActor(job) if shards else None
        for shard in shards:
            assert actor is not None
            actor.compute(shard)
            asked.append(shard)
            yield shard

    monkeypatch.setattr(precompute, "_compute", compute)
    return asked
