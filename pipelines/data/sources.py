"""The rows behind a recipe's section `data`: files, hub data sets, or a task's generator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow.parquet as pq

from pipelines.recipe.model import Recipe
from pipelines.recipe.rules import SYNTHETIC, source_list
from pipelines.run.directory import StageContext
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import SPLITS, get_task
from rcd_core.tasks.rows import Row, check_columns, read_rows, spellings

_HUB = re.compile(r"hf://(?P<name>[^@:]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """One file of rows. label: its name in the recipe. path: the file to read."""

    label: str
    path: str


def check_sources(recipe: Recipe) -> None:
    """Raise UserError unless every source is readable and has the mapped columns. Reads the first rows only."""
    for split in splits_of(recipe):
        names, columns = _names(recipe, split), columns_of(recipe, split)
        if SYNTHETIC in names:
            if len(names) > 1:
                raise UserError(f"data.{split} mixes 'synthetic' with files; give one or the other")
            get_task(recipe.data.task_of(split)).synthetic(0, split, recipe.seed)
            continue
        for name in names:
            if name.startswith("hf://"):
                _datasets(f"data.{split}")
            else:
                check_columns(name, columns, f"data.{split}")


def columns_of(recipe: Recipe, split: str) -> dict[str, str]:
    """Field of the task -> column of the data set."""
    data = recipe.data
    task, mapping, key = get_task(data.task_of(split)), data.fields, "data.fields"
    if split == "test" and (data.test_fields is not None or data.test_task is not None):
        mapping, key = data.test_fields or {}, "data.test_fields"  # another task has its own fields
    for field in mapping:
        if field not in task.fields:
            raise UserError(f"{key}.{field}: task {task.name!r} has no such field; it has {', '.join(task.fields)}")
    return {field: mapping.get(field, field) for field in task.fields}


def splits_of(recipe: Recipe) -> tuple[str, ...]:
    """The splits of a recipe; one that trains nothing may have test examples only."""
    return SPLITS if recipe.data.train is not None else ("test",)


def _names(recipe: Recipe, split: str) -> list[str]:
    return source_list(recipe.data.train if split == "train" else recipe.data.test)


def row_limit(recipe: Recipe, split: str) -> int | None:
    """Most rows to read of a split; None reads all."""
    return recipe.data.num_train if split == "train" else recipe.data.num_test


def local_sources(ctx: StageContext, split: str) -> list[Source]:
    """The files of a split, after downloading hub data sets; none for synthetic data."""
    columns = columns_of(ctx.recipe, split)
    sources = []
    for i, name in enumerate(_names(ctx.recipe, split)):
        if name.startswith("hf://"):
            path = storage.join(ctx.directory, "sources", f"{split}-{i}.parquet")
            with ctx.console.status(f"prepare: downloading {name}"):
                _download(name, split, path, columns, row_limit(ctx.recipe, split))
            sources.append(Source(name, path))
        elif name != SYNTHETIC:
            sources.append(Source(name, name))
    return sources


def training_texts(recipe: Recipe, sources: list[Source], most: int) -> Iterator[str]:
    """Texts of the first `most` training rows in order, so that the same recipe trains the same tokenizer."""
    task = get_task(recipe.data.task)
    most = min(row_limit(recipe, "train") or most, most)
    if sources:
        columns = columns_of(recipe, "train")
        rows: Iterable[Row] = chain.from_iterable(read_rows(source.path, columns) for source in sources)
    else:
        rows = (Row(i, values=task.synthetic(i, "train", recipe.seed)) for i in range(most))
    for row in islice(rows, most):
        with suppress(UserError):  # bad rows are counted when they are encoded
            problem = task.problem(row.values) if row.values else None
            if problem:
                yield problem.response
                if not task.infill:  # an infilling prompt is its response with holes
                    yield problem.prompt


def _datasets(key: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{key} names a hub data set, and the package 'datasets' is not installed; "
            "pip install datasets (the extra `hub`), or give a .jsonl or .parquet file"
        ) from error
    return datasets


def _download(name: str, split: str, path: str, columns: dict[str, str], limit: int | None) -> None:
    """Copy the mapped columns of hf://owner/name[@config][:split] into one Parquet file that all workers can read."""
    key = f"data.{split}"
    match = _HUB.fullmatch(name)
    if match is None:
        raise UserError(f"{key} is {name!r}; use the form hf://owner/name[@config][:split]")
    try:
        data = _datasets(key).load_dataset(match["name"], match["config"], split=match["split"] or split)
    except Exception as error:  # the hub client has no common base class for its errors
        raise UserError(f"{key}: {name} did not load from the hub: {error}") from error
    missing = [column for column in columns.values() if not set(spellings(column)) & set(data.column_names)]
    if missing:
        raise UserError(
            f"{key}: {name} has no column {missing[0]!r}; it has {', '.join(data.column_names)}; set data.fields"
        )
    present = [next(name for name in spellings(column) if name in data.column_names) for column in columns.values()]
    data = data.select_columns(present).with_format("arrow")
    data = data.select(range(min(limit or len(data), len(data))))
    with storage.open_output(path) as stream, pq.ParquetWriter(stream, data.features.arrow_schema) as writer:
        for batch in data.iter(batch_size=_ROWS_AT_ONCE):
            writer.write_table(batch)
