"""Rows of files or of a generator as tokenised examples: tasks of Ray Data, one per file."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipelines.data.sources import Source, row_limit, rows_of
from pipelines.recipe.model import Recipe
from pipelines.recipe.sources import SYNTHETIC
from pipelines.run.directory import StageContext
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.retries import be_patient
from rcd_core.tasks import get_task
from rcd_core.tasks.files import BadRow
from rcd_core.tasks.rows import Row
from rcd_core.text.encoding import Encoder
from rcd_core.text.tokenizer import load_tokenizer

ROWS_PER_FILE = 4096
ROWS_PER_BATCH = 512

_IDS = pa.list_(pa.int32())
SCHEMAS = {
    "train": pa.schema(
        {"example_id": pa.string(), "input_ids": _IDS, "labels": _IDS, "prompt_length": pa.int32()},
    ),
    "test": pa.schema({"example_id": pa.string(), "prompt_ids": _IDS, "prompt": pa.string(), "answer": pa.string()}),
}
ORIGIN = pa.schema({"source": pa.string(), "row": pa.int64(), "reason": pa.string(), "detail": pa.string()})
_ROWS = pa.unify_schemas([ORIGIN, pa.schema({"values": pa.list_(pa.string()), "conversation": pa.string()})])


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows become examples. Hashable, so that a worker caches its tokenizer."""

    task: str
    split: str
    tokenizer: str
    pad_multiple: int
    max_length: int
    min_length: int | None
    all_turns: bool

    @property
    def schema(self) -> pa.Schema:
        return pa.unify_schemas([SCHEMAS[self.split], ORIGIN])


def encode(ctx: StageContext, split: str, sources: list[Source], tokenizer: str) -> ray.data.Dataset:
    """Rows that are an example, or have a `reason` why not. tokenizer: its directory."""
    recipe, limit = ctx.recipe, row_limit(ctx.recipe, split)
    read: Any
    if not sources:
        limit = limit or 0  # rules.py requires a number for synthetic data
        read = partial(_synthetic_rows, task=recipe.data.task_of(split), split=split, seed=recipe.seed)
        rows = ray.data.range(limit, override_num_blocks=-(-limit // ROWS_PER_FILE))
        rows = rows.map_batches(read, batch_size=ROWS_PER_BATCH, batch_format="pyarrow")
    else:
        # With a limit one task reads the first rows; without one, each file has its own task.
        groups = [sources] if limit else [[source] for source in sources]
        read = partial(_file_rows, groups=groups, recipe=recipe, split=split, limit=limit)
        rows = ray.data.range(len(groups), override_num_blocks=len(groups))
        rows = rows.map_batches(read, batch_size=1, batch_format="pyarrow")
        rows = rows.repartition(target_num_rows_per_block=ROWS_PER_FILE)
    encoding = Encoding(
        task=recipe.data.task_of(split),
        split=split,
        tokenizer=tokenizer,
        pad_multiple=recipe.data.pad_multiple or recipe.block_length,
        max_length=recipe.data.max_length,
        min_length=recipe.data.min_length,
        all_turns=recipe.data.turns == "all",
    )
    return rows.map_batches(
        partial(_encode_batch, encoding=encoding), batch_size=ROWS_PER_BATCH, batch_format="pyarrow"
    )


def _synthetic_rows(indices: pa.Table, task: str, split: str, seed: int) -> pa.Table:
    generator = get_task(task)
    return _row_table(
        (SYNTHETIC, Row(i, values=generator.synthetic(i, split, seed))) for i in indices["id"].to_pylist()
    )


def _file_rows(
    index: pa.Table, groups: list[list[Source]], recipe: Recipe, split: str, limit: int | None
) -> Iterator[pa.Table]:
    be_patient()
    sources = groups[index["id"][0].as_py()]
    for path in (source.path for source in sources if not storage.is_uri(source.path)):
        if not storage.exists(path):
            raise UserError(
                f"data file {path} does not exist on node {platform.node()}, but the driver can read it; put it where "
                "every node reads it: a shared disk, s3:// or gs://"
            )
    labelled = ((source.label, row) for source in sources for row in rows_of(recipe, split, source.path))
    rows = islice(labelled, limit)
    while batch := list(islice(rows, ROWS_PER_FILE)):
        yield _row_table(batch)


def _row_table(rows: Iterable[tuple[str, Row]]) -> pa.Table:
    records = []
    for source, row in rows:
        record: dict[str, Any] = {"source": source, "row": row.number}
        if row.values is not None:
            record["values"] = list(row.values.values())
        elif row.conversation is not None:
            record["conversation"] = json.dumps(row.conversation)
        elif row.bad is not None:
            record |= {"reason": row.bad.reason, "detail": row.bad.detail}
        records.append(record)
    return pa.Table.from_pylist(records, schema=_ROWS)


@lru_cache(maxsize=2)
def _encoder(encoding: Encoding) -> Encoder:
    tokenizer = load_tokenizer(encoding.tokenizer)
    lengths = encoding.pad_multiple, encoding.max_length, encoding.min_length
    return Encoder(get_task(encoding.task), tokenizer, *lengths, encoding.all_turns)


def _encode_batch(rows: pa.Table, encoding: Encoding) -> pa.Table:
    encoder = _encoder(encoding)
    records = rows.to_pylist()
    for record in records:
        if record["reason"] is None:
            try:
                record |= _example(encoder, encoding.split, record)
            except BadRow as bad:
                record |= {"reason": bad.reason, "detail": bad.detail}
    return pa.Table.from_pylist(records, schema=encoding.schema)


def _example(encoder: Encoder, split: str, record: dict[str, Any]) -> dict[str, Any]:
    if record["conversation"] is not None:
        row = Row(record["row"], conversation=json.loads(record["conversation"]))
    else:
        row = Row(record["row"], values=dict(zip(encoder.task.fields, record["values"], strict=True)))
    name, example = encoder.train_row(row) if split == "train" else encoder.test_row(row)
    columns = {field.name: getattr(example, field.name) for field in fields(example)}  # asdict copies each token id
    return {"example_id": f"{row.number:08d}" if record["source"] == SYNTHETIC else name, **columns}
