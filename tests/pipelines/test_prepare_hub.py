"""prepare with data sets of the hub, which a server on this machine plays."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prepare
from pipelines.data import examples
from pipelines.data.hub import hub_files
from pipelines.data.sources import source_files
from pipelines.run.directory import StageContext
from rcd_core.errors import UserError
from tests.hub_server import hub_server
from tests.pipelines.test_prepare import context as context  # a fixture
from tests.pipelines.test_prepare import problem


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_hub_data_is_read_by_the_workers_at_one_commit(
    ray_cluster: str, context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task per file; the driver asks for names, and for the first file's columns."""
    rows = [{**problem(i), "more": i} for i in range(12)]
    parts = {f"main/train-0000{i}-of-00003.parquet": parquet(rows[4 * i : 4 * i + 4]) for i in range(3)}
    files = {**parts, "README.md": b"", "main/test.jsonl": json.dumps(rows[0]).encode(), "other.parquet": b"no Parquet"}
    patterns = [{"split": "train", "path": "main/train-*"}, {"split": "test", "path": ["main/test.jsonl"]}]
    in_driver: list[str] = []
    monkeypatch.setattr(examples, "rows_of", lambda recipe, split, path: in_driver.append(path))
    with hub_server() as hub:
        commit = hub.add("owner/name", files, configs=[{"config_name": "main", "data_files": patterns}])
        source = "hf://owner/name@main"
        ctx = context({"train": source, "test": source})
        paths = [f"hf://datasets/owner/name@{commit}/{path}" for path in parts]
        assert [file.path for file in source_files(ctx.recipe, "train")] == paths
        summary = prepare.run(ctx)
        assert {read for read in hub.read if read[2] in parts} == {("owner/name", commit, path) for path in parts}
    counts = summary["counts"]
    assert (counts["train"]["examples"], counts["test"]["examples"]) == (12, 1) and not in_driver
    assert not (Path(ctx.directory) / "sources").exists()


@pytest.mark.parametrize(
    ("source", "split", "found"),
    [
        ("hf://o/named", "train", ["data/train-0.parquet", "data/train-1.parquet"]),
        ("hf://o/named@default:validation", "train", ["dev.jsonl"]),
        ("hf://o/named", "test", ["eval/0.parquet"]),
        ("hf://o/plain", "train", ["a.parquet", "b.jsonl"]),
        ("hf://o/card", "train", ["x/1.parquet"]),
        ("hf://o/card@y:large", "train", ["y/large-1.parquet", "y/small-1.parquet"]),
        ("hf://o/card@z", "test", ["z/test.parquet"]),
    ],
)
def test_the_files_of_a_hub_split(source: str, split: str, found: list[str]) -> None:
    named = ["data/train-1.parquet", "data/train-0.parquet", "dev.jsonl", "eval/0.parquet", "latest.parquet", "a.py"]
    card = ["x/1.parquet", "x/deep/2.parquet", "y/large-1.parquet", "y/small-1.parquet", "z/test.parquet", "test.jsonl"]
    configs = [
        {"config_name": "y", "data_files": {"large": ["y/large-*", "y/small-*"]}},
        {"config_name": "x", "data_files": "x/*.parquet", "default": True},
        {"config_name": "z", "data_dir": "z"},
    ]
    with hub_server() as hub:
        for name, paths in (("named", named), ("plain", ["b.jsonl", "a.parquet", "README.md"]), ("card", card)):
            hub.add(f"o/{name}", dict.fromkeys(paths, b""), **({"configs": configs} if name == "card" else {}))
        commit = hub.commit(source.split("@")[0].split(":")[1].removeprefix("//"))
        paths = [path.partition(f"@{commit}/")[2] for path in hub_files(source, split, "data.train", commit)]
    assert paths == found


@pytest.mark.parametrize(
    ("source", "revision", "named"),
    [
        ("hf://o/none", None, "hf://o/none"),
        ("hf://o/name", "gone", "gone"),
        ("hf://o/name@main", None, "'main'.*default"),
        ("hf://o/name:dev", None, "'dev'"),
        ("hf://o/arrow", None, r"train\.arrow"),
    ],
)
def test_faults_of_hub_data_are_named(source: str, revision: str | None, named: str) -> None:
    with hub_server() as hub:
        hub.add("o/name", {"train.parquet": b""})
        hub.add("o/arrow", {"train.arrow": b""})
        with pytest.raises(UserError, match=rf"data\.train.*{named}"):
            hub_files(source, "train", "data.train", revision)
