"""Data files as people have them: every format and dialect, and what is wrong with single rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcd_core.errors import UserError
from rcd_core.tasks import get_task
from rcd_core.tasks.dialects import DIALECTS, conversation
from rcd_core.tasks.files import BadRow, columns_in, records
from rcd_core.tasks.rows import choose_dialect, read_rows
from rcd_core.text.encoding import UNLABELLED, Encoder
from rcd_core.text.tokenizer import train_tokenizer

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
QA = {"question": "question", "answer": "answer"}
# A row of each dialect; all of them are the same conversation.
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "conversations": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "conversation": {"conversation": [USER, ASSISTANT]},
    "generations": {"problem": "2+2?", "generations": ["5", "4"], "correctness_math_verify": [False, True]},
    "prompt-completion": {"prompt": "2+2?", "completion": "4"},
    "prompt-response": {"prompt": "2+2?", "response": "4"},
    "instruction-output": {"instruction": "2+2?", "input": "", "output": "4"},
    "instruction-response": {"instruction": "2+2?", "context": "", "response": "4"},
    "question-answer": {"question": "2+2?", "answer": "4"},
    "question-response": {"question": "2+2?", "response": "4"},
    "query-response": {"query": "2+2?", "response": "4"},
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """In the format of the file's name. CSV cells hold JSON where they are no text."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    text = io.StringIO()
    if kind == "jsonl":
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        json.dump(rows, text, indent=1)
    else:
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)


def read(path: str) -> list[Any]:
    dialect = choose_dialect(path, {"question": "never", "answer": "there"}, "data.train")
    return [row.conversation or row.bad for row in read_rows(path, {}, dialect)]


def test_every_dialect_has_a_row_here() -> None:
    assert ROWS.keys() == DIALECTS.keys()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz"])
def test_every_dialect_in_every_format(name: str, suffix: str, tmp_path: Path) -> None:
    if "csv" in suffix and name == "generations":
        pytest.skip("lists of answers do not fit into cells")
    path = write(tmp_path / f"rows{suffix}", [ROWS[name], ROWS[name]])
    dialect = choose_dialect(path, {"question": "never", "answer": "there"}, "data.train")
    assert dialect is not None and dialect.name == name
    assert read(path) == [[USER, ASSISTANT]] * 2


def test_the_tasks_own_columns_come_first_unless_another_dialect_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**ROWS["messages"], **ROWS["question-answer"]}])
    assert choose_dialect(path, QA, "data.train") is None
    chosen = choose_dialect(path, QA, "data.train", "messages")
    assert chosen is not None and chosen.name == "messages"
    with pytest.raises(UserError, match=r"data\.train.*'conversations'.*data\.dialect"):
        choose_dialect(path, QA, "data.train", "conversations")
    with pytest.raises(UserError, match=r"data\.test: .*'gold'.*data\.fields\.answer"):
        choose_dialect(path, {"answer": "gold"}, "data.test", conversations=False)


SAME = [USER, ASSISTANT]
DETAILS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"system": "Be brief.", **ROWS["messages"]}, [{"role": "system", "content": "Be brief."}, *SAME]),
    ({"instruction": "Add. ", "input": "2 2", "output": "4"}, [{**USER, "content": "Add.\n\n2 2"}, ASSISTANT]),
    ({"prompt": [USER], "completion": [ASSISTANT]}, SAME),
    ({"messages": [USER, ASSISTANT, USER]}, SAME),
    ({"messages": [{**USER, "content": [{"type": "text", "text": "2+2?"}]}, ASSISTANT]}, SAME),
    (
        {"messages": [USER, {**ASSISTANT, "reasoning_content": "easy"}]},
        [USER, {**ASSISTANT, "content": "<think>\neasy\n</think>\n\n4"}],
    ),
    ({"problem": "2+2?", "generations": ["4", "5"], "correctness_math_verify": [False, False]}, SAME),
]


@pytest.mark.parametrize(("row", "expected"), DETAILS)
def test_details_of_rows(row: dict[str, Any], expected: list[dict[str, str]], tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", [row])) == [expected]


def test_reasoning_is_dropped_from_fields_and_tags() -> None:
    for answer in ({**ASSISTANT, "reasoning_content": "easy"}, {**ASSISTANT, "content": "<think>\na\nb</think>\n\n4"}):
        assert conversation([USER, answer], keep_reasoning=False) == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER], "no answer"),
        ([ASSISTANT, USER], "an answer without a question"),
        ([USER, {"role": "tool", "content": "x"}, ASSISTANT], "a turn of 'tool'"),
        ([USER, {"content": "x"}], "a turn of None"),
        ([USER, {"role": "assistant", "content": None}], "a turn is no text"),
        ([USER, {"role": "assistant", "content": " "}], "an empty turn of the assistant"),
        ([USER, {"role": "assistant", "content": "\ud83d"}], "a turn is not valid Unicode"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, ASSISTANT], "a turn is no text"),
        ([USER, {**ASSISTANT, "tool_calls": [{"name": "f"}]}], "a turn calls tools"),
        (["2+2?", "4"], "a turn is no object"),
    ],
)
def test_rows_that_cannot_be_used(turns: list[Any], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        conversation(turns)
    assert error.value.reason == reason


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}', '[{"a": 1} {"a": 2}]', '[{"a": 1}, oops]', "["])
def test_a_damaged_array_names_its_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        list(records(str(tmp_path / "a.json")))


def test_damaged_gzip_and_uneven_csv(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
        list(records(str(tmp_path / "a.jsonl.gz")))
    (tmp_path / "a.csv").write_bytes(b"q,a\n1,2\n1\n1,2,3\n\xff,2\n")
    rows = [row for _, row in records(str(tmp_path / "a.csv"))]
    assert rows[0] == {"q": "1", "a": "2"} and isinstance(rows[1], BadRow) and isinstance(rows[2], BadRow)
    last = list(read_rows(str(tmp_path / "a.csv"), {"question": "q"}))[-1]
    assert last.bad is not None and last.bad.reason == "'q' is not valid Unicode"


_JSON = st.recursive(st.none() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s))


@given(st.lists(_JSON))
def test_an_array_is_read_as_json_does_whatever_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    for indent in (None, 2):
        path.write_text(" " + json.dumps(rows, indent=indent))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rcd_core.tasks.files._CHUNK", 3)
            assert [row for _, row in records(str(path))] == rows


def test_columns_of_a_wide_parquet_file_are_read_without_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"b": 1, "a": [1]}])
    assert columns_in(path, "data.train") == ["b", "a"]
    assert [row for _, row in records(path, ("a", "not there"))] == [{"a": [1]}]


# -- labels


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["What is 2+2? Be brief.", "4"] * 9, 300)


TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    USER,
    ASSISTANT,
    USER,
    {"role": "assistant", "content": "Four"},
]


@pytest.mark.parametrize("all_turns", [True, False])
def test_answers_are_trained_all_or_the_last(tokenizer: Any, all_turns: bool) -> None:
    encoder = Encoder(get_task("qa"), tokenizer, 4, 256, all_turns=all_turns)
    example = encoder.train(TWO_TURNS)
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert tokenizer.decode(example.input_ids).replace("<|endoftext|>", "") == whole
    trained = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != UNLABELLED]
    assert all(label in (UNLABELLED, i) for i, label in zip(example.input_ids, example.labels, strict=True))
    answers = "4<|im_end|>\nFour<|im_end|>\n" if all_turns else "Four<|im_end|>\n"
    assert tokenizer.decode(trained).replace("<|endoftext|>", "") == answers
    assert example.labels[: example.prompt_length] == [UNLABELLED] * example.prompt_length


def test_a_template_that_rewrites_history_needs_the_last_turn(tokenizer: Any) -> None:
    """As Qwen3's, which leaves out the reasoning of all answers but the last."""
    import copy

    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [USER, {"role": "assistant", "content": "<think>a</think>4"}, USER, ASSISTANT]
    with pytest.raises(BadRow, match="refused by the chat template") as error:
        Encoder(get_task("qa"), forgetful, 4, 256).train(turns)
    assert "data.turns" in error.value.detail
    last = Encoder(get_task("qa"), forgetful, 4, 256, all_turns=False).train(turns)
    assert "<think>" not in forgetful.decode(last.input_ids)
