"""Training rows: one order for all readers, bounded memory, rows independent of their neighbours, the signal cache."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rcd_core import UserError, load_model
from rcd_core.noise import NoiseSettings, hash_key, mask_example, mask_examples, uniforms
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import Chunks, ExampleSource, Limits
from rcd_core.training.data.rows import RowOrder, TrainingRow
from rcd_core.training.data.signal_cache import SignalSource, noise_record, require_match
from rcd_core.training.data.signal_format import SCHEMA_VERSION, SignalGroup, encode, parquet_options, schema
from rcd_core.training.objective import loss_sum, normalizer, reference_signals
from rcd_core.training.settings import SignalRule

GOLDEN = Path(__file__).parents[2] / "golden"
BLOCK = 4
IDS = pa.list_(pa.int32())
NOISE = NoiseSettings(draws=3)


def example(i: int) -> dict[str, Any]:
    ids = np.random.default_rng(i).integers(0, 500, BLOCK * (2 + i % 4)).tolist()
    return {"example_id": f"{i:04d}", "input_ids": ids, "labels": [-100] * BLOCK + ids[BLOCK:]}


def write(path: Path, examples: list[dict[str, Any]], per_group: int, kind: Any = IDS) -> str:
    fields = pa.schema({"example_id": pa.string(), "input_ids": kind, "labels": kind})
    pq.write_table(pa.Table.from_pylist(examples, schema=fields), path, row_group_size=per_group)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """50 + 37 examples in chunks of 16."""
    return [
        write(tmp_path / "a.parquet", [example(i) for i in range(50)], 16),
        write(tmp_path / "b.parquet", [example(i) for i in range(50, 87)], 16),
    ]


# -- order


def test_every_draw_visits_each_example_once_chunk_by_chunk() -> None:
    order = RowOrder([16, 16, 16, 2, 16, 16, 5], NOISE)
    located = [order.locate(g) for g in range(3 * 87)]
    for draw in range(3):
        epoch = located[draw * 87 : (draw + 1) * 87]
        assert {d for *_, d in epoch} == {draw}
        assert Counter((c, e) for c, e, _ in epoch) == Counter(
            (c, e) for c, rows in enumerate(order.chunk_rows) for e in range(rows)
        )
        changes = sum(a[0] != b[0] for a, b in zip(epoch, epoch[1:], strict=False))
        assert changes == 6, "chunks are read one after another"
    assert len({tuple(located[d * 87 : (d + 1) * 87]) for d in range(3)}) == 3
    by_draw = [[e for c, e, _ in located[d * 87 : (d + 1) * 87] if c == 0] for d in range(3)]
    assert by_draw[0] != by_draw[1] != by_draw[2], "each draw has its own order inside a chunk"


def test_order_is_a_pure_function_of_the_row_number() -> None:
    """The same rows from the end, in strides, or one by one; epoch e uses draw e mod draws."""
    rows = [16, 16, 5]
    first, last = RowOrder(rows, NOISE), RowOrder(rows, NOISE)
    forward = [first.locate(g) for g in range(200)]
    assert [last.locate(g) for g in reversed(range(200))] == forward[::-1]
    assert [RowOrder(rows, NOISE).locate(g) for g in range(1, 200, 50)] == forward[1::50]
    assert forward[: 200 - 3 * 37] == forward[3 * 37 :]
    assert [RowOrder(rows, NoiseSettings(draws=3, seed=1)).locate(g) for g in range(200)] != forward


# -- examples


def test_chunks_from_the_manifest_and_from_the_files_are_the_same(files: list[str]) -> None:
    manifest = {"file": [0, 0, 0, 0, 1, 1, 1], "rows": [16, 16, 16, 2, 16, 16, 5]}
    assert Chunks.from_manifest(manifest) == Chunks.of_files(files)
    with pytest.raises(UserError, match=r"b\.parquet: row group 2 .* 5 .* 6"):
        ExampleSource(files, NOISE, Chunks.from_manifest({**manifest, "rows": [16, 16, 16, 2, 16, 16, 6]}))._chunk(6)


def test_a_reader_holds_two_chunks(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = pq.ParquetFile.read_row_group
    counted = lambda self, g, **more: read.append(g) or real(self, g, **more)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    source = ExampleSource(files, NOISE)
    rows = [source.row(g) for g in range(87)]
    assert len(read) == 7, "read in order, each chunk is read once"
    assert source._chunk.cache_info().currsize == 2
    ids = {r.example_id: r.input_ids.tolist() for r in rows}
    assert ids == {example(i)["example_id"]: example(i)["input_ids"] for i in range(87)}


def test_masks_do_not_depend_on_other_rows(files: list[str], tmp_path: Path) -> None:
    """An example has the same masks in another file, order and chunk, and those of mask_example."""
    alone = ExampleSource([write(tmp_path / "c.parquet", [example(60)], 16)], NOISE)
    source = ExampleSource(files, NOISE)
    among_others = {(r.example_id, r.draw): r for r in map(source.row, range(3 * 87))}
    for row in map(alone.row, range(3)):
        masked, p = mask_example(row.labels != -100, row.example_id, row.draw, NOISE)
        for same in (row, among_others[row.example_id, row.draw]):
            assert np.array_equal(same.masked, masked) and np.array_equal(same.p, p)
    maskable = np.array([False, True, False])
    drawn = [mask_example(maskable, "x", d, NoiseSettings(eps=0.0)) for d in range(200)]
    assert all(masked.tolist() == [False, True, False] for masked, _ in drawn), "never empty, never beyond the labels"


@pytest.mark.parametrize("block_length", [None, 3])
def test_mask_examples_equals_mask_example(block_length: int | None) -> None:
    """To the bit, including redraws of empty masks and examples without a maskable token."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 12, 300), [0, 3]])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    maskable = rng.random(offsets[-1]) < 0.4
    maskable[offsets[-2] :] = False
    names, settings = [f"x{i}" for i in range(len(lengths))], NoiseSettings(seed=3, eps=0.0, block_length=block_length)
    masked, p = mask_examples(maskable, offsets, names, 1, settings)
    redrawn = 0
    for i, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if maskable[first:last].any():
            expected, q = mask_example(maskable[first:last], names[i], 1, settings)
            assert np.array_equal(masked[first:last], expected) and np.array_equal(p[first:last], q)
            u = uniforms(hash_key(3, 1, names[i], 0), int(last - first) + 1)
            redrawn += not ((u[1:] < u[0]) & maskable[first:last]).any()
        else:
            assert not masked[first:last].any()
    assert redrawn > 20 or block_length, "some masks were redrawn"


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": [], "labels": []}, "empty"),
    ({"input_ids": None}, "empty"),
    ({"labels": [-100] * 12}, "no labelled token"),
    ({"labels": [1, 2]}, "not one label per token"),
    ({"input_ids": [1] * 11 + [512]}, "id outside the vocabulary"),
    ({"input_ids": [1] * 11 + [-5]}, "id outside the vocabulary"),
    ({"labels": [-100] * 11 + [9999]}, "id outside the vocabulary"),
    ({"input_ids": [1] * 11 + [None]}, "id outside the vocabulary"),
    ({"input_ids": [1] * 1028, "labels": [1] * 1028}, "too long for the model's positions"),
    ({"example_id": None}, "no example id"),
]


@pytest.mark.parametrize(("change", "reason"), UNUSABLE, ids=[f"{i}-{r}" for i, (_, r) in enumerate(UNUSABLE)])
def test_unusable_examples_keep_their_place_and_the_reason(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    examples = [example(2), {**example(1), **change}, example(3)]
    path = write(tmp_path / "p.parquet", examples, 16)
    rows = [ExampleSource([path], NOISE, limits=Limits(512, 1024)).row(g) for g in range(3)]
    assert Counter(r.reason for r in rows) == {"": 2, reason: 1}
    bad = next(r for r in rows if r.reason)
    assert len(bad.input_ids) == 0 and not bad.masked.any()
    if reason in ("empty", "no labelled token"):
        with pytest.raises(UserError, match=rf"'0001' cannot be trained on: {reason}"):
            [ExampleSource([path], NOISE).row(g) for g in range(3)]


def test_columns_of_another_type_reject_their_rows(tmp_path: Path) -> None:
    def first_row(name: str, change: dict[str, Any], kind: Any) -> TrainingRow:
        path = write(tmp_path / name, [{**example(1), **change}], 16, kind)
        return ExampleSource([path], NOISE, limits=Limits(512, 1024)).row(0)

    assert first_row("text", {"input_ids": ["x"], "labels": ["y"]}, pa.list_(pa.string())).reason == "wrong type"
    assert first_row("half", {"input_ids": [1.5], "labels": [1]}, pa.list_(pa.float32())).reason == "wrong type"
    assert first_row("wide", {}, pa.large_list(pa.int64())).input_ids.tolist() == example(1)["input_ids"]
    with pytest.raises(UserError, match=r"gone\.parquet"):
        ExampleSource([str(tmp_path / "gone.parquet")], NOISE)


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_a_rejected_row_contributes_nothing(family: str, files: list[str]) -> None:
    """Loss, gradients and normaliser of a batch are those of its other rows."""
    good = [ExampleSource(files, NOISE).row(g) for g in range(3)]
    bad = TrainingRow.rejected(3, "bad", 0, "empty")
    for weight in ("uniform", "inverse_t"):
        clean, mixed = (step(family, rows, weight) for rows in (good, [good[0], bad, *good[1:]]))
        for a, b in zip(clean, mixed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_a_batch_of_rejected_rows_contributes_nothing(family: str) -> None:
    """Every parameter still gets a zero gradient, because data parallelism waits for each of them."""
    loss, norm, *gradients = step(family, [TrainingRow.rejected(0, "bad", 0, "empty")], "inverse_t")
    assert loss == 0 and norm == 0 and gradients and not any(g.any() for g in gradients)


def step(family: str, rows: list[TrainingRow], weight: Any) -> list[torch.Tensor]:
    """[loss, normaliser, gradients ...] of one batch."""
    model = load_model(GOLDEN / f"{family}_tiny")
    batch, _ = collate(rows, mask_token_id=model.mask_token_id, pad_token_id=500, block_length=BLOCK)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = loss_sum(model, batch, None, weight)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None for g in gradients)
    return [loss.detach(), normalizer(batch, family, weight), *gradients]


# -- signals on disk


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
