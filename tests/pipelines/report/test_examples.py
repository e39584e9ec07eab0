"""Sample problems of a report: which are chosen, and how the page and the Markdown report show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from pipelines.evaluation.actor import ROWS
from pipelines.report.evaluation import html_report
from pipelines.report.examples import MAX_CHARACTERS, examples_of, shortened
from pipelines.report.markdown import markdown
from pipelines.report.plots import Plot
from pipelines.report.summary import shown_problems
from rcd_core.tasks import get_task
from tests.pipelines.report.made_results import made

PLOTS = [{"pareto": Plot(b"light", b"dark"), "throughput": Plot(b"light", b"dark")}]


def answers(results: dict[str, Any], wrong: dict[str, Sequence[int]], text: str = "an answer") -> pa.Table:
    """One row per method, threshold and problem; a method's problems of these numbers are wrong."""
    rows = [
        {
            "arm": method["name"], "threshold": point["threshold"], "example_id": f"{i:03d}", "sample": 0,
            "correct": i not in wrong[method["name"]], "tokens": 9, "denoise": 4, "reference": int(i == 1),
            "finish_reason": "length" if i == 2 else "stop", "completion": f"{text} {i}",
        }
        for method in results["arms"]
        for point in method["curve"]
        for i in range(60)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=ROWS)


def problems(ids: Sequence[str]) -> dict[str, dict[str, str]]:
    return {one: {"prompt": f"question {one}", "answer": f"gold {one}"} for one in ids}


def with_examples(wrong: dict[str, Sequence[int]], **texts: str) -> dict[str, Any]:
    results = made()
    results["examples"] = examples_of(results, answers(results, wrong, **texts), problems)
    return results


def test_failed_ones_come_first_and_every_outcome_is_shown() -> None:
    results = with_examples({"target/zero": range(0, 20), "seqd": range(15, 30)})
    examples = results["examples"]
    assert [method["name"] for method in examples["methods"]] == ["target/zero", "seqd"]
    advice = results["comparisons"][0]["advice"]
    assert [m["threshold"] for m in examples["methods"]] == [advice[s]["threshold"] for s in ("arm", "baseline")]
    assert [(tuple(c["correct"]), c["problems"]) for c in examples["counts"]] == [
        ((False, True), 15), ((False, False), 5), ((True, False), 10), ((True, True), 30),
    ]  # fmt: skip
    marks = [tuple(answer["correct"] for answer in problem["answers"]) for problem in examples["problems"]]
    order = [tuple(count["correct"]) for count in examples["counts"]]
    assert len(marks) == 10 and marks == sorted(marks, key=order.index)
    assert len(set(marks)) == 4
    assert [p["example_id"] for p in examples["problems"]][:3] == ["000", "001", "002"]


def test_without_failures_there_are_ten_right_ones() -> None:
    examples = with_examples({"target/zero": (), "seqd": ()})["examples"]
    assert [problem["example_id"] for problem in examples["problems"]] == [f"{i:03d}" for i in range(10)]


def test_page_and_markdown_show_both_answers_with_marks_and_passes() -> None:
    results = with_examples({"target/zero": range(0, 4), "seqd": range(2, 5)})
    page, text = html_report(results, PLOTS), markdown(results)
    for shown in (page, text):
        for words in ("question 000", "gold 000", "an answer 2", "only SeqD is right", "both are wrong: 2"):
            assert words in shown, words
        assert "wrong, 4 passes and 1 of the reference, 9 tokens" in shown
        assert "cut off at the limit of tokens" in shown
    first, last = page.index("only SeqD is right</summary>"), page.index("both are right</summary>")
    assert first < page.index("both are wrong</summary>") < last


def test_without_a_baseline_the_best_method_is_shown_alone() -> None:
    results = made()
    results["arms"], results["comparisons"] = results["arms"][1:], []
    table = answers(made(), {"target/zero": (3,), "seqd": ()})
    results["examples"] = examples_of(results, table, problems)
    assert results["examples"]["problems"][0]["example_id"] == "003"
    assert "RCD, zero start is wrong" in html_report(results, PLOTS) and "RCD, zero start is wrong" in markdown(results)


def test_texts_of_models_cannot_leave_their_place() -> None:
    wrong: dict[str, Sequence[int]] = {"target/zero": (1,), "seqd": ()}
    results = with_examples(wrong, text="</pre><script>alert(1)</script>\n````\n# heading")
    page, text = html_report(results, PLOTS), markdown(results)
    assert "<script" not in page and "&lt;/pre&gt;&lt;script" in page
    assert "`````text\n</pre>" in text


@pytest.mark.parametrize("extra", [-1, 0, 1, 5000])
def test_a_long_text_keeps_beginning_and_end(extra: int) -> None:
    text = "a" + "x" * (MAX_CHARACTERS + extra - 2) + "z"
    short = shortened(text)
    assert short[0] == "a" and short[-1] == "z" and len(short) <= MAX_CHARACTERS + 60
    assert (short == text) == (extra <= 0)


def test_a_board_is_shown_as_a_grid() -> None:
    results = made()
    board = "#412536536124364215125643253461641352"
    prompt = "#" + "<|MASK|>" * 36
    table = answers(results, {"target/zero": (0,), "seqd": ()})
    results["examples"] = examples_of(results, table, lambda ids: {i: {"prompt": prompt, "answer": board} for i in ids})
    problem = next(shown_problems(results))
    assert problem["prompt"].splitlines()[0] == ". . .  . . ." and len(problem["prompt"].splitlines()) == 8
    assert problem["answer"].replace(" ", "").replace("\n", "") == board[1:]
    assert problem["answers"][0]["text"] == "an answer 0", "no board: as it is"
    assert not problem["wide"]


def test_a_table_of_words_gets_wider_columns_and_prose_does_not() -> None:
    results = made() | {"task": "album"}
    table = answers(results, {"target/zero": (0,), "seqd": ()})
    one = get_task("album").problem(get_task("album").synthetic(0, "test", 0))
    for prompt, wide in ((one.prompt, True), ("a question\n" + "of many words " * 20, False), ("short\nlines", False)):
        texts = {"prompt": prompt, "answer": one.response if wide else "yes"}
        results["examples"] = examples_of(results, table, lambda ids, texts=texts: dict.fromkeys(ids, texts))
        assert next(shown_problems(results))["wide"] is wide
