"""Recipes: what is accepted, and that every mistake is answered by its key, its value and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.data.sources import columns_of
from pipelines.recipe.files import parse_yaml, recipe_names
from pipelines.recipe.inputs import check_inputs
from pipelines.recipe.load import dump_recipe, load_recipe, parse_recipe
from pipelines.run.stages import stages_of
from rcd_core.errors import UserError
from rcd_core.io.hub import is_hub_id
from tests.docs.recipes import PAGE, recipe_page, write_or_check


def complaint(*overrides: str, recipe: str = "sudoku-reference") -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_their_dump_loads_to_the_same(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(parse_yaml(dump_recipe(recipe), name)) == recipe


def test_the_generated_reference_is_current_and_describes_every_key() -> None:
    page = recipe_page()
    assert write_or_check(PAGE, page, ["--check"]) == 0, "stale: run `make docs`"
    assert not [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]


def test_overrides_are_yaml_values_and_make_missing_sections() -> None:
    recipe = load_recipe(
        "arithmetic",
        ["target.train.learning_rate=1e-3", "noise.draws=2", "baseline=false", "evaluate.thresholds=[0.5, 1]"],
    )
    assert recipe.target.train.learning_rate == 0.001  # YAML 1.1 would read a string
    assert recipe.noise.draws == 2 and recipe.baseline is False
    assert recipe.evaluate.thresholds == (0.5, 1.0)


def test_variants_change_only_what_they_name() -> None:
    recipe = load_recipe("sudoku-reference", ["target.residual.dropout=0.5", "variants.wild={alpha: one}"])
    assert recipe.variants["wild"].alpha == "one" and recipe.variants["wild"].dropout == 0.5
    assert recipe.training("target-wild").residual == recipe.variants["wild"]
    assert recipe.training("baseline").residual is None and recipe.training("target").start is None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("target.train.lerning_rate=1", "target.train.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("evaluat.batch_size=1", "evaluat: unknown key; did you mean 'evaluate'?"),
        ("reference.start.hiden_size=4", "reference.start.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("variants.x={alfa: one}", "variants.x.alfa: unknown key; did you mean 'alpha'?"),
        ("data.max_length=long", "data.max_length is 'long'; it should be a valid integer"),
        ("seed=true", "seed is True"),
        ("target.train.steps=0", "target.train.steps is 0"),
        ("variants.x={dropout: 3}", "variants.x.dropout is 3.0"),
        ("variants.x={alpha: ramp}", "variants.x.alpha is 'ramp'"),
        ("evaluate.decode.policy=entropy_bounded", "evaluate.decode.policy is 'entropy_bounded' but entropy_bound"),
        ("evaluate.starts=[zer]", "evaluate.starts.0 is 'zer'; it should be 'reference', 'zero'"),
        ("resources=null", "resources is null; it should be a mapping of keys"),
        ("target.start=5", "target.start is 5; it should be a mapping of keys, or a path, URI or hub id"),
        ("name=../up", "name is '../up'"),
        ("deploy.min_replicas=2", "deploy.max_replicas is 1 but deploy.min_replicas is 2"),
        ("data.task=soduko", "data.task is 'soduko'"),
        ("data.task=humaneval", "evaluate.run_code"),
        ("data.test_task=soduko", "data.test_task is 'soduko'"),
        ("data.test_task=humaneval", "evaluate.run_code"),
        ("data.train=null", "data.train is null but base.train is not"),
        ("target.train=null", "target.train is null but target.start"),
        ("target.train=null", "variants.paper_alpha"),
        ("baseline=5", "baseline is 5"),
        ("data.train=rows.jsonl", "data.train is 'rows.jsonl', a relative path"),
        ("data.train=/abs/rows.xlsx", ".csv"),
        ("data.test=hf://gsm8k", "data.test is 'hf://gsm8k'"),
        ("data.num_train=null", "data.num_train is null"),
        ("data.pad_multiple=40", "data.pad_multiple is 40"),
        ("base.start.max_positions=16", "data.max_length is 37, above base.start.max_positions 16"),
        ("storage=runs", "storage is 'runs', a relative path"),
        ("reference.start=./model", "reference.start is './model', a relative path"),
        ("reference.start=owner/name", "tokenizer.path is null but reference.start"),
        ("base=null", "target.start and base are both null"),
        ("reference.train=null", "reference.train is null but reference.start"),
        ("target.residual={source: online, alpha: calibrated_entropy}", "target.residual.alpha_scale is null"),
        ("target.residual.alpha_scale=null", "target.residual.alpha_scale is null"),
        ("reference=null", "variants.paper_alpha.source"),
        ("base.train.distill=true", "base.train.distill is true"),
        ("noise.layout=d2f", "noise.block_length is null"),
        ("noise={layout: d2f, block_length: 2}", "noise.block_length 2"),
        ("target.train.epochs=2", "target.train.epochs is 2.0 and train.steps 700"),
        ("target.train={batch_size: 8}", "target.train.steps is 0"),
        ("target.train.validate_every=5", "target.train.validate_every is 5 but data.num_validation is 0"),
        ("target.train.deepspeed={wall_clock_breakdown: true}", "target.train.deepspeed"),
        ("reference.train.strategy=deepspeed", "reference.train.strategy is deepspeed"),
        ("target.train.shard_size=2", "train.shard_size is 2"),
        ("target.train={batch_size: 8, steps: 2, strategy: fsdp2, shard_size: 3}", "target.train.shard_size is 3"),
        ("resources.num_workers=[2, 3]", "target.train.batch_size is 64"),
        ("resources.num_workers=[4, 2]", "resources.num_workers is [4, 2]"),
        ("resources={tensor_parallel: 2, gpus_per_worker: 0.5}", "resources.tensor_parallel is 2"),
        ("resources={num_workers: [1, 2], max_failures: 0}", "resources.max_failures is 0"),
        ("evaluate.arms.x={model: targt}", "evaluate.arms.x.model is 'targt'"),
        ("evaluate.arms.seqd={model: base}", "evaluate.arms.seqd"),
        ("evaluate.arms.x={model: base, decode: {alfa: one}}", "evaluate.arms.x.decode.alfa: unknown key"),
        ("evaluate.arms.x={model: base, decode: {block_length: 8}}", "evaluate.arms.x.decode.block_length is 8"),
        ("evaluate.arms.x={model: base, decode: 3}", "evaluate.arms.x.decode is 3"),
        ("evaluate.arms=3", "evaluate.arms is 3"),
        (
            "evaluate.arms.x={model: baseline, decode: {residual: true, alpha: calibrated_entropy}}",
            "evaluate.arms.x.decode.alpha_scale is null",
        ),
        (
            "evaluate.arms.x={model: target, decode: {residual: true, alpha: learned}}",
            "evaluate.arms.x.decode.alpha is 'learned'",
        ),
        ("baselines.x={attention: flex}", "baselines.x.attention is 'flex', which needs a GPU"),
        ("target.train.cpu_offload=true", "train.cpu_offload is true but train.strategy is ddp; use fsdp2"),
        ("target.train={batch_size: 8, steps: 2, strategy: deepspeed, cpu_offload: true}", "offload_optimizer"),
        ("target.train.betas=[0.9, 1.5]", "target.train.betas is (0.9, 1.5)"),
        ("target.train.weight_decay=-1", "target.train.weight_decay is -1.0"),
        ("variants.x={source: signals, top_k: 500}", "variants.x.top_k is 500, more than signals.top_k of 32"),
        ("evaluate.decode.start=zero", "evaluate.decode.start is 'zero', but the methods decide that"),
        ("evaluate.decode.residual=true", "evaluate.decode.residual is True, but the methods decide that"),
        ("evaluate.decode.confidence_threshold=0.3", "evaluate.decode.confidence_threshold is 0.3, but evaluate.thr"),
        ("baselines.x={stepz: 3}", "baselines.x.stepz: unknown key; did you mean 'steps'?"),
        ("baselines.x={batch_size: 63}", "baselines.x.batch_size is 63"),
        ("name.x=1", "--set 'name.x=1': name is 'sudoku-reference'"),
        ("seed", "--set 'seed'"),
        ("seed={", "--set 'seed={'"),
    ],
)
def test_mistakes_are_named(override: str, named: str) -> None:
    more = ["resources.num_workers=[1, 2]"] if "=deepspeed" in override else []
    more += ["resources.num_workers=4"] if "fsdp2" in override else []
    message = complaint(override, *more)
    assert named in message
    assert "\n" not in message or "has problems" in message


def test_epochs_become_steps_once_the_examples_are_counted() -> None:
    settings = load_recipe("sudoku-reference", ["target.train={epochs: 1.5, batch_size: 8}"]).target.train
    assert settings.resolved(100).steps == 19 and settings.resolved(1).steps == 1
    assert settings.resolved(100).epochs is None and settings.resolved(100).resolved(7).steps == 19


def test_all_mistakes_come_in_one_message() -> None:
    message = complaint("noise.draw=1", "data.max_length=x", "evaluate.starts=[zer]")
    assert [line.split(":")[0].split(" is ")[0].strip() for line in message.splitlines()[1:]] == [
        "noise.draw",
        "data.max_length",
        "evaluate.starts.0",
    ]


def test_recipes_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert "did you mean 'demo'?" in complaint(recipe="demoo")
    assert str(tmp_path / "none.yaml") in complaint(recipe=str(tmp_path / "none.yaml"))
    path = tmp_path / "other.yaml"
    path.write_text(dump_recipe(load_recipe("sudoku-reference", ["name=other"])))
    assert load_recipe(str(path)).name == "other"
    path.write_text("name: a\nseed: 1\nseed: 2\n")
    assert "'seed'" in complaint(recipe=str(path))
    path.write_text("- a list")
    assert str(path) in complaint(recipe=str(path))


# A run that trains nothing: checkpoints from outside, and problems to test them on.
AS_THEY_ARE = ["target={start: /t, train: null}", "baseline=/b", "variants={}", "base=null", "reference={start: /r}"]
AS_THEY_ARE += ["calibrate=null"]
NO_TRAINING = [*AS_THEY_ARE, "data.train=null", "tokenizer.path=/t"]


def test_checkpoints_are_taken_as_they_are() -> None:
    recipe = load_recipe("sudoku-reference", NO_TRAINING)
    stages = stages_of(recipe)
    assert list(stages) == ["prepare", "reference", "target", "baseline", "evaluate", "deploy"]
    for name, path in (("reference", "/r"), ("target", "/t"), ("baseline", "/b")):
        assert (
            stages[name].function == "pipelines.run.directory:use_checkpoint" and path in stages[name].outside.values()
        )
        assert recipe.checkpoint(name) == path and recipe.residual(name) is None
        with pytest.raises(UserError, match=name):
            recipe.training(name)
    assert stages["target"].inputs == () and stages["evaluate"].inputs == ("prepare", "target", "baseline", "reference")
    demo = load_recipe("sudoku-reference")
    assert {demo.checkpoint(name) for name in ("reference", "target", "baseline")} == {None}
    assert "baseline is true" in complaint(*NO_TRAINING, "baseline=true")
    assert "tokenizer.path" in complaint(*AS_THEY_ARE, "data.train=null")


def test_another_task_is_tested_than_trained() -> None:
    recipe = load_recipe("sdar-8b-b64")
    assert [recipe.data.task_of(split) for split in ("train", "test")] == ["math", "math500"]
    assert columns_of(recipe, "train") == {"question": "problem", "solution": "solution", "answer": "answer"}
    assert columns_of(recipe, "test") == {"question": "question", "answer": "answer"}  # a problem is a question, too
    assert columns_of(load_recipe("llada-8b"), "test") == {"question": "question", "solution": "answer"}
    assert columns_of(load_recipe("sudoku-reference", ["data.test_task=sudoku"]), "test") == columns_of(
        load_recipe("sudoku-reference"), "test"
    )


@pytest.mark.parametrize("rule", ["confidence", "inverse_confidence", "learned"])
def test_stored_signals_lack_what_a_rule_needs_at_another_temperature(rule: str) -> None:
    wanted = [f"target.residual.alpha={rule}", "target.residual.source=signals", "target.residual.alpha_scale=null"]
    apart = [*wanted, "signals.alpha_temperature=2", "variants={}"]
    with pytest.raises(UserError, match=r"target\.residual\.alpha.*signals\.alpha_temperature 2.*delta_temperature 1"):
        load_recipe("sudoku-reference", apart)
    load_recipe("sudoku-reference", [*apart, "signals.delta_temperature=2"])
    load_recipe("sudoku-reference", [*apart, "signals.keep_mass=null", "signals.top_k=512"])  # every id
    load_recipe("sudoku-reference", [*apart, "target.residual.source=online"])


def test_a_teacher_needs_the_masks_that_it_saw() -> None:
    changes = ["target.train.distill=true", "variants={}", "target.residual={source: on_policy}"]
    with pytest.raises(UserError, match="target.train.distill is true but target.residual.source is 'on_policy'"):
        load_recipe("sudoku-reference", changes)


def test_hub_ids() -> None:
    assert is_hub_id("JetLM/SDAR-8B-Chat") and is_hub_id("JetLM/SDAR-8B-Chat@refs/pr/1")
    assert not any(map(is_hub_id, ("/abs/olute", "a/b/c", "s3://a/b", "hf://a/b")))


def checkpoint(directory: Path, vocab_size: int, words: dict[str, int] | None = None) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "sdar", "vocab_size": vocab_size}))
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words or {}}}))
    (directory / "model.safetensors").write_bytes(b"\0")
    return directory


def inputs_complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_inputs(load_recipe("sudoku-reference", ["calibrate=null", *overrides]))
    return str(caught.value)


def test_what_a_recipe_names_must_be_there(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert f"data.train: {tmp_path}/none.jsonl" in inputs_complaint(f"data.train={tmp_path}/none.jsonl")
    assert f"data.test: {empty}" in inputs_complaint(f"data.test=[{empty}]")
    good = checkpoint(tmp_path / "good", 100)
    tokenizer = f"tokenizer.path={good}"
    missing = inputs_complaint(tokenizer, f"reference.start={tmp_path}/none")
    assert f"reference.start: {tmp_path}/none" in missing
    (good / "model.safetensors").rename(good / "pytorch_model.bin")
    assert "*.safetensors" in inputs_complaint(tokenizer, f"reference.start={good}")
    (good / "config.json").unlink()
    assert "config.json" in inputs_complaint(tokenizer, f"reference.start={good}")
    (good / "tokenizer_config.json").unlink()
    assert "tokenizer.path" in inputs_complaint(tokenizer)


def test_reference_and_target_must_share_a_vocabulary(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "target", 100, {"a": 0, "b": 1})
    other = checkpoint(tmp_path / "other", 90)
    swapped = checkpoint(tmp_path / "swapped", 100, {"a": 1, "b": 0})
    sets = ["base=null", f"target.start={target}", f"tokenizer.path={target}"]
    message = inputs_complaint(*sets, f"reference.start={other}")
    assert "90" in message and "100" in message and "reference.start" in message
    assert f"reference.start {swapped}" in inputs_complaint(*sets, f"reference.start={swapped}")
    as_they_are = [
        f"target={{start: {target}, train: null}}",
        "calibrate=null",
        "variants={}",
        f"reference.start={target}",
    ]
    assert f"baseline {other}" in inputs_complaint(*sets, *as_they_are, f"baseline={other}")
    check_inputs(load_recipe("sudoku-reference", [*sets, f"reference.start={target}"]))
