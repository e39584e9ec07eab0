"""A small prepared run for the tests of the stage `signals`, its context, and readers of its results."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, StageContext, key_material
from pipelines.run.stages import stages_of
from rcd_core.training.data.examples import ExampleSource

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK = 4


def make_recipe(tmp_path: Path, **changes: Any) -> Recipe:
    train = {"steps": 30, "batch_size": 4, "learning_rate": 1e-3, **changes.pop("train", {})}
    raw = {
        "name": changes.pop("name", "run"),
        "storage": str(tmp_path),
        "block_length": BLOCK,
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 60, "num_test": 1},
        "noise": {"draws": 3},
        "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "reference": {"start": str(GOLDEN / "rcd" / "sdar_ref_tiny"), "train": None},
        "target": {"start": str(GOLDEN / "sdar_tiny"), "train": train},
        "signals": {"top_k": 8, "keep_mass": None, "shard_mb": 0.003, "batch_tokens": 64, **changes.pop("signals", {})},
        "resources": {"signal_actors": 2, **changes.pop("resources", {})},
        **changes,
    }
    return parse_recipe(raw)


def prepare_run(recipe: Recipe, poison: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda i, e: e) -> None:
    """A run with 60 examples in two files, chunks of 16, and a checkpoint as its reference. poison changes examples."""
    run = RunDirectory(recipe.run_directory)
    Path(str(recipe.tokenizer.path)).mkdir()
    Path(str(recipe.tokenizer.path), "tokenizer_config.json").write_text("{}")
    stages = {name: key_material(stages_of(recipe)[name], recipe, {}) for name in ("prepare", "reference")}
    for name, material in stages.items():
        run.begin(name, material)
    directory = Path(run.stage_directory("prepare")) / "train"
    directory.mkdir()
    examples = []
    for i in range(60):
        ids = np.random.default_rng(i).integers(0, 500, BLOCK * (2 + i % 5)).tolist()
        examples.append(poison(i, {"example_id": f"{i:04d}", "input_ids": ids, "labels": [-100] * BLOCK + ids[BLOCK:]}))
    chunks: dict[str, list[int]] = {name: [] for name in ("file", "rows", "tokens", "labelled")}
    fields = pa.schema({"example_id": pa.string(), "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
    for number, part in enumerate((examples[:40], examples[40:])):
        pq.write_table(pa.Table.from_pylist(part, fields), directory / f"part-{number}.parquet", row_group_size=16)
        for chunk in (part[i : i + 16] for i in range(0, len(part), 16)):
            tokens = sum(len(e["input_ids"] or ()) for e in chunk)
            for name, value in (("file", number), ("rows", len(chunk)), ("tokens", tokens), ("labelled", tokens // 2)):
                chunks[name].append(value)
    summary = {
        "train": ["part-0.parquet", "part-1.parquet"],
        "chunks": chunks,
        "vocab_size": 512,
        "mask_token_id": 511,
        "tokenizer_sha256": "0" * 64,
    }
    contents = {"prepare": summary, "reference": {"checkpoint": recipe.reference.start}}
    for name, material in stages.items():
        run.finish(name, material, contents[name], datetime.now(), 0.0)


def context(recipe: Recipe, stage: str = "signals") -> StageContext:
    return StageContext(
        recipe=recipe,
        run=RunDirectory(recipe.run_directory),
        stage=stage,
        key="k",
        inputs=stages_of(recipe)[stage].inputs,
        console=Console(file=io.StringIO(), width=200),
    )


def printed(ctx: StageContext) -> str:
    text: str = ctx.console.file.getvalue()  # type: ignore[attr-defined]
    return text


@dataclass
class Result:
    ctx: StageContext
    summary: dict[str, Any]
    shards: dict[str, bytes]


def shards_of(ctx: StageContext) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(ctx.directory).glob("shard-*.parquet"))}


def check_rows(ctx: StageContext, summary: dict[str, Any]) -> None:
    """Asserts that each planned row occurs once, with its example, noise and signals."""
    directory = Path(ctx.directory)
    tables = [pq.read_table(directory / name) for name in summary["shards"]]
    assert [len(t) for t in tables] == np.diff(summary["row_offsets"]).tolist()
    rows = [row for table in tables for row in table.to_pylist()]
    prepare = Path(ctx.run.stage_directory("prepare")) / "train"
    source = ExampleSource([str(prepare / f"part-{i}.parquet") for i in (0, 1)], ctx.recipe.noise)
    for g, row in enumerate(rows):
        expected = source.row(g)
        assert (row["example_id"], row["draw"]) == (expected.example_id, expected.draw)
        assert row["input_ids"] == expected.input_ids.tolist() and row["labels"] == expected.labels.tolist()
        assert row["masked_positions"] == np.flatnonzero(expected.masked).tolist()
        assert len(row["entropy"]) == len(row["tail_mass"]) == len(row["masked_positions"])
        assert len(row["topk_ids"]) == len(row["topk_logprobs"]) == 8 * len(row["masked_positions"])
    assert len({(r["example_id"], r["draw"]) for r in rows}) == len(rows) == summary["rows"] == 120
