"""Recipes that extend another one, further arms and baselines, and the ablations that are made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.evaluation.methods import make_methods
from pipelines.recipe.files import read_recipe, recipe_names
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.driver import main as full
from pipelines.run.stages import stages_of
from rcd_core.errors import UserError
from rcd_core.families.added import FILES

ABLATIONS = [name for name in recipe_names() if name.startswith("ablation-")]
BUT_DEPLOY = "[!d]*"  # as the recipes say it


def arms(recipe: Recipe) -> Iterator[Any]:
    """What the stage evaluate decodes, with stage names in place of checkpoints."""
    return make_methods(SimpleNamespace(recipe=recipe, checkpoint=lambda stage: stage))  # type: ignore[arg-type]


# -- extends


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_recipe_changes_what_it_says_and_takes_the_rest(tmp_path: Path) -> None:
    write(
        tmp_path / "a.yaml",
        "extends: sudoku-reference\nname: a\nreference: {start: {num_layers: 1}}\nvariants: {wild: {alpha: one}}\n",
    )
    recipe = load_recipe(write(tmp_path / "b.yaml", "extends: a.yaml\nname: b\nevaluate: {thresholds: [0.5]}\n"))
    demo = load_recipe("sudoku-reference")
    assert recipe.name == "b" and recipe.evaluate.thresholds == (0.5,) and recipe.target == demo.target
    assert recipe.reference is not None and demo.reference is not None
    start, plain = recipe.reference.start, demo.reference.start
    assert start.num_layers == 1 and start.hidden_size == plain.hidden_size  # type: ignore[union-attr]
    assert set(recipe.variants) == {"paper_alpha", "wild"}


def test_an_entry_is_taken_out_by_null(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "extends: sudoku-reference\nname: a\nvariants: {paper_alpha: null}\n")
    assert load_recipe(path).variants == {}
    assert load_recipe("sudoku-reference", ["variants.paper_alpha=null"]).variants == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("extends: 3\n", "extends is 3"),
        ("extends: a.yaml\n", "extends is 'a.yaml'"),
        ("extends: damo\n", "did you mean 'demo'?"),
        ("extends: nowhere\n", "b.yaml: extends is 'nowhere'"),
    ],
)
def test_what_cannot_be_extended_is_named(text: str, named: str, tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path / "b.yaml", text))
    assert named in str(caught.value)


# -- further baselines and arms


def test_a_further_baseline_is_trained_and_evaluated() -> None:
    recipe = load_recipe("sudoku-reference", ["baselines.longer={steps: 800}"])
    training = recipe.training("baseline-longer")
    assert training.train.steps == 800 and training.residual is None and training.start is None
    assert training.train.learning_rate == recipe.target.train.learning_rate  # type: ignore[union-attr]
    stages = stages_of(recipe)
    assert stages["baseline-longer"].sections[:2] == ("target.start", "baselines.longer")
    assert "baseline-longer" in stages["evaluate"].inputs
    found = {arm.info.name: arm for arm in arms(recipe)}
    assert found["seqd-longer"].checkpoint == "baseline-longer" and not found["seqd-longer"].settings.residual
    assert found["seqd-longer"].info.baseline == "seqd" and found["seqd-longer"].info.title == "SeqD longer"


def test_a_further_arm_decodes_a_model_in_its_own_way() -> None:
    more = '{model: baseline, title: "Fed back", decode: {residual: true, alpha: ramp, start: zero}}'
    warm = "{model: base, decode: {residual: true, residual_source: reference}}"
    settings = ["evaluate.decode={residual_top_k: 8}", "evaluate.block_lengths=[16, 37]", "evaluate.starts=[zero]"]
    recipe = load_recipe(
        "sudoku-reference", [f"evaluate.arms.smooth={more}", f"evaluate.arms.base_fed={warm}", *settings]
    )
    assert stages_of(recipe)["evaluate"].inputs[:2] == ("prepare", "base")
    found = {arm.info.name: arm for arm in arms(recipe)}
    smooth = found["smooth/b16"]
    assert smooth.info.title == "Fed back, block 16" and smooth.info.baseline == "seqd/b16"
    assert (smooth.settings.alpha, smooth.settings.residual_top_k, smooth.settings.block_length) == ("ramp", 8, 16)
    assert smooth.reference is None and smooth.settings.seed == 0
    assert found["base_fed/b37"].reference == "reference" and found["base_fed/b37"].checkpoint == "base"
    assert found["base_fed/b37"].info.title == "base fed, block 37"


def test_an_arm_can_need_the_reference() -> None:
    alone = ["reference=null", "target.residual.source=self", "target.residual.alpha_scale=1.8", "variants=null"]
    alone += ["evaluate.starts=[zero]", "deploy.start=zero", "variants={}"]
    load_recipe("sudoku-reference", alone)
    with pytest.raises(UserError, match="evaluate.arms.x.decode"):
        load_recipe(
            "sudoku-reference",
            [*alone, "evaluate.arms.x={model: baseline, decode: {residual: true, start: reference}}"],
        )


# -- the ablations


def test_every_ablation_that_is_asked_for_is_there() -> None:
    wanted = {"alpha", "quantiles", "starts", "delta", "top-k", "source", "untrained", "training-free", "longer"}
    assert {f"ablation-{name}" for name in wanted | {"reference-small", "reference-large"}} == set(ABLATIONS)
    rules = {variant.alpha for variant in load_recipe("ablation-alpha").variants.values()} | {"calibrated_entropy"}
    assert rules >= {"uniform", "learned", "normalized_entropy", "confidence", "fixed", "one", "top1"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_plans(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert full(["--recipe", name, "--storage", str(tmp_path), "--stages", BUT_DEPLOY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "evaluate" in said and not list(tmp_path.iterdir())
    recipe = load_recipe(name)
    found = [arm.info.name for arm in arms(recipe)]
    assert len(found) == len(set(found)) > 2 and "deploy" in stages_of(recipe)


TINY = {
    "data.num_train": 64,
    "data.num_test": 8,
    "base.train.steps": 4,
    "reference.train.steps": 4,
    "target.train.steps": 4,
    "resources.num_workers": 1,
    "evaluate.thresholds": [0.1, 0.9],
}


@pytest.mark.drill
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["ablation-training-free", "ablation-untrained", "ablation-alpha"])
def test_an_ablation_runs(name: str, ray_cluster: str, tmp_path: Path) -> None:
    """With a few steps of training it says nothing, but every arm decodes every problem in its own way."""
    few = {"variants": {n: {"alpha": n} for n in ("uniform", "learned")}, "baselines": {"longer": {"steps": 5}}}
    settings = TINY | (few if name == "ablation-alpha" else {})
    changes = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    assert full(["--recipe", name, "--storage", str(tmp_path), "--stages", BUT_DEPLOY, *changes]) == 0
    results = json.loads((tmp_path / name / "evaluate" / "results.json").read_text())
    found = {arm["name"]: arm for arm in results["arms"]}
    recipe = load_recipe(str(tmp_path / name / "recipe.yaml"))
    assert set(found) >= {"seqd", "target/zero", *recipe.evaluate.arms, *(f"seqd-{n}" for n in recipe.baselines)}
    for variant, residual in recipe.variants.items():
        assert found[f"target-{variant}/zero"]["decode"]["alpha"] == residual.alpha
        assert (tmp_path / name / f"target-{variant}" / "model" / FILES["learned_alpha"]).exists() == (
            variant == "learned"
        )
    assert all(point["num_problems"] == 8 for arm in results["arms"] for point in arm["curve"])
    for arm, asked in recipe.evaluate.arms.items():
        assert found[arm]["decode"]["residual"] == asked.decode.residual
        every_pass = asked.decode.residual_source == "reference"
        for point in found[arm]["curve"]:
            assert point["mean_reference"] == (point["mean_denoise"] if every_pass else 0)
