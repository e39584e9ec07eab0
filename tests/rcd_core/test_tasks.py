"""Tasks: generators are pure and sound, graders accept what is right and nothing else, rows become token ids."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcd_core.errors import UserError
from rcd_core.tasks import MASK_TEXT, TASKS, Problem, arithmetic, get_task, gsm8k, sudoku
from rcd_core.tasks.answers import final_number, same_final_number
from rcd_core.tasks.encoding import TOO_SHORT, UNLABELLED, Encoder, content_id
from rcd_core.tasks.rows import BadRow, check_columns, read_rows
from rcd_core.tokenizer import mask_token_id, train_tokenizer

GENERATORS = ("sudoku", "arithmetic")


def test_unknown_task_lists_the_names() -> None:
    with pytest.raises(UserError, match="sudoko.*sudoku, arithmetic, gsm8k"):
        get_task("sudoko")


@pytest.mark.parametrize("name", TASKS)
def test_docstring_example_is_a_row_that_solves_itself(name: str) -> None:
    module = {"sudoku": sudoku, "arithmetic": arithmetic, "gsm8k": gsm8k}[name]
    row = json.loads(re.search(r'\{"question.*?\}', str(module.__doc__), re.DOTALL)[0], strict=False)  # type: ignore[index]
    problem = TASKS[name].problem(row)
    assert TASKS[name].grade(problem.prompt, problem.response, problem.answer)


@pytest.mark.parametrize("name", GENERATORS)
def test_synthetic_rows_are_a_function_of_index_split_and_seed(name: str) -> None:
    task = get_task(name)
    rows = [task.synthetic(i, "train", 0) for i in range(50)]
    assert rows == [task.synthetic(i, "train", 0) for i in range(50)]
    assert len({row["question"] for row in rows}) == 50
    assert all(row != task.synthetic(i, "train", 1) for i, row in enumerate(rows))
    with pytest.raises(UserError, match="validation"):
        task.synthetic(0, "validation", 0)


@pytest.mark.parametrize("name", GENERATORS)
def test_train_and_test_never_share_a_solution(name: str) -> None:
    task = get_task(name)
    train, test = ({task.synthetic(i, split, 3)["answer"] for i in range(3000)} for split in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("name", GENERATORS)
def test_synthetic_problems_are_solved_by_their_own_response(name: str) -> None:
    task = get_task(name)
    for i in range(200):
        problem = task.problem(task.synthetic(i, "test", 0))
        assert task.grade(problem.prompt, problem.response, problem.answer)


# -- sudoku


def test_boards_are_valid_varied_and_have_8_to_16_givens() -> None:
    rows = [get_task("sudoku").synthetic(i, "train", 0) for i in range(1000)]
    assert all(sudoku.is_valid(row["answer"]) for row in rows)
    assert {36 - row["question"].count(".") for row in rows} == set(range(8, 17))
    assert len({row["answer"] for row in rows}) > 990
    for cell in (0, 17, 35):  # no digit is preferred: 1000 / 6 = 167 of each, SD 12
        counts = [sum(row["answer"][cell] == digit for row in rows) for digit in sudoku.DIGITS]
        assert min(counts) > 115 and max(counts) < 220


def test_boards_are_generated_fast() -> None:
    task = get_task("sudoku")
    started = time.process_time()
    for i in range(1000):
        task.synthetic(i, "train", 5)
    assert time.process_time() - started < 1.0  # 0.11 ms a board on the machine of 2026-11; a training set has 1e5


def test_sudoku_accepts_any_valid_board_with_the_givens() -> None:
    task = get_task("sudoku")
    board = "123456456123231564564231312645645312"
    other = board.translate(str.maketrans("12", "21"))  # valid as well
    canvas = "#" + MASK_TEXT * 35 + board[35]
    assert task.grade(canvas, "#" + other, "") == (other[35] == board[35])
    assert task.grade("#" + MASK_TEXT * 36, "#" + other, "#" + board)
    assert not task.grade("#" + board[0] + MASK_TEXT * 35, "#" + other, "#" + board)  # a given was changed
    assert not task.grade("#" + MASK_TEXT * 36, "#" + board[:-1], "#" + board)
    assert not task.grade("#" + MASK_TEXT * 36, "#" + "1" * 36, "#" + board)
    assert not task.grade("#" + MASK_TEXT * 36, "#" + board[:-1] + MASK_TEXT, "#" + board)


def test_a_box_twice_is_no_board() -> None:
    # Rows and columns are right, boxes are not: a cyclic Latin square.
    latin = "".join("123456"[(r + c) % 6] for r in range(6) for c in range(6))
    assert not sudoku.is_valid(latin)


@pytest.mark.parametrize(
    "row", [{"question": "." * 35, "answer": "1" * 36}, {"question": "2" + "." * 35, "answer": ""}]
)
def test_sudoku_rejects_rows_that_are_no_puzzle(row: dict[str, str]) -> None:
    with pytest.raises(UserError, match="6x6 board"):
        get_task("sudoku").problem(row)


# -- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("so\n#### 70,000", 70000),
        ("#### $1,200.50.", 1200.5),
        ("#### -3", -3),
        ("#### -$4", -4),
        ("#### $-4", -4),
        ("####7", 7),
        ("#### 12.", 12),
        ("#### 5 apples", 5),
        ("#### .5", 0.5),
        ("#### 1\n#### 2", 1),
        ("the answer is 18", None),
        ("#### none", None),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    found = final_number(text)
    assert found is None if number is None else float(found or 0) == number


def test_numbers_are_compared_as_numbers() -> None:
    assert same_final_number("#### 1,000.00", "#### 1000")
    assert not same_final_number("#### 1000.01", "#### 1000")
    assert not same_final_number("1000", "#### 1000")
    assert not same_final_number("#### x", "#### x")


def test_gsm8k_drops_calculator_annotations_and_keeps_the_working() -> None:
    row = {"question": " Q? ", "answer": "He has 2*3=$<<2*3=6>>6.\n#### 1,006"}
    assert get_task("gsm8k").problem(row) == Problem("Q?", "He has 2*3=$6.\n#### 1,006", "#### 1006")
    with pytest.raises(UserError, match="####"):
        get_task("gsm8k").problem({"question": "Q", "answer": "6"})
    with pytest.raises(UserError, match="data.train.*gsm8k.*no generator"):
        get_task("gsm8k").synthetic(0, "train", 0)


def test_arithmetic_working_is_right_step_by_step() -> None:
    for i in range(300):
        *steps, last = get_task("arithmetic").synthetic(i, "train", 0)["answer"].split("\n")
        results = []
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)  # digits and one operator, by the pattern below
            assert re.fullmatch(r"\d+[-+*]\d", left)
            assert not results or left.startswith(results[-1])
            results.append(right)
        assert 2 <= len(steps) <= 4 and last == f"#### {results[-1]}" and all(0 < int(r) <= 99 for r in results)


# -- files


def test_bad_lines_are_reported_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"q": "one", "a": "1"}',
        b"",
        b'{"q": "cut off',
        b'["a list"]',
        b'{"q": "no a"}',
        b'{"q": " ", "a": "1"}',
        b'{"q": "type", "a": 1}',
        b'{"q": "bytes \xff", "a": "1"}',
        b'{"q": "two", "a": "2", "more": [1]}',
    ]
    path.write_bytes(b"\n".join(lines))
    rows = list(read_rows(str(path), {"question": "q", "answer": "a"}))
    assert [(row.number, row.values) for row in rows if row.values] == [
        (1, {"question": "one", "answer": "1"}),
        (9, {"question": "two", "answer": "2"}),
    ]
    assert [(row.number, row.bad.reason) for row in rows if row.bad] == [
        (3, "not JSON"),
        (4, "not a JSON object"),
        (5, "missing 'a'"),
        (6, "empty 'q'"),
        (7, "'a' is no text"),
        (8, "not JSON"),
    ]


def test_parquet_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"q": ["one", None], "a": ["1", "2"], "big": [[1], [2]]}), path)
    good, bad = read_rows(path, {"question": "q", "answer": "a"})
    assert good.values == {"question": "one", "answer": "1"}
    assert bad.number == 2 and bad.bad is not None and bad.bad.reason == "missing 'q'"


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    columns = {"question": "question", "answer": "solution"}
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    jsonl.write_text('{"question": "q", "answer": "a"}\n')
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), parquet)
    for path in (jsonl, parquet):
        with pytest.raises(UserError, match=r"data\.train: .*'solution'.*it has answer, question|question, answer"):
            check_columns(str(path), columns, "data.train")
        check_columns(str(path), {"question": "question"}, "data.train")


@pytest.mark.parametrize(("content", "says"), [("", "no rows"), ("\n\n", "no rows"), ("a\nb\n", "JSON object")])
def test_a_file_without_usable_lines_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        check_columns(str(path), {"question": "q"}, "data.test")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"no parquet")
    for path, says in ((broken, "cannot be read"), (tmp_path / "gone.jsonl", "does not exist")):
        with pytest.raises(UserError, match=f"{path.name}.*{says}"):
            list(read_rows(str(path), {"question": "q"}))


# -- token ids


@pytest.fixture(scope="module")
def chat() -> Encoder:
    task = get_task("gsm8k")
    tokenizer = train_tokenizer(["What is 1+1?", "It is 2.\n#### 2"] * 20, 300)
    return Encoder(task, tokenizer, pad_multiple=8, max_length=64)


@pytest.fixture(scope="module")
def canvas() -> Encoder:
    return Encoder(get_task("sudoku"), train_tokenizer(["#123456"], 260), pad_multiple=37, max_length=37)


def test_chat_example_labels_the_response_its_end_and_the_padding(chat: Encoder) -> None:
    problem = Problem("What is 1+1?", "It is 2.\n#### 2", "#### 2")
    example = chat.train(problem)
    n = example.prompt_length
    tokenizer = chat.tokenizer
    assert (
        tokenizer.decode(example.input_ids[:n]) == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.labels == [UNLABELLED] * n + example.input_ids[n:]
    assert len(example.input_ids) % 8 == 0
    text, end, padding = str(tokenizer.decode(example.input_ids[n:])).partition("<|im_end|>\n")
    assert (text, end) == ("It is 2.\n#### 2", "<|im_end|>\n")
    assert padding.replace("<|endoftext|>", "") == ""
    assert chat.test(problem).prompt_ids == example.input_ids[:n]


def test_lengths_are_limits(chat: Encoder) -> None:
    long = Problem("x" * 200, "#### 2", "#### 2")
    with pytest.raises(BadRow, match="above data.max_length"):
        chat.train(long)
    with pytest.raises(BadRow, match="above data.max_length"):
        chat.test(long)
    wordy = Problem("q", "x" * 200, "#### 2")
    with pytest.raises(BadRow):
        chat.train(wordy)
    assert chat.test(wordy).prompt_ids  # a problem is not left out for the length of its answer
    picky = Encoder(chat.task, chat.tokenizer, pad_multiple=8, max_length=64, min_length=40)
    with pytest.raises(BadRow, match=TOO_SHORT):
        picky.train(Problem("q", "a", "#### 2"))


def test_text_that_spells_the_mask_token_is_a_bad_row(chat: Encoder) -> None:
    for problem in (Problem(f"fill {MASK_TEXT}", "a", "a"), Problem("q", f"a {MASK_TEXT}", "a")):
        with pytest.raises(BadRow, match="mask token"):
            chat.train(problem)


def test_canvas_labels_exactly_the_unknown_cells(canvas: Encoder) -> None:
    problem = canvas.problem(get_task("sudoku").synthetic(0, "train", 0))
    train, test = canvas.train(problem), canvas.test(problem)
    assert len(train.input_ids) == len(test.prompt_ids) == 37
    mask = mask_token_id(canvas.tokenizer)
    assert mask not in train.input_ids
    for given, token, label in zip(test.prompt_ids, train.input_ids, train.labels, strict=True):
        assert (label, token) == ((token, label) if given == mask else (UNLABELLED, given))
    assert train.prompt_length == 1 or train.labels[1] == UNLABELLED


def test_infill_rows_that_do_not_fit_their_canvas_are_bad(canvas: Encoder) -> None:
    for prompt, response, reason in [
        (f"#{MASK_TEXT}2", "#123", "lengths differ"),
        (f"#{MASK_TEXT}2", "#13", "changes given"),
        ("#12", "#12", "nothing to fill"),
        (f"#{MASK_TEXT}2", f"#{MASK_TEXT}2", "mask token"),
    ]:
        with pytest.raises(BadRow, match=reason):
            canvas.train(Problem(prompt, response, response))


def test_a_row_the_task_refuses_is_a_bad_row(canvas: Encoder) -> None:
    with pytest.raises(BadRow, match="not a problem of this task"):
        canvas.problem({"question": "", "answer": ""})


def test_content_id_tells_where_the_prompt_ends() -> None:
    assert content_id(Problem("ab", "c", "")) != content_id(Problem("a", "bc", ""))
    assert re.fullmatch("[0-9a-f]{16}", content_id(Problem("a", "b", "")))
