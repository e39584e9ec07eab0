"""`rcd signals inspect`: sizes and fidelity of real shards of a tiny reference. No Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli.main import make_app
from pipelines.signals.actor import SignalActor
from pipelines.signals.inspect import kept_histogram, measure_fidelity, measure_sizes, read_manifest
from pipelines.signals.plan import SignalJob
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import load_model, new_model
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.examples import Chunks
from rcd_core.training.data.signal_format import SCHEMA_VERSION
from rcd_core.training.settings import SignalRule

GOLDEN = Path(__file__).parents[2] / "golden"
REFERENCE, TARGET = str(GOLDEN / "rcd" / "sdar_ref_tiny"), str(GOLDEN / "sdar_tiny")
BLOCK = 4


def make_signals(directory: Path, rule: SignalRule) -> dict[str, Any]:
    """Two shards of 12 rows as the stage writes them, with the part of the manifest that is read here."""
    directory.mkdir()
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 500, BLOCK * (3 + i % 4)).tolist() for i in range(24)]
    lists = pa.list_(pa.int32())
    columns = {
        "example_id": pa.array([f"{i:04d}" for i in range(24)]),
        "input_ids": pa.array(rows, lists),
        "labels": pa.array([[-100] * BLOCK + row[BLOCK:] for row in rows], lists),
    }
    examples = str(directory.parent / "examples.parquet")
    pq.write_table(pa.table(columns), examples)
    job = SignalJob(
        directory=str(directory),
        reference=REFERENCE,
        examples=(examples,),
        chunks=Chunks.of_files([examples]),
        noise=NoiseSettings(),
        block_length=BLOCK,
        rule=rule,
        row_offsets=(0, 12, 24),
        batch_tokens=64,
        threads=1,
    )
    actor = SignalActor(job)
    actor({"shard": [0, 1]})
    sidecars = [json.loads((directory / f"shard-{s:05d}.parquet.json").read_text()) for s in range(2)]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "shards": [f"shard-{s:05d}.parquet" for s in range(2)],
        "row_offsets": [0, 12, 24],
        "shard_bytes": [s["bytes"] for s in sidecars],
        "shard_sha256": [s["sha256"] for s in sidecars],
        "tokens": sum(s["tokens"] for s in sidecars),
        "masked_tokens": sum(s["masked_tokens"] for s in sidecars),
        "kept_entries": sum(s["kept_entries"] for s in sidecars),
        "bad_rows": {},
        **{name: sidecars[0][name] for name in ("family", "vocab_size", "mask_token_id")},
        "block_length": BLOCK,
        **vars(rule),
        "entropy_histogram": np.sum([s["entropy_histogram"] for s in sidecars], axis=0).tolist(),
    }
    (directory / "manifest.json").write_text(json.dumps({"summary": summary}))
    return summary


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fixed") / "signals"
    make_signals(directory, SignalRule(top_k=6))
    return directory


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adaptive") / "signals"
    make_signals(directory, SignalRule(top_k=64, keep_mass=0.2))
    return directory


def call(*arguments: str) -> int:
    return int(make_app()(["signals", *arguments], exit_on_error=False, print_error=False))


def test_sizes_are_those_of_the_files(fixed: Path) -> None:
    manifest = read_manifest(str(fixed))
    sizes = measure_sizes(str(fixed), manifest["shards"], manifest["masked_tokens"])
    tables = [pq.read_table(fixed / name) for name in manifest["shards"]]
    assert sizes.rows == 24 and set(sizes.columns) == set(tables[0].column_names)
    assert sizes.kept == sum(len(t["topk_ids"].combine_chunks().flatten()) for t in tables) == 6 * sizes.masked
    whole = sum((fixed / name).stat().st_size for name in manifest["shards"])
    assert 0.3 * whole < sum(sizes.columns.values()) < whole, "all but headers and footers"
    per_token = sum(sizes.columns.values()) / sizes.masked
    assert sizes.per_kept_entry * 6 + sizes.rest_per_token == pytest.approx(per_token)
    assert kept_histogram(str(fixed), manifest["shards"], sizes) == {6: sizes.masked}


def test_entries_kept_are_counted_where_k_is_adaptive(adaptive: Path) -> None:
    manifest = read_manifest(str(adaptive))
    sizes = measure_sizes(str(adaptive), manifest["shards"], manifest["masked_tokens"])
    counts = kept_histogram(str(adaptive), manifest["shards"], sizes)
    assert sum(counts.values()) == sizes.masked and len(counts) > 1
    assert sum(k * n for k, n in counts.items()) == sizes.kept == manifest["kept_entries"]


def test_fidelity_of_what_is_stored(fixed: Path) -> None:
    """The stored signals agree with those of the same k made again, but for the target's rounding of nothing."""
    report, rule = measure_fidelity(str(fixed), read_manifest(str(fixed)), REFERENCE, TARGET, 50)
    assert rule.alpha == "normalized_entropy" and 50 <= report.positions < 200
    stored = next(row for row in report.rows if row.kind is None)
    by_k = {row.kind.k: row for row in report.rows if row.kind and row.kind.treatment == "mean_tail"}
    assert stored.kept == 6 and by_k[8].error < stored.error


def test_inspect_prints_and_draws(fixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    models = ("--reference", REFERENCE, "--target", TARGET, "--sample", "40")
    assert call("inspect", str(fixed), *models, "--output", str(picture)) == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(str(fixed))
    for part in ("2 shards, 24 rows", f"{manifest['masked_tokens']:,} of them masked", "topk_ids", "k: 6 at every"):
        assert part in shown
    assert "stored" in shown and "renormalise" in shown and "loss" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_writes_nothing_unasked(adaptive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(adaptive.parent.rglob("*"))
    assert call("inspect", f"{adaptive}/") == 0
    assert "k, by quantile" in capsys.readouterr().out
    assert sorted(adaptive.parent.rglob("*")) == before


def test_inspect_refuses_what_does_not_fit(fixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--reference and --target"):
        call("inspect", str(fixed), "--reference", REFERENCE)
    with pytest.raises(UserError, match="--sample is 0"):
        call("inspect", str(fixed), "--sample", "0")
    with pytest.raises(UserError, match="manifest.json"):
        call("inspect", str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"summary": {"rows": 3}}')
    with pytest.raises(UserError, match="manifest"):
        call("inspect", str(tmp_path))
    info = replace(load_model(TARGET).info)
    sizes = ModelConfig(family="sdar", hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32)
    new_model(sizes, vocab_size=600, info=info, seed=0).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="512.*600"):
        call("inspect", str(fixed), "--reference", REFERENCE, "--target", str(tmp_path / "other"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    manifest = make_signals(tmp_path / "signals", SignalRule(top_k=2))
    (tmp_path / "signals" / "shard-00001.parquet").unlink()
    with pytest.raises(UserError, match="shard-00001.parquet"):
        measure_sizes(str(tmp_path / "signals"), manifest["shards"], manifest["masked_tokens"])
