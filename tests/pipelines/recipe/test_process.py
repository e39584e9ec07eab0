"""`deterministic` and `verify_weights`: from a recipe, a Serve config or a flag to the process that loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main as cli
from pipelines.ray_cluster.ranks import RankGroup
from pipelines.recipe.load import load_recipe
from pipelines.run.directory import key_material
from pipelines.run.stages import stages_of
from pipelines.serving.description import describe, parse_description
from rcd_core import UserError
from rcd_core.io import checksums
from rcd_core.process import ProcessSettings

GOLDEN = Path(__file__).parents[2] / "golden"
BOTH = ["deterministic=true", "verify_weights=false"]


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[ProcessSettings]:
    """What processes were asked for; nothing is switched in this one."""
    found: list[ProcessSettings] = []
    monkeypatch.setattr(ProcessSettings, "apply", lambda self: found.append(self))
    return found


def test_a_recipe_says_it_once_for_all_stages() -> None:
    recipe = load_recipe("sudoku-reference", BOTH)
    expected = ProcessSettings(verify_weights=False, deterministic=True)
    assert recipe.process == expected
    assert describe(recipe, lambda stage: f"/models/{stage}").process == expected
    assert load_recipe("sudoku-reference").process == ProcessSettings()


def test_results_that_are_not_deterministic_are_not_taken_for_such_and_verification_changes_none() -> None:
    def keys(changes: list[str]) -> dict[str, Any]:
        recipe = load_recipe("sudoku-reference", changes)
        stages = stages_of(recipe)
        return {name: key_material(stage, recipe, {})["recipe"] for name, stage in stages.items()}

    plain, chosen = keys([]), keys(BOTH)
    assert [name for name in plain if plain[name] == chosen[name]] == ["prepare"]
    assert not any("deterministic" in values for values in plain.values()), "keys of runs made before stay valid"
    assert keys(["verify_weights=false"]) == plain


@pytest.mark.parametrize("change", ["compile=true", "attention=flex", "strategy=deepspeed"])
def test_what_nothing_is_known_about_is_refused(change: str) -> None:
    key = f"reference.train.{change.partition('=')[0]}"
    with pytest.raises(UserError, match=f"deterministic is true but {key}"):
        load_recipe("sudoku-reference", [*BOTH, f"reference.train.{change}", "resources.gpus_per_worker=1"])


def test_a_serve_config(applied: list[ProcessSettings]) -> None:
    args = {"models": {"m": {"checkpoint": "/m"}}, "deterministic": True}
    assert parse_description(args).process == ProcessSettings(deterministic=True)
    RankGroup((), process=ProcessSettings(verify_weights=False))
    assert applied == [ProcessSettings(verify_weights=False)]


def test_flags(applied: list[ProcessSettings], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model_dir", str(GOLDEN / "sdar_tiny"), "--prompt-ids", "5 6 7", "--max_new_tokens", "4"]
    assert cli.main([*words, "--deterministic", "--no_verify"]) == 0
    assert applied == [ProcessSettings(verify_weights=False, deterministic=True)]


def test_no_verify_reaches_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checksums.SWITCH, "")  # so that it is restored
    ProcessSettings(verify_weights=False).apply()
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    (tmp_path / checksums.FILE).write_text(f"{'0' * 64}  a.safetensors\n")
    checksums.verify(tmp_path, [file])
    monkeypatch.delenv(checksums.SWITCH)
    with pytest.raises(UserError, match="a.safetensors has changed"):
        checksums.verify(tmp_path, [file])
