"""Answers on disk: written as they finish, read once each whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.evaluation.answers import AnswerLog, PieceWriter, read_answers
from rcd_core.errors import UserError

SCHEMA = pa.schema({"arm": pa.string(), "threshold": pa.float64(), "seconds": pa.float64()})
KEYS = ["arm", "threshold"]


def row(threshold: float, seconds: float = 1.0, arm: str = "a") -> dict[str, Any]:
    return {"arm": arm, "threshold": threshold, "seconds": seconds}


def write(path: Path, rows: list[dict[str, Any]], flush_s: float = 5.0) -> None:
    writer = PieceWriter(str(path), SCHEMA, flush_s)
    for one in rows:
        writer.add(one)
    writer.flush()


def on_disk(directory: Path) -> list[float]:
    thresholds: list[float] = read_answers(str(directory), SCHEMA, KEYS)["threshold"].to_pylist()
    return thresholds


def test_rows_reach_the_disk_every_flush_s_seconds(tmp_path: Path) -> None:
    now = 0.0
    writer = PieceWriter(f"{tmp_path}/piece.parquet", SCHEMA, 5.0, clock=lambda: now)
    for now, count in ((1.0, 0), (4.0, 0), (6.0, 3), (7.0, 3), (10.9, 3), (11.0, 6)):
        writer.add(row(now))
        assert len(on_disk(tmp_path)) == count, now
    writer.add(row(12.0))
    writer.flush()
    assert on_disk(tmp_path) == [1, 4, 6, 7, 10.9, 11, 12] and len(list(tmp_path.iterdir())) == 1, "one file a piece"


def test_a_second_writer_goes_on_with_the_file(tmp_path: Path) -> None:
    for threshold in (0.5, 0.9):
        write(tmp_path / "piece.parquet", [row(threshold)])
    assert on_disk(tmp_path) == [0.5, 0.9]


def test_answers_are_read_sorted_and_without_duplicates(tmp_path: Path) -> None:
    """Those of an older release, several files to a directory, as well."""
    (tmp_path / "old").mkdir()
    for name, rows in (
        ("x", [row(0.9), row(0.5)]),
        ("y", [row(0.9, 7.0), row(0.9, arm="b")]),
        ("old/0000", [row(0.9), row(0.2)]),
        ("old/0001", [row(0.3)]),
    ):
        write(tmp_path / f"{name}.parquet", rows)
    table = read_answers(str(tmp_path), SCHEMA, KEYS)
    found = list(zip(*(table[key].to_pylist() for key in KEYS), strict=True))
    assert found == [*(("a", threshold) for threshold in (0.2, 0.3, 0.5, 0.9)), ("b", 0.9)]
    assert read_answers(f"{tmp_path}/nowhere", SCHEMA, KEYS).num_rows == 0


def test_the_log_keeps_the_last_of_equal_answers(tmp_path: Path) -> None:
    fingerprint = {"schema": 1, "recipe": {}, "outside": {}, "inputs": {}}
    answer = {"arm": "a", "threshold": 0.5, "example_id": "x", "sample": 0, "tokens": 1}
    log = AnswerLog(str(tmp_path), fingerprint)
    log.add(answer)
    log.add({**answer, "tokens": 2})
    log.close()
    again = AnswerLog(str(tmp_path), fingerprint)
    assert again.rows == [{**answer, "tokens": 2}] and again.done() == {("a", 0.5, "x", 0)}
    again.close()
    with pytest.raises(UserError, match="s3://bucket/dir"):
        AnswerLog("s3://bucket/dir", fingerprint)
