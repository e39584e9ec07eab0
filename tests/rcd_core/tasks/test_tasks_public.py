"""Tasks of public datasets: columns, prompts and grading."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcd_core.errors import UserError
from rcd_core.tasks import get_task, grade
from rcd_core.tasks.rows import check_columns, read_rows


def columns(name: str) -> dict[str, str]:
    return {field: field for field in get_task(name).fields}


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("aime24", {"prompt": "How many?", "answer": 73}, "73"),
        ("aime25", {"id": 1, "problem": "How many?", "answer": "073"}, "073"),
        ("math500", {"prompt": "How many?", "answer": "\\frac12"}, "\\frac12"),
        ("math500", {"problem": "How many?", "solution": "s", "answer": " x "}, "x"),
        ("minerva_math", {"problem": "How many?", "solution": "\\boxed{1}, or \\boxed{2}", "idx": 0}, "2"),
        ("gsm1k", {"question": "How many?", "answer": "1,024"}, "#### 1024"),
        ("gsm1k", {"question": "How many?", "answer": "so\n#### 7"}, "#### 7"),
        ("gsm_plus", {"question": "How many?", "solution": "s", "answer": "2/5", "seed_answer": "1"}, "#### 2/5"),
        ("gsm_plus", {"question": "How many?", "solution": "It is not said.", "answer": "None"}, "#### None"),
        ("qa", {"question": "How many?", "answer": "so \\boxed{2}"}, "2"),
        ("qa", {"question": "Who?", "answer": "Ada Lovelace"}, "Ada Lovelace"),
    ],
)
def test_columns_are_found_under_the_names_the_files_give_them(
    name: str, row: dict[str, object], answer: str, tmp_path: Path
) -> None:
    lines, table = str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet")
    Path(lines).write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), table)
    for path in (lines, table):
        check_columns(path, columns(name), "data.test")
        (read,) = read_rows(path, columns(name))
        assert read.values is not None, read.bad
        problem = get_task(name).problem(read.values)
        assert problem.answer == answer
        assert problem.prompt.startswith(("How many?", "Who?"))
        assert grade(name, problem.response, problem.answer), "the training target is right"


def test_question_wins_and_a_mapped_column_has_no_other_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "question": "q", "answer": "1"}\n')
    (row,) = read_rows(str(path), columns("qa"))
    assert row.values == {"question": "q", "answer": "1"}
    with pytest.raises(UserError, match="'problem'.*data.fields.question"):
        check_columns(str(path), {"question": "problem"}, "data.test")


def test_the_input_of_an_instruction_is_part_of_the_question(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add them.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "input": None, "output": "ho"},
        {"instruction": "Say it.", "output": "it"},
    ]
    lines, table = str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet")
    Path(lines).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), table)
    for path in (lines, table):
        read = [row.values or {} for row in read_rows(path, {"question": "instruction", "answer": "output"})]
        assert [row["question"] for row in read] == ["Add them.\n\n1 and 2", "Say hi.", "Say ho.", "Say it."]
        (first, *_) = read_rows(path, {"question": "input", "answer": "output", "more": "instruction"})
        assert first.values == {"question": "1 and 2", "answer": "3", "more": "Add them."}


def test_numbers_are_read_as_text_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"question": ["a", "b", "c"], "answer": [2.5, float("nan"), None]}), path)
    one, *others = read_rows(path, columns("qa"))
    assert one.values == {"question": "a", "answer": "2.5"}
    assert [row.bad.reason for row in others if row.bad] == ["missing 'answer'"] * 2
    (tmp_path / "one.jsonl").write_text('{"question": "a", "answer": true}')
    (truth,) = read_rows(str(tmp_path / "one.jsonl"), columns("qa"))
    assert truth.bad is not None and truth.bad.reason == "'answer' is no text"


@pytest.mark.parametrize(
    "name", ["math500", "aime24", "aime25", "gsm1k", "gsm_plus", "humaneval", "minerva_math", "qa"]
)
def test_a_task_without_a_generator_names_its_dataset(name: str) -> None:
    with pytest.raises(UserError, match=rf"data.test is 'synthetic' but task '{name}'.*hf://"):
        get_task(name).synthetic(0, "test", 0)


def test_minerva_refuses_a_solution_without_an_answer() -> None:
    task = get_task("minerva_math")
    assert task.problem({"question": "q", "solution": "1.6"}).answer == "1.6"
    with pytest.raises(UserError, match="solution"):
        task.problem({"question": "q", "solution": "First this.\nThen that."})


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("It is not said.\n#### None", True),
        (r"\boxed{none}", True),
        ("none", True),
        ("#### 5", False),
        ("None of them, so\n#### 5", False),
    ],
)
def test_unanswerable_questions(completion: str, right: bool) -> None:
    assert grade("gsm_plus", completion, "#### None") is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("Paris", "paris.", True),
        ("The capital is\n#### Paris", "Paris", True),
        ("#### Lyon\n#### Paris\nDone", "Paris", True),
        (r"\text{no box here}", "Paris", False),
        ("The capital is Paris", "Paris", False),
        ("New  York", "new york", True),
        ("", "Paris", False),
        (r"so \boxed{0.5}", r"\frac{1}{2}", True),
        ("#### 1/2", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{0.6}", r"\frac{1}{2}", False),
        ("½", r"\frac{1}{2}", True),
        (" . ", ".", False),
        ("2024-01-05", "2023-01-04", False),  # equal as differences
        ("2024-01-05", "2024-01-05", True),
        ("2018", "2024-01-05", False),
        ("01/05/2024", "5/1/2024", False),
        ("555-0100", "454-0-1", False),
        ("+1 555 0100", "+1 555 0101", False),
        ("+1 555 0100", "+1  555 0100.", True),
        ("+1-0100-555", "+1-555-0100", False),  # equal as differences
        ("+49 123 30", "+49 30 123", False),  # equal as products
        ("455", "555-0100", False),
        ("-2", "3-5", False),
        ("10:30 PM", "10:30 pm", True),
        ("10:30 am", "10:30 pm", False),
        ("covid-19", "COVID-19", True),
        ("COVID-18", "covid-19", False),
        ("b-52", "B-52", True),
        ("h2o", "H2O", True),
        ("5 May 2024", "5 may 2024", True),
        ("6 May 2024", "5 May 2024", False),
        ("**Paris**", "Paris", True),
        ("**64**", "64", True),
        ("25 dollars", "25", True),
        ("1,024", "1024", True),
        ("7, 250", "7250", False),
        ("2, 1", "1, 2", True),
        ("x=4", "x = 5", False),
        ("b+a", "a+b", True),
    ],
)
def test_qa_compares_mathematics_by_value_and_other_answers_as_text(completion: str, answer: str, right: bool) -> None:
    assert grade("qa", completion, answer) is right


def test_grading_sudoku_needs_the_canvas() -> None:
    with pytest.raises(UserError, match="sudoku"):
        grade("sudoku", "#" + "1" * 36, "#" + "1" * 36)
