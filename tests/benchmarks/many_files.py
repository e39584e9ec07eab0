"""The work of the stages signals and evaluate that grows with their numbers of files: 10,000 shards, 100,000 answers.

    python -m tests.benchmarks.many_files
    python -m tests.benchmarks.many_files --shards 500 --answers 5000 --repeats 1      # a quick look

No model runs. Files are made up; shards are on an S3 server on this machine that adds 5 ms to every request, answers
there and on the local disk. "Before" is what release e92298d did, one request after the other: it is timed on a sample
of --sample files and multiplied. The server (memory_s3.py) is a Python program on the same cores: what it alone needs
for a listing and for GETs is printed, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import precompute
from pipelines.evaluate import PIECE_SIZE
from pipelines.evaluation.actor import DECODED
from pipelines.evaluation.answers import KEY, read_answers
from pipelines.signals import files
from pipelines.signals.plan import SignalJob, make_job
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.threads import NUM_THREADS, in_threads
from rcd_core.training.data.signal_format import SCHEMA_VERSION
from tests.benchmarks.probe import header
from tests.pipelines.signal_run import context, make_recipe, prepare_run
from tests.s3_server import s3_server

SHARD = b"a shard is read by trainings only"
FACTS = "family vocab_size mask_token_id reference compute_dtype tokens masked_tokens kept_entries".split()
Row = tuple[str, "Times", float]  # what was done, the seconds of each repeat, a factor for all


def sidecar(shard: int, rng: Any) -> dict[str, Any]:
    """As large as a real one: the histogram is most of it. One shard in ten has a bad row."""
    bad = [{"example_id": f"{shard:08d}", "draw": 0, "reason": "empty", "row": shard}] if shard % 10 == 0 else []
    facts = {"rows": 1, "bytes": len(SHARD), "sha256": f"{shard:064x}", "first_row": shard, **dict.fromkeys(FACTS, 7)}
    histogram = rng.poisson(40, 2048) * (np.arange(2048) < 700)
    return {"schema_version": SCHEMA_VERSION, **facts, "bad_rows": bad, "entropy_histogram": histogram.tolist()}


def answers(first: int, count: int) -> pa.Table:
    values = {"int32": 20, "int64": 0, "double": 0.5, "string": "", "bool": True}
    row: dict[str, Any] = {field.name: values[str(field.type)] for field in DECODED}
    row |= {"settings": "s" * 600, "hardware": "h" * 150, "completion": "an answer of some length " * 40}
    rows = [{**row, "example_id": f"{i:08d}", "sample": i} for i in range(first, first + count)]
    return pa.Table.from_pylist(rows, schema=DECODED)


def write_table(path: str, table: pa.Table) -> None:
    with storage.open_output(path) as stream:
        pq.write_table(table, stream, compression="zstd")


# -- before: as in e92298d


def valid_sidecar(directory: str, shard: int) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = storage.read_json(storage.join(directory, files.sidecar_name(shard)))
        complete = storage.size(storage.join(directory, files.shard_name(shard))) == found["bytes"]
    except (FileNotFoundError, UserError):
        return None
    return found if complete else None


def read_one_by_one(directory: str) -> None:
    for name in storage.list_files(directory, ".parquet"):
        with storage.open_input(name) as stream:
            pq.read_table(stream).cast(DECODED)


# -- timing


class Times(list[float]):
    """Seconds of each repeat. cpu: this process's CPU seconds in all of them, which other programs change little."""

    cpu = 0.0


def seconds(function: Callable[[], Any], repeats: int) -> Times:
    times = Times()
    for _ in range(repeats):
        started, cpu = time.perf_counter(), time.process_time()
        function()
        times.append(time.perf_counter() - started)
        times.cpu += time.process_time() - cpu
    return times


def describe(times: Times, factor: float = 1.0) -> str:
    low, mid, high = (factor * f(times) for f in (min, median, max))
    return f"{mid:.2f} s ({low:.2f} to {high:.2f}), of it {factor * times.cpu / len(times):.2f} s of this process's CPU"


def signals(count: int, sample: int, repeats: int, base: str, scratch: Path) -> Iterator[Row]:
    """The driver's work in the stage signals."""
    recipe = make_recipe(scratch, signals={"max_bad_rows": 0.2})
    prepare_run(recipe)
    ctx, rng = context(recipe), np.random.default_rng(0)
    contents = [sidecar(shard, rng) for shard in range(count)]

    def job(directory: str) -> SignalJob:
        return dataclasses.replace(make_job(ctx), directory=directory, row_offsets=tuple(range(count + 1)))

    def run(directory: str, computed: bool = False) -> None:
        made = enumerate(contents) if computed else ()
        with (
            mock.patch.object(precompute, "make_job", lambda ctx: job(directory)),
            mock.patch.object(precompute, "_compute", lambda ctx, job, shards: made),
        ):
            summary = precompute.run(ctx)
        assert len(summary["shards"]) == count and sum(summary["bad_rows"].values()) == len(contents[::10])

    directory = storage.join(base, "signals")

    def write(shard: int) -> None:
        storage.write_bytes(storage.join(directory, files.shard_name(shard)), SHARD)
        storage.write_json(storage.join(directory, files.sidecar_name(shard)), contents[shard])

    list(in_threads(write, range(count)))
    old = seconds(lambda: [valid_sidecar(directory, shard) for shard in range(sample)], repeats)
    yield "before: start of a resume, and once more while shards are finished", old, count / sample

    def remove_index() -> None:
        names = [name for name in storage.listing(directory) if name.startswith("index-")]
        list(in_threads(lambda name: storage.remove(storage.join(directory, name)), names))

    without = Times()
    for _ in range(repeats):
        remove_index()
        once = seconds(lambda: run(directory), 1)
        without += once
        without.cpu += once.cpu
    yield "after: start and end, no index (as an older release leaves it)", without, 1.0
    remove_index()
    time.sleep(1.1)  # an index must be younger than the shards, and S3 keeps seconds
    run(directory)
    yield "after: start and end of a resume with an index", seconds(lambda: run(directory), repeats), 1.0
    fresh = iter(range(repeats))
    times = seconds(lambda: run(storage.join(base, f"fresh-{next(fresh)}"), computed=True), repeats)
    yield "after: start and end, all shards handed over by actors", times, 1.0


def evaluation(count: int, sample: int, repeats: int, base: str) -> Iterator[Row]:
    """Reading the answers of an evaluation."""
    old, new = storage.join(base, "old", "shard"), storage.join(base, "new")
    list(in_threads(lambda i: write_table(f"{old}/{i:05d}.parquet", answers(i, 1)), range(sample)))
    pieces = range(0, count, PIECE_SIZE)
    sizes = [min(PIECE_SIZE, count - first) for first in pieces]
    write = [(f"{new}/{first:08d}.parquet", first, size) for first, size in zip(pieces, sizes, strict=True)]
    list(in_threads(lambda w: write_table(w[0], answers(*w[1:])), write))
    yield "before: a file per answer, read one by one", seconds(lambda: read_one_by_one(old), repeats), count / sample

    def read() -> None:
        assert len(read_answers(new, DECODED, list(KEY))) == count

    yield f"after: {len(write)} files, read in threads", seconds(read, repeats), 1.0


def server_alone(endpoint: str, sample: int, latency_s: float) -> str:
    """What the server itself needs, without the added latency, asked by plain HTTP."""
    address = urlsplit(endpoint).netloc

    def get(path: str) -> int:
        connection = http.client.HTTPConnection(address)
        connection.request("GET", path)
        return len(connection.getresponse().read())

    page = median(seconds(lambda: get("/bucket?list-type=2&prefix=signals/&max-keys=1000"), 5)) - latency_s
    paths = [f"/bucket/signals/{files.sidecar_name(shard)}" for shard in range(sample)]
    one = seconds(lambda: [get(path) for path in paths], 1)[0] / sample - latency_s
    many = seconds(lambda: list(in_threads(get, paths)), 1)[0] / sample - latency_s / NUM_THREADS
    return (
        f"the server alone: {1e3 * page:.0f} ms for a page of 1,000 names, {1e3 * one:.1f} ms a GET one by one, "
        f"{1e3 * many:.1f} ms a GET of {NUM_THREADS} at once"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency_ms", type=float, default=5.0)
    parser.add_argument("--only", choices=("signals",))
    options = parser.parse_args()
    print(header())
    result: dict[str, Any] = {}

    def report(title: str, rows: Iterator[Row]) -> None:
        for what, times, factor in rows:
            extrapolated = f", from {options.sample} files" if factor != 1 else ""
            print(f"{title}: {what}: {describe(times, factor)}{extrapolated}", flush=True)
            result[f"{title}: {what}"] = [round(factor * t, 3) for t in times]

    with tempfile.TemporaryDirectory() as scratch:
        latency_s = options.latency_ms / 1e3
        with s3_server("bucket", latency_s=latency_s, in_memory=True) as environment:
            sample = min(options.sample, options.shards)
            report("signals, S3", signals(options.shards, sample, options.repeats, "s3://bucket", Path(scratch)))
            print(server_alone(environment["AWS_ENDPOINT_URL"], sample, latency_s), flush=True)
            if options.only != "signals":
                report("evaluate, S3", evaluation(options.answers, options.sample, options.repeats, "s3://bucket"))
        if options.only != "signals":
            report("evaluate, local disk", evaluation(options.answers, options.sample, options.repeats, scratch))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
