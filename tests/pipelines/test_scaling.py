"""cluster/SCALING.md: its tables are what the module prints, and its closed forms are what the code does."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import prepare
from pipelines.evaluate import make_plan
from pipelines.recipe.load import load_recipe
from pipelines.signals import files as signal_files
from pipelines.signals.costs import Volume, column_bytes
from pipelines.signals.plan import groups
from rcd_core.decoding.cache import Slots, bytes_per_position
from rcd_core.io import storage
from rcd_core.training.data.signal_cache import SignalSource
from rcd_core.training.data.signal_format import SCHEMA_VERSION
from tests.benchmarks import scaling, scaling_costs
from tests.benchmarks.scaling_costs import Assumptions, Cache
from tests.benchmarks.scaling_figures import MEASURED
from tests.benchmarks.scaling_measure import write_shard
from tests.benchmarks.scaling_tables import Scaling

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "cluster" / "SCALING.md"
MACHINE = Assumptions()


@pytest.fixture(scope="module")
def cache() -> Cache:
    return Scaling(MACHINE).cache


# -- the document


def test_the_tables_of_the_document_are_those_that_the_module_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([])
    printed = capsys.readouterr().out.strip().split("\n\n")
    for table in printed:
        assert f"{table}\n\n" in DOCUMENT.read_text() + "\n", table.splitlines()[0]
    assert len(printed) == len(re.findall(r"<!-- \w+ -->\n\|", DOCUMENT.read_text()))


def test_writing_the_tables_anew_changes_tables_only(tmp_path: Path) -> None:
    copy = tmp_path / "S.md"
    copy.write_text(DOCUMENT.read_text())
    scaling.main(["--write", str(copy), "--get_ms", "40"])
    assert copy.read_text() != DOCUMENT.read_text()
    assert _prose(copy.read_text()) == _prose(DOCUMENT.read_text())
    scaling.main(["--write", str(copy)])
    assert copy.read_text() == DOCUMENT.read_text()


def _prose(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("|")]


@pytest.mark.parametrize("figure", MEASURED, ids=lambda m: m.what)
def test_a_measured_figure_stands_where_it_says(figure: Any) -> None:
    assert figure.quote in (ROOT / figure.source).read_text()


# -- what training reads


class Counting:
    """A file that counts what is asked of it; one over `storage` counts each read as a GET, each opening as a HEAD."""

    num_bytes = requests = 0

    def __init__(self, path: str) -> None:
        self.file = Path(path).open("rb")  # noqa: SIM115 - closed by whoever opened it
        self.closed = False
        Counting.requests += 1

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        Counting.num_bytes += len(data)
        Counting.requests += bool(data)
        return data

    def seek(self, *to: int) -> int:
        return self.file.seek(*to)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.closed = True
        self.file.close()


def _count(monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.num_bytes = Counting.requests = 0
    size = storage.size

    def counted(path: str) -> int:
        Counting.requests += 1
        return size(path)

    monkeypatch.setattr(storage, "open_input", lambda path: pa.PythonFile(Counting(path), mode="r"))
    monkeypatch.setattr(storage, "size", counted)


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16, 32])
def test_reads_are_those_of_the_real_reader(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of four groups of four rows: up to 4 workers share a group, up to 16 a shard."""
    shards, num_groups, rows, length, vocab, top_k = 2, 4, 4, 1024, 4096, 8
    written = [write_shard(str(tmp_path), num_groups, rows, length, vocab, top_k, shard=s)[1] for s in range(shards)]
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "shards": [signal_files.shard_name(s) for s in range(shards)],
        "row_offsets": [0, 16, 32],
        "shard_bytes": [w["bytes"] for w in written],
        "shard_sha256": [w["sha256"] for w in written],
        "alpha_temperature": 1.0,
        "delta_temperature": 1.0,
    }
    monkeypatch.setattr(storage, "_CHUNK", 1 << 16)  # several pieces in these small files
    monkeypatch.setattr(scaling_costs, "HASH_BYTES", 1 << 16)
    _count(monkeypatch)
    for rank in range(workers):
        source = SignalSource(str(tmp_path), summary)
        for row in range(rank, shards * num_groups * rows, workers):
            source.row(row)
    whole = sum(summary["shard_bytes"])
    volume = Volume(32, 32, 32 * length, 16 * length, 32 * length, vocab, True)
    found = scaling_costs.reads(Cache(volume, whole, shards, rows, 1), workers)
    # A footer is read once more when a shard is opened; of files as small as these it is some of the bytes.
    footers = min(workers, 16) * shards * (1 << 16)
    assert found.hashed + found.groups * 0.85 < Counting.num_bytes < found.hashed + found.groups + footers
    # Pieces that end in the middle make one request more or less.
    assert Counting.requests == pytest.approx(found.gets, abs=2 * min(workers, 16) * shards)


def test_a_sidecar_takes_three_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_shard(str(tmp_path), 1, 2, 64, 512, 4)[1]
    signal_files.write_sidecar(str(tmp_path), 0, {**content, "first_row": 0})
    _count(monkeypatch)
    assert signal_files.valid_sidecar(str(tmp_path), 0, 0, 2) is not None
    assert Counting.requests == scaling_costs.SIDECAR_REQUESTS


def test_predicted_bytes_are_those_of_signals_that_cannot_be_compressed(tmp_path: Path) -> None:
    rows, length = 32, 4096  # a whole row group: in a smaller one the dictionary of ids weighs
    masked, content = write_shard(str(tmp_path), groups=1, rows=rows, length=length, vocab=151_936, top_k=32)
    volume = Volume(rows, rows, rows * length, masked, 0, 151_936, True)
    assert content["bytes"] == pytest.approx(scaling_costs.cache_bytes(volume, 32), rel=0.05)
    assert scaling_costs.cache_bytes(volume, 32) == pytest.approx(sum(column_bytes(volume, 32).values()))


def test_constants_are_those_of_the_code() -> None:
    assert storage._CHUNK == scaling_costs.HASH_BYTES
    assert prepare.ROWS_PER_GROUP == scaling_costs.CHUNK
    c = scaling_costs.REFERENCE
    model: Any = SimpleNamespace(
        dtype=torch.bfloat16,
        config=SimpleNamespace(num_hidden_layers=c.num_layers, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim),
    )
    assert scaling_costs.reference_cache_bytes(3, 5) == 15 * bytes_per_position(model)


def test_row_groups_are_as_the_actors_cut_them(cache: Cache) -> None:
    row: Any = SimpleNamespace(input_ids=range(MACHINE.example_tokens))
    batch_tokens = load_recipe("sdar-8b-b64").signals.batch_tokens
    assert {len(g) for g in groups([row] * 96, batch_tokens)} == {cache.rows_per_group}


def test_a_step_waits_for_what_one_step_of_computing_does_not_hide(cache: Cache) -> None:
    batch, workers = 96, 96
    assert scaling_costs.wait_seconds(cache, batch, workers, Assumptions(get_ms=0, stream_mb_s=1e9)) == 0
    # So slow that nothing is hidden: 122 pieces and four requests for each new shard, one group in every step.
    slow = Assumptions(get_ms=1000, stream_mb_s=1e9)
    computed = scaling_costs.step_seconds(batch, workers, slow)
    share = batch / cache.rows_per_shard
    pieces = int(np.ceil(cache.shard_bytes / 2**20))
    wanted = share * (pieces + 4 + 1 - computed) + (1 - share) * (1 - computed)
    assert scaling_costs.wait_seconds(cache, batch, workers, slow, 1 << 20) == pytest.approx(wanted, rel=1e-3)
    assert scaling_costs.wait_seconds(cache, batch, workers, MACHINE, None) == 0


# -- what training sends


def test_bytes_of_a_ring_by_hand() -> None:
    shape = scaling_costs.TARGET
    layers, root = 36 * (4096 * 128 * 80 + 3 * 4096 * 12288 + 2 * 4096 + 256), 2 * 151_936 * 4096 + 4096
    assert layers + root == shape.parameters
    assert scaling_costs.fsdp_bytes(shape, 1) == scaling_costs.ddp_bytes(shape, 1) == 0
    assert scaling_costs.fsdp_bytes(shape, 2) == (4 * layers + 2 * root + 4 * (layers + root)) / 2
    assert scaling_costs.ddp_bytes(shape, 4) == 8 * (layers + root) * 3 / 4
    assert scaling_costs.checkpoint_bytes(shape) == 12 * (layers + root)


def test_workers_divide_the_batch() -> None:
    assert [scaling_costs.workers_of(96, gpus) for gpus in (1, 7, 64, 96, 800)] == [1, 6, 48, 96, 96]
    recipe = load_recipe("sdar-8b-b64")
    assert [scaling_costs.micro_batches(recipe, 96, w, MACHINE) for w in (8, 16, 48, 96)] == [6, 3, 1, 1]


def test_signals_take_whole_shards_and_a_look_at_each(cache: Cache) -> None:
    one = scaling_costs.signals_time(cache, 1, MACHINE)
    assert one.ideal == pytest.approx(one.rounds)
    found = scaling_costs.signals_time(cache, cache.num_shards - 1, MACHINE)
    assert found.rounds == pytest.approx(2 * one.ideal / cache.num_shards)
    assert found.driver == one.driver == pytest.approx(0.09 * cache.num_shards)


# -- serving and evaluation


@pytest.mark.parametrize("requests", [6, 8, 9, 10, 12, 20, 40])
def test_tokens_a_start_against_the_real_slots(requests: int) -> None:
    """Blocks of one token, 8 slots, contexts of 96: requests take turns in a random order."""
    draw, slots, length = random.Random(0), 8, 96
    pool = Slots(slots)
    passed = starts = 0
    for position in range(length):
        for request in draw.sample(range(requests), requests):
            ids = np.full(position + 1, request)
            slot, _, reused = pool.take(ids, 1, position)
            pool.held[slot].stored = position
            pool.release(slot)
            passed, starts = passed + position + 1 - reused, starts + 1
    predicted = scaling_costs.contexts_tokens(requests, slots, length / 2, 1)
    assert passed / starts == pytest.approx(predicted, rel=0.15)


def test_references_needed_grow_with_forgetting_only() -> None:
    needed = scaling_costs.replicas_needed
    assert needed(2, 32, 64, 64, MACHINE) == (1, 128)
    assert needed(8, 32, 8 * 32, 64, MACHINE) == (1, 128)
    assert needed(8, 32, 64, 64, MACHINE)[0] > 1
    assert needed(1000, 32, 10**6, 64, MACHINE)[0] > 1


def test_pieces_are_those_that_the_stage_plans() -> None:
    recipe = load_recipe("sdar-8b-b64", ["resources.evaluate_actors=800", "storage=/nowhere"])
    summary = {"counts": {"test": {"examples": 500}}, "test": ["part-00000.parquet"]}
    ctx: Any = SimpleNamespace(
        recipe=recipe, directory="/nowhere", input=lambda _: {"summary": summary}, input_dir=lambda _: "/nowhere"
    )
    arms: Any = [SimpleNamespace(info=SimpleNamespace(name=name)) for name in ("seqd", "target/zero")]
    assert len(make_plan(ctx, arms, set()).work) == Scaling(MACHINE).pieces
