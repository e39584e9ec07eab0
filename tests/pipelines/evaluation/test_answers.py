"""Answers on disk: written as they finish, read once each whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.evaluation.answers import AnswerLog, ShardWriter, read_shard, read_shards
from rcd_core.errors import UserError

SCHEMA = pa.schema({"arm": pa.string(), "threshold": pa.float64(), "seconds": pa.float64()})
KEYS = ["arm", "threshold"]


def row(threshold: float, seconds: float = 1.0, arm: str = "a") -> dict[str, Any]:
    return {"arm": arm, "threshold": threshold, "seconds": seconds}


def write(directory: Path, rows: list[dict[str, Any]], flush_s: float = 5.0) -> None:
    writer = ShardWriter(str(directory), SCHEMA, flush_s)
    for one in rows:
        writer.add(one)
    writer.flush()


def test_rows_reach_the_disk_every_flush_s_seconds(tmp_path: Path) -> None:
    now = 0.0
    writer = ShardWriter(f"{tmp_path}/shard", SCHEMA, 5.0, clock=lambda: now)
    for now, on_disk in ((1.0, 0), (4.0, 0), (6.0, 3), (7.0, 3), (10.9, 3), (11.0, 6)):
        writer.add(row(now))
        assert len(read_shard(f"{tmp_path}/shard", SCHEMA)) == on_disk, now
    writer.add(row(12.0))
    writer.flush()
    assert read_shard(f"{tmp_path}/shard", SCHEMA)["threshold"].to_pylist() == [1, 4, 6, 7, 10.9, 11, 12]


def test_rows_of_a_file_share_their_seconds(tmp_path: Path) -> None:
    """The first answer of a batch waits for all passes so far, the next one for none: together they took 3 s."""
    write(tmp_path / "shard", [row(seconds, seconds) for seconds in (3.0, 0.0, 0.0)])
    assert read_shard(f"{tmp_path}/shard", SCHEMA)["seconds"].to_pylist() == [1.0, 1.0, 1.0]


def test_a_second_writer_adds_files(tmp_path: Path) -> None:
    for threshold in (0.5, 0.9):
        write(tmp_path / "shard", [row(threshold)])
    assert read_shard(f"{tmp_path}/shard", SCHEMA)["threshold"].to_pylist() == [0.5, 0.9]


def test_shards_are_read_sorted_and_without_duplicates(tmp_path: Path) -> None:
    for name, rows in (("x", [row(0.9), row(0.5)]), ("y", [row(0.9, 7.0), row(0.9, arm="b")])):
        write(tmp_path / name, rows, flush_s=0.0)
    table = read_shards(str(tmp_path), SCHEMA, KEYS)
    assert list(zip(*(table[key].to_pylist() for key in KEYS), strict=True)) == [("a", 0.5), ("a", 0.9), ("b", 0.9)]
    assert read_shards(f"{tmp_path}/nowhere", SCHEMA, KEYS).num_rows == 0


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
