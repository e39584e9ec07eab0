"""From rows of files to token ids: reasons of bad rows, labels and lengths."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcd_core.errors import UserError
from rcd_core.tasks import MASK_TEXT, Problem, get_task
from rcd_core.tasks.files import BadRow
from rcd_core.tasks.rows import check_columns, read_rows
from rcd_core.text.encoding import TOO_SHORT, UNLABELLED, Encoder, content_id
from rcd_core.text.tokenizer import mask_token_id, train_tokenizer


def test_bad_lines_are_reported_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"q": "one", "a": "1"}',
        b"",
        b'{"q": "cut off',
        b'["a list"]',
        b'{"q": "no a"}',
        b'{"q": " ", "a": "1"}',
        b'{"q": "type", "a": [1]}',
        b'{"q": "bytes \xff", "a": "1"}',
        b'{"q": "two", "a": "2", "more": [1]}',
        b'{"q": "half a pair \\ud83d", "a": "1"}',
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
        (10, "'q' is not valid Unicode"),
    ]


def test_parquet_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"q": ["one", None], "a": ["1", "2"], "big": [[1], [2]]}), path)
    good, bad = read_rows(path, {"question": "q", "answer": "a"})
    assert good.values == {"question": "one", "answer": "1"}
    assert bad.number == 2 and bad.bad is not None and bad.bad.reason == "missing 'q'"


def test_numbers_and_bytes_of_parquet_columns_are_text(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    columns = {"q": ["größer".encode(), b"\xff"], "a": [Decimal("1234567.50"), Decimal("0.0000001")]}
    pq.write_table(pa.table(columns), path)
    good, bad = read_rows(path, {"question": "q", "answer": "a"})
    assert good.values == {"question": "größer", "answer": "1234567.5000000"}
    assert bad.bad is not None and bad.bad.reason == "'q' is not valid Unicode"


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    columns = {"question": "question", "answer": "solution"}
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    jsonl.write_text('{"question": "q", "answer": "a"}\n')
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), parquet)
    for path in (jsonl, parquet):
        with pytest.raises(UserError, match=r"data\.train: .*'solution'.*data\.fields\.answer"):
            check_columns(str(path), columns, "data.train")
        check_columns(str(path), {"question": "question"}, "data.train")


@pytest.mark.parametrize("content", ["", "\n\n", "a\nb\n"])
def test_a_file_without_usable_lines_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"data\.test: .*a\.jsonl"):
        check_columns(str(path), {"question": "q"}, "data.test")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    for name in ("a.parquet", "gone.jsonl"):
        with pytest.raises(UserError, match=name):
            list(read_rows(str(tmp_path / name), {"question": "q"}))


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
    for encode in (chat.train, chat.test):
        with pytest.raises(BadRow, match="above data.max_length"):
            encode(long)
    wordy = Problem("q", "x" * 200, "#### 2")
    with pytest.raises(BadRow):
        chat.train(wordy)
    assert chat.test(wordy).prompt_ids  # a long answer does not exclude a test problem
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
