"""Rows on disk as they come, and together again: each once, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.evaluation.parts import PartWriter, read_parts, read_piece

SCHEMA = pa.schema({"arm": pa.string(), "threshold": pa.float64(), "seconds": pa.float64()})
KEYS = ["arm", "threshold"]


def row(threshold: float, seconds: float = 1.0, arm: str = "a") -> dict[str, Any]:
    return {"arm": arm, "threshold": threshold, "seconds": seconds}


def test_rows_are_on_disk_a_while_after_they_came(tmp_path: Path) -> None:
    now = 0.0
    writer = PartWriter(f"{tmp_path}/piece", SCHEMA, 5.0, clock=lambda: now)
    for now, on_disk in ((1.0, 0), (4.0, 0), (6.0, 3), (7.0, 3), (10.9, 3), (11.0, 6)):
        writer.add(row(now))
        assert len(read_piece(f"{tmp_path}/piece", SCHEMA)) == on_disk, now
    writer.add(row(12.0))
    writer.flush()
    assert read_piece(f"{tmp_path}/piece", SCHEMA)["threshold"].to_pylist() == [1, 4, 6, 7, 10.9, 11, 12]


def test_seconds_are_shared_by_the_rows_of_a_file_and_none_is_lost(tmp_path: Path) -> None:
    """The first answer of a batch waits for all passes so far, the second for none: together they took three."""
    writer = PartWriter(f"{tmp_path}/piece", SCHEMA, 5.0, clock=lambda: 0.0)
    for seconds in (3.0, 0.0, 0.0):
        writer.add(row(seconds, seconds))
    writer.flush()
    assert read_piece(f"{tmp_path}/piece", SCHEMA)["seconds"].to_pylist() == [1.0, 1.0, 1.0]


def test_a_writer_goes_on_beside_what_is_there(tmp_path: Path) -> None:
    for threshold in (0.5, 0.9):
        writer = PartWriter(f"{tmp_path}/piece", SCHEMA, 5.0)
        writer.add(row(threshold))
        writer.flush()
    assert read_piece(f"{tmp_path}/piece", SCHEMA)["threshold"].to_pylist() == [0.5, 0.9]


def test_what_two_actors_wrote_is_there_once_and_sorted(tmp_path: Path) -> None:
    for piece, rows in (("x", [row(0.9), row(0.5)]), ("y", [row(0.9, 7.0), row(0.9, arm="b")])):
        writer = PartWriter(f"{tmp_path}/{piece}", SCHEMA, 0.0)
        for one in rows:
            writer.add(one)
    table = read_parts(str(tmp_path), SCHEMA, KEYS)
    assert list(zip(*(table[key].to_pylist() for key in KEYS), strict=True)) == [("a", 0.5), ("a", 0.9), ("b", 0.9)]


def test_nothing_is_an_empty_table(tmp_path: Path) -> None:
    assert read_parts(f"{tmp_path}/nowhere", SCHEMA, KEYS).num_rows == 0
