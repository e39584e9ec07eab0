"""evaluate.tasks: what an entry inherits, and what it changes in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.sources import check_tasks
from pipelines.recipe.inputs import check_inputs
from pipelines.recipe.load import dump_recipe, load_recipe, parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.commits import pinned
from pipelines.run.directory import key_material
from pipelines.run.stages import stages_of
from rcd_core.errors import UserError


def with_tasks(tasks: dict[str, Any], *overrides: str, recipe: str = "sudoku-reference") -> Recipe:
    return load_recipe(recipe, [f"evaluate.tasks={json.dumps(tasks)}", *overrides])


def materials(recipe: Recipe) -> dict[str, Any]:
    return {name: key_material(stage, recipe, {}) for name, stage in stages_of(recipe).items()}


def test_an_entry_inherits_what_it_does_not_give() -> None:
    tasks = {"chain": {"num_test": 5, "decode": {"max_new_tokens": 40}}, "sums": {"task": "arithmetic", "num_test": 9}}
    arms = json.dumps({"off": {"model": "target", "decode": {"residual": False, "temperature": 0.5}}})
    recipe = with_tasks(tasks, "evaluate.decode={top_p: 0.9}", "evaluate.thresholds=[0.5]", f"evaluate.arms={arms}")
    chain, sums = recipe.for_task("chain"), recipe.for_task("sums")
    assert (chain.data.task_of("test"), sums.data.task_of("test")) == ("chain", "arithmetic")
    assert (chain.data.num_test, sums.data.num_test, chain.data.max_length) == (5, 9, recipe.data.max_length)
    assert chain.evaluate.decode.top_p == sums.evaluate.decode.top_p == 0.9
    assert chain.evaluate.decode.max_new_tokens == 40 and sums.evaluate.decode == recipe.evaluate.decode
    assert chain.evaluate.thresholds == (0.5,)
    arm = chain.evaluate.arms["off"].decode
    assert (arm.max_new_tokens, arm.residual, arm.temperature, arm.top_p) == (40, False, 0.5, 0.9)
    assert parse_recipe(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    assert "sums" in dump_recipe(recipe)


def test_a_settings_file_fills_each_task_in() -> None:
    tasks = {"aime24": {"test": "/a.jsonl"}, "math500": {"test": "/m.jsonl", "decode": {"max_new_tokens": 7}}}
    recipe = with_tasks(tasks, "evaluate.settings=paper-sdar-b64", recipe="sdar-8b-b64")
    aime, math = recipe.for_task("aime24").evaluate, recipe.for_task("math500").evaluate
    assert (aime.samples, aime.decode.temperature) == (16, 0.6) and math.samples == recipe.evaluate.samples == 1
    assert (math.decode.max_new_tokens, math.decode.temperature) == (7, 0.0)


def test_a_new_task_leaves_all_keys_but_that_of_evaluate() -> None:
    before, after = (materials(with_tasks(t)) for t in ({}, {"chain": {"num_test": 5}}))
    assert set(after) - set(before) == {"prepare-chain"}
    changed = {name for name in before if before[name]["recipe"] != after[name]["recipe"]}
    assert changed == {"evaluate"}
    assert not any("tasks" in key for key in before["evaluate"]["recipe"])
    assert after["prepare-chain"]["recipe"]["evaluate.tasks.chain.num_test"] == 5
    assert "prepare-chain" in stages_of(with_tasks({"chain": {"num_test": 5}}))["evaluate"].inputs


def test_decoding_settings_of_a_task_do_not_repeat_its_preparation() -> None:
    one, other = (materials(with_tasks({"chain": {"num_test": 5, "samples": n, "decode": {"temperature": 1}}}))
                  for n in (1, 2))  # fmt: skip
    assert one["prepare-chain"] == other["prepare-chain"] and one["evaluate"] != other["evaluate"]


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ({"soduko": {"num_test": 5}}, "evaluate.tasks.soduko.task is 'soduko'"),
        ({"chain": {}}, "evaluate.tasks.chain.num_test is null"),
        ({"chain": {"test": "rel.jsonl"}}, "evaluate.tasks.chain.test is 'rel.jsonl'"),
        ({"chain": {"num_test": 5, "samples": 3}}, "evaluate.tasks.chain.samples is 3"),
        ({"he": {"task": "humaneval", "test": "/h.jsonl"}}, "evaluate.run_code"),
        ({"chain": {"num_tests": 5}}, "num_tests"),
        ({"a-b": {"task": "chain", "num_test": 5}}, "a-b"),
    ],
)
def test_a_mistake_names_its_key(tasks: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        with_tasks(tasks)
    assert named in str(error.value) and str(error.value).count("\n") <= 1


def test_files_are_checked_before_anything_starts(tmp_path: Path) -> None:
    absent = with_tasks({"math500": {"test": str(tmp_path / "absent.jsonl")}})
    with pytest.raises(UserError, match="evaluate.tasks.math500.test: .*absent.jsonl does not exist"):
        check_inputs(absent)
    file = tmp_path / "m.jsonl"
    file.write_text('{"question": "1 + 1?", "gold": "2"}\n')
    with pytest.raises(UserError, match=r"evaluate\.tasks\.math500\.(test|fields)"):
        check_tasks(with_tasks({"math500": {"test": str(file)}}))
    fields = {"test": str(file), "fields": {"answer": "gold"}}
    assert check_tasks(with_tasks({"math500": fields})) != []
    with pytest.raises(UserError, match=r"evaluate\.tasks\.math500\.fields\.nothing"):
        check_tasks(with_tasks({"math500": {**fields, "fields": {"nothing": "gold"}}}))
    with pytest.raises(UserError, match=r"evaluate\.tasks\.math500\.test is 'synthetic'"):
        check_tasks(with_tasks({"math500": {"num_test": 3}}))


def test_data_on_the_hub_is_read_at_its_commit() -> None:
    recipe = with_tasks({"math500": {"test": "hf://owner/data:test"}})
    task = pinned(recipe, {"hf://owner/data:test": "abc"}).evaluate.tasks["math500"]
    assert task.test == "hf://owner/data:test?revision=abc"
