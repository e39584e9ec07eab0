"""Stage prepare: rows of a data set -> tokenised examples in Parquet, and their tokenizer.

    python pipelines/prepare.py --recipe demo

Ray Data reads and tokenises in parallel. The result is sorted by example id and split into files of a fixed number of
rows, so it does not depend on the cluster or the layout of blocks. Bad rows, for example those above data.max_length,
are counted by reason and listed in bad.parquet; more than data.max_bad_rows of them fail the stage. Rows below
data.min_length are dropped and counted separately.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the slow imports: the driver imports this file again when its stage runs
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipelines/, whose file names are too common
    from pipelines.run.driver import stage_main

    stage_main("prepare")

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from pipelines.data.examples import ORIGIN, ROWS_PER_FILE, SCHEMAS, encode
from pipelines.data.ordering import collect, in_order
from pipelines.data.sources import (
    Source,
    check_sources,
    keys_of_task,
    source_files,
    splits_of,
    training_texts,
)
from pipelines.recipe.model import Recipe
from pipelines.recipe.sources import SYNTHETIC, source_list
from pipelines.run.directory import StageContext
from pipelines.run.progress import Countdown, StillWorking
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import SPLITS, get_task
from rcd_core.text.encoding import TOO_SHORT, UNLABELLED, Encoder
from rcd_core.text.tokenizer import add_mask_token, load_tokenizer, mask_token_id, tokenizer_sha256, train_tokenizer

VALIDATION = "validation"  # directory of the held-out training examples
ROWS_PER_GROUP = 1024  # a chunk: training shuffles and loads one at a time
TOKENIZER_ROWS = 10_000  # good rows that the tokenizer is trained on


def run(ctx: StageContext) -> dict[str, Any]:
    """Write train/, validation/, test/, tokenizer/ and bad.parquet. Returns file names in order, counts and digests."""
    check_sources(ctx.recipe)
    if shared := sorted({*source_list(ctx.recipe.data.train)} & {*source_list(ctx.recipe.data.test)} - {SYNTHETIC}):
        text = f"data.train and data.test both have {shared[0]}: models are tested on their training examples"
        ctx.console.print(f"  warning: {text}", markup=False, soft_wrap=True)
    for split in SPLITS:
        storage.remove(storage.join(ctx.directory, split))
    storage.remove(storage.join(ctx.directory, VALIDATION))
    sources = {split: source_files(ctx.recipe, split) for split in splits_of(ctx.recipe)}
    tokenizer = _save_tokenizer(ctx, sources.get("train", []))
    for split in sources:  # raises for a tokenizer that no row can use, here instead of in a worker
        Encoder(get_task(ctx.recipe.data.task_of(split)), tokenizer, 1, 1)
    encoded = {}
    for split in sources:
        with StillWorking(ctx.console, f"prepare: tokenising the {split} rows"):
            directory = storage.join(ctx.directory, "tokenizer")
            encoded[split] = encode(ctx, split, sources[split], directory).materialize()
    counts = _write_bad_rows(ctx, encoded)
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    held_out: list[str] = []
    chunks: dict[str, list[int]] = {name: [] for name in ("file", "rows", "tokens", "labelled")}
    fingerprint = hashlib.sha256(tokenizer_sha256(tokenizer).encode())
    for split in sources:
        countdown = Countdown(ctx.console, f"prepare: writing the {split} examples", counts[split]["rows"], "rows")
        files[split], counted = _write(ctx, split, encoded[split], fingerprint, chunks, held_out, countdown)
        counts[split] |= counted
    fingerprint.update(str(chunks["rows"]).encode())  # the order of training rows depends on them
    return {
        **files,
        VALIDATION: held_out,
        "counts": counts,
        "chunks": chunks,
        "vocab_size": len(tokenizer),
        "mask_token_id": mask_token_id(tokenizer),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "fingerprint": fingerprint.hexdigest(),
    }


def run_task(ctx: StageContext) -> dict[str, Any]:
    """Stage prepare-NAME: the test problems of an entry of evaluate.tasks, with the run's tokenizer. Writes test/ and
    bad.parquet, and returns the same as `run` for the split test."""
    name = ctx.stage.removeprefix("prepare-")
    recipe = ctx.recipe.for_task(name)
    ctx = replace(ctx, recipe=recipe)
    with keys_of_task(name):
        check_sources(recipe)
        storage.remove(storage.join(ctx.directory, "test"))
        directory = storage.join(ctx.input_dir("prepare"), "tokenizer")
        Encoder(get_task(recipe.data.task_of("test")), load_tokenizer(directory), 1, 1)
        with StillWorking(ctx.console, f"{ctx.stage}: tokenising the rows"):
            encoded = {"test": encode(ctx, "test", source_files(recipe, "test"), directory).materialize()}
        counts, fingerprint = _write_bad_rows(ctx, encoded), hashlib.sha256()
        countdown = Countdown(ctx.console, f"{ctx.stage}: writing the problems", counts["test"]["rows"], "rows")
        files, counted = _write(ctx, "test", encoded["test"], fingerprint, {}, [], countdown)
    counts["test"] |= counted
    return {"test": files, "counts": counts, "fingerprint": fingerprint.hexdigest()}


# -- tokenizer


def _save_tokenizer(ctx: StageContext, sources: list[Source]) -> Any:
    """Load or train the tokenizer, and write a copy to tokenizer/."""
    settings, source, convert = ctx.recipe.tokenizer, ctx.recipe.tokenizer_source, ctx.recipe.convert
    if source is not None:
        tokenizer = load_tokenizer(source)
        if convert:
            add_mask_token(tokenizer, convert.mask_token)
    else:
        with StillWorking(ctx.console, "prepare: training the tokenizer"):
            tokenizer = train_tokenizer(training_texts(ctx.recipe, sources, TOKENIZER_ROWS), settings.vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        storage.upload_dir(directory, storage.join(ctx.directory, "tokenizer"))
    return tokenizer


# -- results


def _write_bad_rows(ctx: StageContext, encoded: dict[str, ray.data.Dataset]) -> dict[str, dict[str, Any]]:
    """Write bad.parquet and count. Raises UserError when a split has too many bad rows, or no good one."""
    path = storage.join(ctx.directory, "bad.parquet")
    counts, tables, problems = {}, [], []
    for split, data in encoded.items():
        num_rows, unused = data.count(), collect(data, _unused, ORIGIN)
        short = pc.equal(unused["reason"], TOO_SHORT)
        bad = unused.filter(pc.invert(short)).sort_by([("source", "ascending"), ("row", "ascending")])
        reasons = dict(sorted(Counter(bad["reason"].to_pylist()).items()))
        counts[split] = {"rows": num_rows, "bad": reasons, "below_min_length": len(unused) - len(bad)}
        tables.append(bad.add_column(0, "split", pa.array([split] * len(bad), pa.string())))
        if len(bad) > ctx.recipe.data.max_bad_rows * num_rows:
            problems.append(_too_many(ctx.recipe, split, bad, reasons, num_rows))
        elif num_rows == len(unused):
            problems.append(f"data.{split}: no row is left of {num_rows}; {len(unused) - len(bad)} are {TOO_SHORT}")
    table = pa.concat_tables(tables)
    with storage.open_output(path) as stream:
        pq.write_table(table, stream)
    if problems:
        raise UserError("\n".join(problems) + f"\nall bad rows are listed in {path}")
    if len(table):
        ctx.console.print(f"prepare: skipped {len(table)} bad rows, listed in {path}", soft_wrap=True)
    return counts


def _too_many(recipe: Recipe, split: str, bad: pa.Table, reasons: dict[str, int], num_rows: int) -> str:
    first = [f"{b['source']}:{b['row']}: {b['reason']}: {b['detail']}" for b in bad.slice(0, 3).to_pylist()]
    return (
        f"data.{split}: {len(bad)} of {num_rows} rows cannot be used, more than data.max_bad_rows "
        f"({recipe.data.max_bad_rows:g}) allows: {', '.join(f'{n} x {reason}' for reason, n in reasons.items())}; "
        "fix them, or raise data.max_bad_rows to skip them. The first:\n  " + "\n  ".join(first)
    )


def _write(
    ctx: StageContext,
    split: str,
    encoded: ray.data.Dataset,
    fingerprint: Any,
    chunks: dict[str, list[int]],
    held_out: list[str],
    countdown: Countdown,
) -> tuple[list[str], dict[str, int]]:
    """Write files of ROWS_PER_FILE rows in the order of example ids. Returns file names and counts.

    Training examples that occur twice are written once. `chunks` gets an entry per row group of the training files:
    index of the file, rows, tokens, labelled tokens. The first data.num_validation training examples go to separate
    files, whose names `held_out` gets; their order by content hash makes them a random sample.
    """
    files: list[str] = []
    previous, copies, num_examples, num_duplicates = "", 0, 0, 0
    remaining = ctx.recipe.data.num_validation if split == "train" else 0
    for table in in_order(encoded, SCHEMAS[split], "example_id", ROWS_PER_FILE):
        countdown.add(len(table))
        ids, keep = [], []
        for example_id in table["example_id"].to_pylist():
            copies = copies + 1 if example_id == previous else 0
            previous = example_id
            num_duplicates += copies > 0
            keep.append(split == "test" or not copies)
            ids.append(f"{example_id}-{copies}" if copies else example_id)
        table = table.set_column(0, "example_id", pa.array(ids)).filter(pa.array(keep))
        if remaining:
            validation, table = table.slice(0, remaining), table.slice(remaining)
            remaining -= len(validation)
            held_out.append(_write_file(ctx, VALIDATION, len(held_out), validation))
            _digest(validation, fingerprint)
            if not len(table):
                continue
        files.append(_write_file(ctx, split, len(files), table))
        for start in range(0, len(table) if split == "train" else 0, ROWS_PER_GROUP):
            labels = pc.list_flatten(table.slice(start, ROWS_PER_GROUP)["labels"])
            chunks["file"].append(len(files) - 1)
            chunks["rows"].append(min(ROWS_PER_GROUP, len(table) - start))
            chunks["tokens"].append(len(labels))
            chunks["labelled"].append(pc.sum(pc.not_equal(labels, UNLABELLED)).as_py())
        num_examples += len(table)
        _digest(table, fingerprint)
    if not files and held_out:
        raise UserError(
            f"data.num_validation is {ctx.recipe.data.num_validation}, which leaves no training example; lower it"
        )
    return files, {"examples": num_examples, "duplicates": num_duplicates}


def _write_file(ctx: StageContext, directory: str, number: int, table: pa.Table) -> str:
    name = f"part-{number:05d}.parquet"
    with storage.open_output(storage.join(ctx.directory, directory, name)) as stream:
        options: Any = {"compression": "zstd", "row_group_size": ROWS_PER_GROUP, "write_page_checksum": True}
        pq.write_table(table, stream, **options)
    return name


def _unused(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.is_valid(rows["reason"])).select(ORIGIN.names)


def _digest(table: pa.Table, digest: Any) -> None:
    """Hash the content of a table, as the bytes of its file depend on the writer's version."""
    for column in table.columns:
        if pa.types.is_list(column.type):
            digest.update(pc.list_value_length(column).to_numpy().astype("<i4").tobytes())
            column = pc.list_flatten(column)
        if pa.types.is_string(column.type):
            digest.update("\0".join(column.to_pylist()).encode())
        else:
            digest.update(column.to_numpy().astype("<i4").tobytes())
