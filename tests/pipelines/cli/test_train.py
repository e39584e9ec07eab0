"""`rcd train plan`, and the recipes of published sizes it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cli.main import main
from pipelines.recipe import inputs
from pipelines.recipe.files import recipe_names
from pipelines.recipe.load import load_recipe
from pipelines.run.driver import main as full

GOLDEN = Path(__file__).parents[2] / "golden"
SIZES = "family: sdar, num_heads: 32, num_kv_heads: 8, head_dim: 128, num_layers: 36"
SDAR_8B = f"target.start={{{SIZES}, hidden_size: 4096, intermediate_size: 12288}}"
SDAR_4B = f"reference.start={{{SIZES}, hidden_size: 2560, intermediate_size: 9728}}"
PUBLISHED = [name for name in recipe_names() if name.startswith(("sdar", "llada"))]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["train", "plan", *arguments]) == code
    caught = capsys.readouterr()
    return caught.err if code else caught.out


def test_a_plan_of_a_published_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    sizes = ["--vocab_size", "151936", "--set", SDAR_8B, "--set", SDAR_4B]
    out = plan(capsys, "--recipe", "sdar-8b-b64", *sizes, "--examples", "960", "--example_tokens", "4000")
    assert "target: 8,190,735,360 parameters" in out and "reference: 4,411,424,256 parameters" in out
    assert "50 steps of 96: 19,200,000 tokens (given)" in out, "5 epochs of 960 examples"
    rows = {line.split("│")[1].strip(): line for line in out[out.index("target:") :].splitlines() if "│" in line}
    assert "no" in rows["ddp"] and "none" in rows["ddp"] and "yes" in rows["recipe: fsdp2"]
    assert float(rows["deepspeed 3"].split("│")[8]) < float(rows["deepspeed 1"].split("│")[8])
    unknown = plan(capsys, "--recipe", "sdar-8b-b64", *sizes)
    assert "5 epochs of a number of examples that is not known" in unknown and "--examples" in unknown


def test_sizes_come_from_a_checkpoint_on_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = str(GOLDEN / "sdar_tiny")
    sets = ["base=null", f"target.start={tiny}", f"tokenizer.path={tiny}", f"storage={tmp_path}"]
    arguments = [part for s in sets for part in ("--set", s)]
    out = plan(capsys, "--recipe", "demo", "--vocab_size", "300", *arguments)
    from rcd_core import load_model

    assert f"target: {load_model(tiny).num_parameters():,} parameters" in out


def test_what_cannot_be_planned_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    refused = plan(capsys, "--recipe", "sdar-8b-b64", code=2)
    assert "reference.start is JetLM/SDAR-1.7B-Chat, which is not in the hub's cache" in refused
    assert "hf download JetLM/SDAR-1.7B-Chat config.json" in refused
    assert "give --vocab_size" in plan(capsys, "--recipe", "sdar-8b-b64", "--set", SDAR_4B, code=2)
    assert "--mfu is 4.0; it is a share" in plan(capsys, "--recipe", "demo", "--mfu", "4", code=2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_published_sizes_dry_run(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inputs, "_require_datasets", lambda key: None)  # the extra `hub` is not installed for tests
    assert full(["--recipe", name, "--storage", str(tmp_path), "--dry-run"]) == 0
    assert "8 x (CPU 8, GPU 1)" in capsys.readouterr().out
    recipe = load_recipe(name)
    assert recipe.target.residual.dropout == 0 and recipe.target.residual.alpha == "normalized_entropy"
    assert not any(tmp_path.iterdir()), "nothing is written"
