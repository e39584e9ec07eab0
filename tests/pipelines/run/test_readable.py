"""--redo keeps the old results where what their stages read turns out damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.run.driver import main
from rcd_core import load_model
from tests.pipelines.run import fake_job

GOLDEN = Path(__file__).parents[2] / "golden"


def redo(store: Path, *arguments: str) -> int:
    return main(["--storage", str(store), *arguments], registry=fake_job.stages)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The directory of stage `first` of a finished run, to which results of real stages are added."""
    assert redo(tmp_path) == 0
    return tmp_path / "demo" / "first"


def add(first: Path, **summary: Any) -> None:
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["summary"] |= summary
    (first / "manifest.json").write_text(json.dumps(manifest))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)


def examples(first: Path) -> Path:
    (first / "train").mkdir()
    ids = np.random.default_rng(0).integers(0, 50_000, 20_000)
    pq.write_table(pa.table({"input_ids": ids}), first / "train" / "a.parquet", write_page_checksum=True)
    add(first, train=["a.parquet"])
    return first / "train" / "a.parquet"


def model(first: Path) -> Path:
    load_model(GOLDEN / "sdar_tiny").save_pretrained(first / "model")
    add(first, weights_sha256="0" * 64)
    return first / "model" / "model.safetensors"


def shard(first: Path) -> Path:
    content = b"signals" * 100
    (first / "shard-0.parquet").write_bytes(content)
    add(first, shards=["shard-0.parquet"], shard_bytes=[700], shard_sha256=[hashlib.sha256(content).hexdigest()])
    return first / "shard-0.parquet"


@pytest.mark.parametrize("kind", [examples, model, shard])
def test_nothing_is_removed_before_the_inputs_are_read(
    kind: Any, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = kind(first)
    store = first.parents[1]
    assert redo(store, "--redo", "second") == 0, "its inputs are fine"
    if kind is shard:
        file.write_bytes(b"cut")
    else:
        flip(file, file.stat().st_size // 2)
    before = {p: p.read_bytes() for p in sorted(store.rglob("*.*")) if "second" in p.parts or "third" in p.parts}
    assert len(before) >= 4
    capsys.readouterr()
    assert redo(store, "--redo", "second") == 2
    error = capsys.readouterr().err
    assert "--redo second" in error and file.name in error and "--redo first" in error and "Traceback" not in error
    assert {p: p.read_bytes() for p in before} == before
    assert redo(store, "--redo", "first") == 0, "which removes the damaged result as well"
