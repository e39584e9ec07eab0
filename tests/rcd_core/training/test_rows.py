"""Training rows: one order for all readers, bounded memory, rows independent of their neighbours, the signal cache."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rcd_core import UserError, load_model
from rcd_core.noise import NoiseSettings, hash_key, mask_example, mask_examples, nested_masks, uniforms
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import Chunks, ExampleSource, Limits
from rcd_core.training.data.rows import RowOrder, TrainingRow
from rcd_core.training.objective import loss_sum, normalizer
from tests.rcd_core.training.example_files import BLOCK, NOISE, example, write

GOLDEN = Path(__file__).parents[2] / "golden"
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


def test_a_chunk_is_read_again_after_a_stale_handle(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ExampleSource(files, NOISE).row(0)
    source, read, calls = ExampleSource(files, NOISE), pq.ParquetFile.read_row_group, []

    def first_stale(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(*arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", first_stale)
    assert source.row(0).input_ids.tolist() == expected.input_ids.tolist() and len(calls) == 2


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
def test_complementary_draws_cover_every_label_once(block_length: int | None) -> None:
    """With the probabilities that belong to them; an example with one label masks it twice."""
    settings = NoiseSettings(block_length=block_length, complementary=True)
    rng = np.random.default_rng(1)
    for number in range(200):
        maskable = rng.random(int(rng.integers(1, 12))) < 0.4
        if not maskable.any():
            continue
        (first, p), (second, q) = (mask_example(maskable, str(number), draw, settings) for draw in (2, 3))
        assert first.any() and second.any()
        if maskable.sum() == 1:
            assert np.array_equal(first, maskable) and np.array_equal(second, maskable)
            continue
        assert np.array_equal(first ^ second, maskable) and not (first & second).any()
        np.testing.assert_allclose(p + q, 1.0, atol=1e-3)
        near, full = nested_masks(maskable, str(number), 3, settings, [0.1, 1.0])
        assert not (second & ~near).any() and np.array_equal(full, maskable)
    for changes in ({"draws": 3}, {"layout": "multi_block", "block_length": 4}):
        with pytest.raises(UserError, match=r"noise\.complementary"):
            NoiseSettings(complementary=True, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [1, 3])
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("block_length", [None, 3])
def test_mask_examples_equals_mask_example(block_length: int | None, complementary: bool, draw: int) -> None:
    """To the bit, including redraws of empty masks and examples without a maskable token."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 12, 300), [0, 3]])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    maskable = rng.random(offsets[-1]) < 0.4
    maskable[offsets[-2] :] = False
    names = [f"x{i}" for i in range(len(lengths))]
    settings = NoiseSettings(seed=3, eps=0.0, block_length=block_length, complementary=complementary)
    masked, p = mask_examples(maskable, offsets, names, draw, settings)
    redrawn = 0
    for i, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if maskable[first:last].any():
            expected, q = mask_example(maskable[first:last], names[i], draw, settings)
            assert np.array_equal(masked[first:last], expected) and np.array_equal(p[first:last], q)
            u = uniforms(hash_key(3, draw - complementary, names[i], 0), int(last - first) + 1)
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
