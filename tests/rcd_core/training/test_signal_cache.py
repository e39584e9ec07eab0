"""Training rows that are read from cached signals."""

from __future__ import annotations

import errno
import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rcd_core import UserError, load_model
from rcd_core.noise import NoiseSettings
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.data.signal_cache import SignalSource, noise_record, require_match
from rcd_core.training.data.signal_format import SCHEMA_VERSION, SignalGroup, encode, parquet_options, schema
from rcd_core.training.objective import reference_signals
from rcd_core.training.settings import SignalRule
from tests.rcd_core.training.example_files import BLOCK, NOISE
from tests.rcd_core.training.test_rows import GOLDEN

Cache = tuple[str, dict[str, Any], list[TrainingRow]]


def signal_rows(
    model: Any, rows: list[TrainingRow], keep_mass: float | None
) -> tuple[list[TrainingRow], ReferenceSignals]:
    ids = {"mask_token_id": model.mask_token_id, "pad_token_id": 500, "block_length": BLOCK}
    batch, _ = collate(rows, **ids)
    return rows, reference_signals(model, batch, SignalRule(top_k=8, keep_mass=keep_mass, alpha_temperature=0.9))


@pytest.fixture
def cache(files: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> Cache:
    """(directory, manifest, rows) of 40 rows in three unequal shards with row groups of six; one row is rejected."""
    keep_mass = getattr(request, "param", None)
    model = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    # p_mask is stored as one number per row, or per token if each block has its own noise level.
    source = ExampleSource(files, NOISE if keep_mass is None else replace(NOISE, block_length=BLOCK))
    offsets, expected = [0, 7, 26, 40], []
    directory = tmp_path / "signals"
    directory.mkdir()
    names, sizes, digests = [], [], []
    for shard, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        path = directory / f"shard-{shard:05d}.parquet"
        with pq.ParquetWriter(path, schema(keep_mass is not None), **parquet_options(keep_mass is not None)) as writer:
            for start in range(first, last, 6):
                rows = [source.row(g) for g in range(start, min(start + 6, last))]
                if start == 7:
                    rows[1] = TrainingRow.rejected(8, "bad", 0, "empty")
                rows, signals = signal_rows(model, rows, keep_mass)
                writer.write_table(encode(rows, signals, keep_mass is not None))
                ends = np.cumsum([int(r.masked.sum()) for r in rows]).tolist()
                begins = [0, *ends[:-1]]
                parts = [signals[a:b] for a, b in zip(begins, ends, strict=True)]
                expected += [replace(r, signals=s) for r, s in zip(rows, parts, strict=True)]
        names.append(path.name)
        sizes.append(path.stat().st_size)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "shards": names,
        "row_offsets": offsets,
        "shard_bytes": sizes,
        "shard_sha256": digests,
        "alpha_temperature": 0.9,
        "delta_temperature": 1.0,
    }
    return str(directory), manifest, expected


def same(a: TrainingRow, b: TrainingRow) -> bool:
    x, y = a.signals, b.signals
    assert x is not None and y is not None
    width = max(x.topk_ids.shape[1], y.topk_ids.shape[1])
    x, y = (ReferenceSignals.cat([s, ReferenceSignals.empty(width, 0.9)]) for s in (x, y))
    arrays, tensors = ("input_ids", "labels", "masked"), ("topk_ids", "topk_logprobs", "entropy", "tail_mass")
    return (
        (a.index, a.example_id, a.draw, a.reason) == (b.index, b.example_id, b.draw, b.reason)
        and np.array_equal(np.float32(a.p), np.float32(b.p))
        and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)
        and all(torch.equal(getattr(x, n), getattr(y, n)) for n in tensors)
        and (x.alpha_temperature, x.delta_temperature) == (y.alpha_temperature, y.delta_temperature)
    )


@pytest.mark.parametrize("cache", [None, 0.3], indirect=True, ids=["fixed k", "adaptive k"])
def test_rows_are_read_as_they_were_written(cache: Cache) -> None:
    directory, manifest, expected = cache
    source = SignalSource(directory, manifest)
    assert all(same(source.row(g), expected[g]) for g in range(40))
    assert source.row(40).example_id == expected[0].example_id, "wraps around after the last row"
    assert [source.row(g).reason for g in (7, 8, 9)] == ["", "empty", ""]
    assert source._group.cache_info().currsize == 2
    every_other = SignalSource(directory, manifest)
    assert all(same(every_other.row(g), expected[g]) for g in range(1, 40, 2)), "rank 1 of 2"


def test_adaptive_k_is_ragged_on_disk(cache: Cache) -> None:
    model = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    rows = [r for r in cache[2] if not r.reason][:5]
    rows, signals = signal_rows(model, rows, 0.012)
    kept = torch.isfinite(signals.topk_logprobs)
    assert 0 < int(kept.sum()) < kept.numel(), "some positions keep fewer entries"
    table = encode(rows, signals, adaptive=True)
    assert len(table["topk_ids"].combine_chunks().values) == int(kept.sum())
    assert table["num_kept"].combine_chunks().values.to_pylist() == kept.sum(1).tolist()
    again = ReferenceSignals.cat([SignalGroup(table, (0.9, 1.0)).row(i, i).signals for i in range(5)])
    assert torch.equal(again.topk_logprobs, signals.topk_logprobs[:, : again.topk_ids.shape[1]])
    assert "num_kept" not in encode(*signal_rows(model, rows, None), adaptive=False).column_names


def damaged(directory: str, manifest: dict[str, Any], rows: range) -> str:
    source = SignalSource(directory, manifest)
    with pytest.raises(UserError) as caught:
        for g in rows:
            source.row(g)
    return str(caught.value)


def test_a_damaged_shard_is_named(cache: Cache) -> None:
    directory, manifest, expected = cache
    path = Path(directory) / "shard-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    message = damaged(directory, manifest, range(40))
    assert str(path) in message and f"{len(whole) - 20} bytes" in message and "--repair" in message
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "sha256" in damaged(directory, manifest, range(40))
    path.unlink()
    assert "missing" in damaged(directory, manifest, range(40))
    source = SignalSource(directory, manifest)
    assert all(same(source.row(g), expected[g]) for g in range(7)), "other shards can be read"


def test_a_stale_handle_is_opened_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network file system, while a shard is open and while its examples are read."""
    directory, manifest, expected = cache
    source, read, stale = SignalSource(directory, manifest), pq.ParquetFile.read_row_group, [False, True, True, False]

    def once_stale(file: Any, group: int, *arguments: Any, **options: Any) -> Any:
        if stale and stale.pop(0):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(file, group, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", once_stale)
    for g in (0, 30):
        assert source.row(g).input_ids.tolist() == expected[g].input_ids.tolist()
    assert stale == []


def test_a_shard_with_another_number_of_rows_is_named(cache: Cache) -> None:
    directory, manifest, _ = cache
    shifted = {**manifest, "row_offsets": [0, 8, 27, 41]}
    assert "shard-00000.parquet is damaged (it has 7 rows" in damaged(directory, shifted, range(1))


def test_a_mismatch_is_named_with_both_values_and_a_remedy() -> None:
    manifest = {"family": "sdar", "noise": noise_record(NOISE), "block_length": 4}
    require_match(manifest, manifest, "the recipe's")
    with pytest.raises(UserError, match=r"the signals' block_length is 4 but the recipe's is 8; .*--redo signals"):
        require_match(manifest, {"block_length": 8}, "the recipe's")
    with pytest.raises(UserError, match=r"family is 'sdar' but the target's is 'llada'; .*reference\.start"):
        require_match(manifest, {"family": "llada"}, "the target's")
    with pytest.raises(UserError, match=r"noise is .*'draws': 3.*'draws': 4"):
        require_match(manifest, {"noise": noise_record(NoiseSettings(draws=4))}, "the recipe's")
    with pytest.raises(UserError, match="schema_version is None"):
        SignalSource("/nowhere", {})


def test_ragged_signals_are_padded_when_concatenated() -> None:
    parts = [ReferenceSignals.from_logits(torch.randn(3, 16), k) for k in (2, 5)]
    joined = ReferenceSignals.cat(parts)
    assert joined.topk_logprobs[0, 2:].tolist() == [-math.inf] * 3
