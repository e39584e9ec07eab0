"""prepare on real Ray: the same examples whatever the blocks, bad rows set aside, faults named before work starts."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines import prepare
from pipelines.data import examples, ordering
from pipelines.data.sources import check_early
from pipelines.recipe.load import parse_recipe
from pipelines.run.directory import RunDirectory, StageContext
from rcd_core.errors import UserError
from rcd_core.tasks.boxed import INSTRUCTION
from rcd_core.text.encoding import UNLABELLED
from rcd_core.text.tokenizer import load_tokenizer, mask_token_id
from tests.pipelines.calibration_run import SIZES, TRAIN


@pytest.fixture
def context(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., StageContext]:
    """context(data={...}, **sections) -> the StageContext of a prepare stage."""

    def make(data: dict[str, Any], **sections: Any) -> StageContext:
        recipe = parse_recipe(
            {
                "name": sections.pop("name", "run"),
                "storage": str(tmp_path),
                "block_length": 8,
                "tokenizer": {"vocab_size": 300},
                "data": {"task": "gsm8k", **data},
                "base": {"start": SIZES, "train": TRAIN},
                "reference": {"start": SIZES, "train": TRAIN},
                "target": {"train": TRAIN},
                **sections,
            }
        )
        console = Console(file=io.StringIO(), width=200)
        run = RunDirectory(recipe.run_directory)
        return StageContext(recipe=recipe, run=run, stage="prepare", key="", inputs=(), console=console)

    return make


def rows_of(ctx: StageContext, split: str, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows in the order of the manifest."""
    return [r for name in summary[split] for r in pq.read_table(f"{ctx.directory}/{split}/{name}").to_pylist()]


def write_jsonl(path: Path, rows: list[dict[str, Any] | str]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def problem(i: int) -> dict[str, Any]:
    return {"question": f"What is {i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}


def test_other_problems_are_tested_than_trained_on(
    ray_cluster: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    """The test rows are another task's; and test problems alone are enough where nothing is trained."""
    train = write_jsonl(tmp_path / "train.jsonl", [problem(i) for i in range(4)])
    test = write_jsonl(tmp_path / "test.jsonl", [{"problem": "Which digit?", "answer": "$4$"}])
    data = {"train": train, "fields": {"answer": "answer"}, "test": test, "test_task": "math500"}
    ctx = context(data)
    summary = prepare.run(ctx)
    assert "warning" not in ctx.console.file.getvalue()  # type: ignore[attr-defined]
    (row,) = rows_of(ctx, "test", summary)
    assert row["prompt"] == "Which digit?" + INSTRUCTION and row["answer"] == "$4$"
    assert "#### 1" in str(load_tokenizer(f"{ctx.directory}/tokenizer").decode(_labelled(ctx, summary)))
    alone = context(
        {"train": None, "test": test, "test_task": "math500"},
        name="alone",
        tokenizer={"path": f"{ctx.directory}/tokenizer"},
        base=None,
        reference=None,
        target={"start": "/no/such/model", "train": None},
        baseline=False,
        evaluate={"starts": ["zero"]},
        deploy={"start": "zero"},
    )
    found = prepare.run(alone)
    assert rows_of(alone, "test", found) == [row] and found["train"] == [] and "train" not in found["counts"]


def test_conversations_train_their_answers_and_test_the_last_one(
    ray_cluster: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    """Two files of two dialects, one of them compressed; the plan names both."""
    turns = [{"role": r, "content": c} for r, c in (("user", "1+1?"), ("assistant", "2"), ("user", "2+1?"))]
    chats: list[dict[str, Any] | str] = [{"messages": [*turns, {"role": "assistant", "content": "#### 3"}]}]
    first = write_jsonl(tmp_path / "chats.jsonl", [*chats, {"messages": turns[:1]}])
    second = tmp_path / "shared.json.gz"
    share = [{"from": "human", "value": "3+1?"}, {"from": "gpt", "value": "4\n#### 4"}]
    second.write_bytes(gzip.compress(json.dumps([{"conversations": share}]).encode()))
    ctx = context({"train": [first, str(second)], "test": first, "max_bad_rows": 0.5})
    notes = check_early(ctx.recipe)
    assert [note.rpartition(": ")[2] for note in notes] == [
        "dialect messages",
        "dialect conversations",
        "dialect messages",
    ]
    summary = prepare.run(ctx)
    assert summary["counts"]["train"] | {"below_min_length": 0} == {
        "rows": 3, "bad": {"no answer": 1}, "below_min_length": 0, "examples": 2, "duplicates": 0
    }  # fmt: skip
    tokenizer = load_tokenizer(f"{ctx.directory}/tokenizer")
    trained = [
        str(tokenizer.decode([i for i in row["labels"] if i != UNLABELLED])) for row in rows_of(ctx, "train", summary)
    ]
    ends = {text.replace("<|endoftext|>", "") for text in trained}
    assert ends == {"2<|im_end|>\n#### 3<|im_end|>\n", "4\n#### 4<|im_end|>\n"}
    (row,) = rows_of(ctx, "test", summary)
    assert row["prompt"] == "2+1?" and row["answer"] == "#### 3"
    assert str(tokenizer.decode(row["prompt_ids"])).endswith("2+1?<|im_end|>\n<|im_start|>assistant\n")
    assert "1+1?" in str(tokenizer.decode(row["prompt_ids"]))

    last = context({"train": first, "test": first, "max_bad_rows": 0.5, "turns": "last"}, name="last")
    (row,) = rows_of(last, "train", prepare.run(last))
    assert [i for i in row["labels"] if i != UNLABELLED][:1] != []
    assert "2<|im_end|>" not in str(tokenizer.decode([i for i in row["labels"] if i != UNLABELLED]))


def _labelled(ctx: StageContext, summary: dict[str, Any]) -> list[int]:
    return [i for row in rows_of(ctx, "train", summary) for i in row["labels"] if i != UNLABELLED]


def test_synthetic_canvas(ray_cluster: str, context: Callable[..., StageContext]) -> None:
    ctx = context(
        {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 70, "num_test": 5, "max_length": 37},
        block_length=37,
    )
    summary = prepare.run(ctx)
    assert summary["counts"]["train"] == {"rows": 70, "bad": {}, "below_min_length": 0, "examples": 70, "duplicates": 0}
    tokenizer = load_tokenizer(f"{ctx.directory}/tokenizer")
    assert (summary["vocab_size"], summary["mask_token_id"]) == (len(tokenizer), mask_token_id(tokenizer))
    train, test = rows_of(ctx, "train", summary), rows_of(ctx, "test", summary)
    assert [row["example_id"] for row in train] == [f"{i:08d}" for i in range(70)]
    assert pq.read_schema(f"{ctx.directory}/train/{summary['train'][0]}") == prepare.SCHEMAS["train"]
    assert pq.read_schema(f"{ctx.directory}/test/{summary['test'][0]}") == prepare.SCHEMAS["test"]
    assert all(len(row["input_ids"]) == len(row["labels"]) == 37 for row in train)
    assert all(20 <= sum(label != UNLABELLED for label in row["labels"]) <= 28 for row in train)
    assert all(20 <= row["prompt_ids"].count(summary["mask_token_id"]) <= 28 for row in test)
    assert all(tokenizer.decode(row["prompt_ids"]) == row["prompt"] for row in test)


def test_result_does_not_depend_on_blocks_or_files(
    ray_cluster: str, context: Callable[..., StageContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[Any] = [problem(i) for i in range(300)]
    one = write_jsonl(tmp_path / "one.jsonl", problems)
    parts = [write_jsonl(tmp_path / f"{i}.jsonl", problems[i::3]) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(problems), tmp_path / "rows.parquet")
    for module in (prepare, examples):
        monkeypatch.setattr(module, "ROWS_PER_FILE", 128)
    kept = {}
    # One tokenizer for all: which rows it is trained on depends on the order of the files, as it says.
    first = context({"train": one, "test": one}, name="first")
    tokenizer = {"path": f"{first.directory}/tokenizer"}
    kept["first"] = (first, prepare.run(first))
    for name, source, batch, at_once in (
        ("parts", parts[::-1], 7, 1 << 30),
        ("parquet", str(tmp_path / "rows.parquet"), 64, 20_000),
    ):
        monkeypatch.setattr(examples, "ROWS_PER_BATCH", batch)
        monkeypatch.setattr(ordering, "BYTES_AT_ONCE", at_once)
        ctx = context({"train": source, "test": source}, name=name, tokenizer=tokenizer)
        kept[name] = (ctx, prepare.run(ctx))
    (ctx, expected), *others = kept.values()
    assert [pq.read_metadata(f"{ctx.directory}/train/{name}").num_rows for name in expected["train"]] == [128, 128, 44]
    for other, summary in others:
        assert summary == expected
        for split in ("train", "test"):
            assert rows_of(other, split, summary) == rows_of(ctx, split, expected)
    ids = [row["example_id"] for row in rows_of(ctx, "train", expected)]
    assert ids == sorted(ids)


def test_bad_rows_are_counted_listed_and_left_out(
    ray_cluster: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [
            problem(1),
            "{broken",
            {"question": "no answer"},
            {"question": "", "answer": "#### 1"},
            {"question": "q", "answer": [5]},
            {"question": "no number", "answer": "five"},
            {"question": " ".join(map(str, range(200))), "answer": "#### 1"},
            {"question": "spells <|MASK|>", "answer": "#### 1"},
            {"question": "half a pair \ud83d", "answer": "#### 1"},
            "",
            problem(1),
            problem(2),
        ],
    )
    test = write_jsonl(tmp_path / "test.jsonl", [problem(1), problem(1), problem(3)])
    ctx = context({"train": train, "test": test, "max_bad_rows": 0.75})
    summary = prepare.run(ctx)
    assert summary["counts"]["train"] == {
        "rows": 11,
        "bad": {
            "'answer' is no text": 1,
            "'question' is not valid Unicode": 1,
            "above data.max_length": 1,
            "empty 'question'": 1,
            "mask token in the text": 1,
            "missing 'answer'": 1,
            "not JSON": 1,
            "not a problem of this task": 1,
        },
        "below_min_length": 0,
        "examples": 2,
        "duplicates": 1,
    }
    bad = pq.read_table(f"{ctx.directory}/bad.parquet").to_pylist()
    assert [(row["split"], row["source"], row["row"]) for row in bad] == [("train", train, i) for i in range(2, 10)]
    assert "8 bad rows" in ctx.console.file.getvalue()  # type: ignore[attr-defined]
    # A problem asked twice is evaluated twice, under two names; an example is trained on once.
    ids = [row["example_id"] for row in rows_of(ctx, "test", summary)]
    assert len(set(ids)) == 3 and sum(i.endswith("-1") for i in ids) == 1

    strict = context({"train": train, "test": test, "max_bad_rows": 0.2}, name="strict")
    with pytest.raises(UserError) as error:
        prepare.run(strict)
    message = str(error.value)
    assert "data.train: 8 of 11 rows" in message and "data.max_bad_rows (0.2)" in message
    assert "1 x not JSON" in message and f"{train}:2: not JSON" in message and "bad.parquet" in message
    assert not (Path(strict.directory) / "train").exists()


def test_padding_limits_and_filters(ray_cluster: str, context: Callable[..., StageContext], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [problem(i) for i in range(20)] + [problem(10**12)])
    ctx = context({"train": source, "test": source, "pad_multiple": 16, "num_train": 5, "min_length": 1})
    summary = prepare.run(ctx)
    assert summary["counts"]["train"]["rows"] == 5 and summary["counts"]["test"]["rows"] == 21
    rows = rows_of(ctx, "train", summary)
    tokenizer = load_tokenizer(f"{ctx.directory}/tokenizer")
    first = {f"What is {i}+1?" for i in range(5)}
    assert {str(tokenizer.decode(r["input_ids"])).split("\n")[1].removesuffix("<|im_end|>") for r in rows} == first
    for row in rows:
        assert len(row["input_ids"]) % 16 == 0
        assert row["labels"][: row["prompt_length"]] == [UNLABELLED] * row["prompt_length"]
        assert row["labels"][row["prompt_length"] :] == row["input_ids"][row["prompt_length"] :]
    length = min(len(row["input_ids"]) for row in rows)
    long = context({"train": source, "test": source, "min_length": length, "max_bad_rows": 0}, name="long")
    counts = prepare.run(long)["counts"]
    assert counts["train"]["examples"] + counts["train"]["below_min_length"] == 21
    assert counts["train"]["below_min_length"] > 0 and counts["test"]["examples"] == 21  # tests are not filtered
    nothing = context({"train": source, "test": source, "min_length": 200}, name="nothing")
    with pytest.raises(UserError, match="data.train: "):
        prepare.run(nothing)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": "{dir}/gone.jsonl"}, "gone.jsonl does not exist"),
        ({"fields": {"answer": "solution"}}, r"data\.train: .*no column 'solution' for our field 'answer'; it has ans"),
        ({"fields": {"reply": "answer"}}, r"data\.fields\.reply: .*question, answer"),
        ({"test_fields": {"answer": "reply"}}, r"data\.test: .*no column 'reply' for our field 'answer'"),
        ({"train": "synthetic", "num_train": 5}, r"data\.train is 'synthetic' but task 'gsm8k' has no generator"),
        ({"train": ["synthetic", "{dir}/a.jsonl"], "num_train": 5}, r"data\.train mixes"),
    ],
)
def test_faults_are_named_before_anything_is_done(
    context: Callable[..., StageContext], tmp_path: Path, data: dict[str, Any], says: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [problem(1)])
    filled = json.loads(json.dumps({"train": source, "test": source, **data}).replace("{dir}", str(tmp_path)))
    ctx = context(filled)
    with pytest.raises(UserError, match=says):
        prepare.run(ctx)
    assert not Path(ctx.directory).exists()


def test_columns_may_have_other_names_in_the_test_set(
    ray_cluster: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    """OpenMathInstruct-2's columns for training, MATH-500's for the test."""
    text = "Two and two?"
    made = {"problem": text, "generated_solution": "They are \\boxed{4}.", "expected_answer": "4"}
    asked = {"problem": "One and two?", "solution": "They are \\boxed{3}.", "answer": "3"}
    ctx = context(
        {
            "task": "math",
            "fields": {"question": "problem", "solution": "generated_solution", "answer": "expected_answer"},
            "test_fields": {"question": "problem"},
            "train": write_jsonl(tmp_path / "a.jsonl", [made]),
            "test": write_jsonl(tmp_path / "b.jsonl", [asked]),
        }
    )
    summary = prepare.run(ctx)
    (row,), (tested,) = (rows_of(ctx, split, summary) for split in ("train", "test"))
    tokenizer = load_tokenizer(f"{ctx.directory}/tokenizer")
    assert text in tokenizer.decode(row["input_ids"]) and "boxed{4}" in tokenizer.decode(row["input_ids"])
    assert tested["answer"] == "3"


def test_examples_are_held_out_of_training(
    ray_cluster: str, context: Callable[..., StageContext], tmp_path: Path
) -> None:
    """Training and validation together are what training was without, each example once, and the key tells."""
    path = write_jsonl(tmp_path / "rows.jsonl", [problem(i) for i in range(60)] + [problem(0)])
    data = {"train": path, "test": path, "max_length": 128}
    whole, split = context(data), context({**data, "num_validation": 20}, name="split")
    before, after = prepare.run(whole), prepare.run(split)
    said = whole.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"warning: data.train and data.test both have {path}" in said
    held, kept = (rows_of(split, name, after) for name in ("validation", "train"))
    assert len(held) == 20 and len(kept) == 40 == sum(after["chunks"]["rows"])
    assert held + kept == rows_of(whole, "train", before) and before["validation"] == []
    assert after["fingerprint"] != before["fingerprint"]
    with pytest.raises(UserError, match="data.num_validation is 60"):
        prepare.run(context({**data, "num_validation": 60}, name="all"))
