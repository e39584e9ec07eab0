"""evaluate.grader: which verdict counts, how often the other grader differs, and which keys depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.evaluation.actor import DECODED
from pipelines.evaluation.answers import read_answers
from pipelines.evaluation.endpoint import EndpointAnswers, EndpointMethod, EndpointOptions
from pipelines.evaluation.results import MethodInfo, judge
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.report.endpoint import _graded_rows
from pipelines.run.keys import recipe_values
from rcd_core.errors import UserError
from tests.pipelines.calibration_run import SIZES, TRAIN


def make_recipe(directory: Path, task: str, **evaluate: Any) -> Recipe:
    return parse_recipe({
        "name": "run",
        "storage": str(directory),
        "block_length": 8,
        "data": {"task": task, "train": "/train.jsonl", "test": "/test.jsonl"},
        "reference": {"start": SIZES, "train": TRAIN},
        "base": {"start": SIZES, "train": TRAIN},
        "target": {"train": TRAIN},
        "evaluate": evaluate,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("task", "grader", "completion", "expected"),
    [
        ("gsm8k", "default", "#### 24 - 3 = 21", (True, True)),
        ("gsm8k", "official", "#### 24 - 3 = 21", (False, True)),
        ("gsm8k", "official", "#### 21", (True, False)),
        ("math500", "default", r"\boxed{21.0}", (True, True)),
        ("math500", "official", r"\boxed{21.0}", (False, True)),
        ("qa", "official", "21", (True, None)),
    ],
)
def test_the_chosen_grader_judges(task: str, grader: str, completion: str, expected: tuple[bool, bool | None]) -> None:
    assert tuple(judge(task, grader, completion, "21", "").values()) == expected


def test_the_key_of_a_stage_has_it_only_where_it_changes_results(tmp_path: Path) -> None:
    def value(task: str, grader: str) -> Any:
        recipe = make_recipe(tmp_path, task, grader=grader)
        return recipe_values(recipe, ("evaluate",)).get("evaluate.grader", "absent")

    assert value("gsm8k", "official") == "official"
    assert value("gsm8k", "default") == value("qa", "official") == "absent"
    with pytest.raises(UserError, match=r"evaluate\.grader"):
        make_recipe(tmp_path, "gsm8k", grader="theirs")


@pytest.mark.parametrize(("grader", "correct"), [("default", True), ("official", False)])
def test_the_answers_of_an_endpoint(tmp_path: Path, grader: str, correct: bool) -> None:
    from pipelines.data.problems import TestProblem

    info = MethodInfo(name="a", title="a", model="m", baseline=None, start=None, block_length=8, trained_with=None)
    answer = {"arm": "a", "threshold": 0.9, "example_id": "x", "sample": 0, "completion": "#### 24 - 3 = 21"}
    collected = EndpointAnswers(
        recipe=make_recipe(tmp_path, "gsm8k", grader=grader),
        options=EndpointOptions(url="http://x", model="m"),
        methods=[EndpointMethod(info=info, settings={})],
        problems=[TestProblem(example_id="x", prompt="?", answer="#### 21")],
        answers=[{**answer, "forwards": None}],
        is_rcd=False,
    )
    (row,) = _graded_rows(collected)
    assert (row["correct"], row["graders_differ"]) == (correct, True)


def test_answers_of_an_older_release_are_read(tmp_path: Path) -> None:
    old = DECODED.remove(DECODED.get_field_index("graders_differ"))
    row = {name: None for name in old.names} | {"arm": "a", "item": 3, "completion": "21"}
    pq.write_table(pa.Table.from_pylist([row], schema=old), tmp_path / "0000.parquet")
    (read,) = read_answers(str(tmp_path), DECODED, ["arm"]).to_pylist()
    assert read == {**row, "graders_differ": None}
