"""Ten problems of an evaluation with the answers of both methods, for people to read; failed ones first.

The methods are those of the verdict, each at the threshold that was chosen for it. The kinds of outcome (only the
method failed, both failed, ...) take turns, so that ten problems show each kind that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.text import Results, titles
from pipelines.report.verdict import subject

NUM_EXAMPLES = 10
MAX_CHARACTERS = 3000  # of a text; the middle of a longer one is left out
_SHOWN = ("correct", "tokens", "denoise", "reference", "finish_reason")
Problems = Mapping[str, Mapping[str, str]]  # example id -> prompt, answer


def examples_of(results: Results, table: pa.Table, read: Callable[[Sequence[str]], Problems]) -> dict[str, Any] | None:
    """The entry `examples` of results.json. table: the rows of results.parquet; read: problems by their ids."""
    names, points = titles(results), _thresholds(results)
    answers = {name: _answers(table, name, threshold) for name, threshold in points.items()}
    if not answers or any(row["tokens"] is None for rows in answers.values() for row in rows.values()):
        return None
    ids = sorted(set.intersection(*(set(rows) for rows in answers.values())))
    kinds: dict[tuple[bool, ...], list[str]] = {}
    for example_id in ids:
        kinds.setdefault(tuple(rows[example_id]["correct"] for rows in answers.values()), []).append(example_id)
    # Where the method fails, then where only its baseline does, then the rest. Of the first, alone before both.
    order = sorted(kinds, key=lambda right: (right[0], right[-1] if right[0] else not right[-1]))
    turns = [e for turn in zip_longest(*(kinds[kind] for kind in order)) for e in turn if e is not None]
    taken = set(turns[:NUM_EXAMPLES])
    chosen = [example_id for kind in order for example_id in kinds[kind] if example_id in taken]
    problems = read(chosen)
    return {
        "methods": [{"name": n, "title": names[n], "threshold": threshold} for n, threshold in points.items()],
        "counts": [{"correct": list(kind), "problems": len(kinds[kind])} for kind in order],
        "problems": [
            {
                "example_id": example_id,
                "prompt": shortened(problems[example_id]["prompt"]),
                "answer": shortened(problems[example_id]["answer"]),
                "answers": [_shown(rows[example_id]) for rows in answers.values()],
            }
            for example_id in chosen
        ],
    }


def shortened(text: str) -> str:
    """The beginning and the end of a long text: an answer's result is at its end."""
    if len(text) <= MAX_CHARACTERS:
        return text
    first, last = text[: MAX_CHARACTERS // 3], text[-2 * MAX_CHARACTERS // 3 :]
    return f"{first}\n[... {len(text) - len(first) - len(last)} characters are left out ...]\n{last}"


def _thresholds(results: Results) -> dict[str, float]:
    """Method -> threshold to show: the verdict's method and its baseline, or the best method if nothing is compared."""
    comparison = subject(results)
    if comparison is not None and comparison.get("advice"):
        sides = {comparison["arm"]: "arm", comparison["baseline"]: "baseline"}
        return {name: comparison["advice"][side]["threshold"] for name, side in sides.items()}
    shown = [comparison["arm"], comparison["baseline"]] if comparison else [m["name"] for m in results["arms"]][:1]
    best = {m["name"]: max(m["curve"], key=lambda p: p["accuracy"]) for m in results["arms"] if m["curve"]}
    return {name: best[name]["threshold"] for name in shown if name in best}


def _answers(table: pa.Table, method: str, threshold: float) -> dict[str, dict[str, Any]]:
    """Example id -> the row of its first sample."""
    rows = table.filter(
        pc.and_(
            pc.and_(pc.equal(table["arm"], method), pc.equal(table["threshold"], threshold)),
            pc.equal(table["sample"], 0),
        )
    )
    return {row["example_id"]: row for row in rows.select([*_SHOWN, "example_id", "completion"]).to_pylist()}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: row[name] for name in _SHOWN}, "completion": shortened(row["completion"] or "")}
