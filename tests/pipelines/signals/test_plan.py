"""The plan of the signal shards: which rows a shard, a group and a batch hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.recipe.load import load_recipe
from pipelines.signals.plan import GROUP_BATCHES, groups, plan_batches, plan_shards, planned_rows, predicted_bytes
from rcd_core.training.data.rows import RowOrder, TrainingRow
from tests.pipelines.signal_run import make_recipe


def test_the_plan_depends_on_the_recipe_and_the_manifest_only(tmp_path: Path) -> None:
    """Without any files: equal shards of about the given size, with all rows."""
    recipe = make_recipe(tmp_path, train={"steps": 500, "batch_size": 8})
    rows = [1024] * 40 + [100]
    prepare = {"vocab_size": 151_643, "chunks": {"rows": rows, "tokens": [r * 800 for r in rows]}}
    prepare["chunks"]["labelled"] = [r * 500 for r in rows]
    one = predicted_bytes(1, 800, 500, vocab_size=151_643, top_k=8)
    for shard_mb in (1, 7.5, 1000):
        sized = recipe.model_copy(update={"signals": recipe.signals.model_copy(update={"shard_mb": shard_mb})})
        offsets = plan_shards(sized, prepare)
        assert offsets[0] == 0 and offsets[-1] == 4000 == planned_rows(recipe, sum(rows))
        sizes = np.diff(offsets)
        assert len(sizes) == -(-4000 * one // int(shard_mb * 1e6)), "as few as the size allows"
        assert sizes.min() >= sizes.max() - 1
        assert plan_shards(sized, prepare) == offsets


def test_shards_of_uneven_chunks_have_the_same_size(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train={"steps": 500, "batch_size": 4}, signals={"shard_mb": 0.05})
    rows = [100] * 10
    tokens = [100 * 8 * (1 + i) for i in range(10)]
    prepare = {"vocab_size": 512, "chunks": {"rows": rows, "tokens": tokens, "labelled": tokens}}
    offsets = plan_shards(recipe, prepare)
    order = RowOrder(rows, recipe.noise)
    weight = [predicted_bytes(1, t // 100, t // 100, vocab_size=512, top_k=8) for t in tokens]
    sizes = [sum(weight[order.locate(g)[0]] for g in range(a, b)) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert max(sizes) <= 0.05e6 + max(weight) and max(sizes) - min(sizes) <= 2 * max(weight)
    assert max(np.diff(offsets)) > 2 * min(np.diff(offsets)), "unequal numbers of rows"


def test_draws_are_independent_of_epochs(tmp_path: Path) -> None:
    """At most examples x draws rows, however long the targets train; a variant adds none."""
    assert planned_rows(make_recipe(tmp_path, train={"steps": 1000}), 60) == 3 * 60
    assert planned_rows(make_recipe(tmp_path, train={"steps": 10}, variants={"other": {}}), 60) == 40


def test_batches_respect_their_budget_and_sort_by_length() -> None:
    lengths = [40, 8, 16, 40, 8, 100, 12]
    batches = plan_batches(lengths, 48)
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 48 for b in batches)
    assert batches[0] == [1, 4, 6] and batches[-1] == [5], "a row above the budget is alone"
    none = np.zeros(0)
    rows = [TrainingRow(i, "", 0, np.zeros(n), none, none, np.ones(n)) for i, n in enumerate([30] * 40)]
    grouped = list(groups(rows, 48))
    assert [r.index for g in grouped for r in g] == list(range(40))
    assert all(sum(len(r.input_ids) for r in g) <= GROUP_BATCHES * 48 for g in grouped)


def test_the_demo_has_shards_for_both_its_actors() -> None:
    demo = load_recipe("sudoku-reference")
    rows = [1024] * 32
    chunks = {"rows": rows, "tokens": [37 * r for r in rows], "labelled": [24 * r for r in rows]}
    offsets = plan_shards(demo, {"vocab_size": 271, "chunks": chunks})
    assert (len(offsets) - 1) % demo.resources.signal_actors == 0 and 4 <= len(offsets) - 1 <= 20
