"""The recipe for a machine of eight H100 and its smoke form: the same path, and neither asks for more than is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipe.load import load_recipe
from pipelines.run.driver import main as full
from pipelines.run.keys import flatten
from tests.cluster.demands import demands

FULL, SMOKE = "sdar-4b-8xh100", "sdar-4b-8xh100-smoke"


@pytest.mark.parametrize("name", [FULL, SMOKE])
def test_a_dry_run_plans_every_stage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert full(["--recipe", name, "--storage", str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for stage in ("prepare", "reference", "signals", "target", "baseline", "evaluate", "deploy"):
        assert f"│ {stage} " in out


@pytest.mark.parametrize("name", [FULL, SMOKE])
def test_no_stage_asks_for_more_than_the_machine_has(name: str) -> None:
    for stage, bundles in demands(load_recipe(name)).items():
        total = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
        assert total["GPU"] <= 8 and total["CPU"] <= 64, stage
        assert all(bundle.keys() <= {"CPU", "GPU"} for bundle in bundles), "no custom resources on one machine"


def test_the_smoke_form_is_shorter_and_not_other() -> None:
    recipe, smoke = (flatten(load_recipe(name).model_dump(mode="json")) for name in (FULL, SMOKE))
    changed = {key for key in recipe.keys() | smoke.keys() if recipe.get(key) != smoke.get(key)}
    often = ("epochs", "steps", "checkpoint_every", "validate_every", "log_every")
    allowed = {f"{stage}.train.{name}" for stage in ("reference", "target") for name in often}
    allowed |= {"name", "data.num_train", "data.num_test", "data.num_validation", "deploy.model_id"}
    allowed |= {"evaluate.thresholds", "evaluate.decode.max_new_tokens"}
    assert changed <= allowed and smoke["reference.train.steps"] == smoke["target.train.steps"] == 20
