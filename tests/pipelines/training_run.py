"""A small prepared run for the tests of trainings, and readers of its results. Models are the golden ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from safetensors.torch import load_file

from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, StageContext, key_material
from pipelines.run.stages import stages_of
from pipelines.training.job import make_job
from pipelines.training.metrics import read_metrics
from pipelines.training.worker import start_model
from rcd_core.text.tokenizer import train_tokenizer
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.loop import Callbacks, train

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK = 4
STEPS = {"steps": 24, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 4}


def make_recipe(storage: Path, name: str, *, train: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    raw = {
        "name": name,
        "storage": str(storage),
        "block_length": BLOCK,
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 40, "num_test": 1},
        "tokenizer": {"path": str(GOLDEN / "sdar_tiny")},
        "target": {
            "start": str(GOLDEN / "sdar_tiny"),
            "train": {**STEPS, **(train or {})},
            "residual": {"source": "self"},
        },
        "evaluate": {"starts": ["zero"]},
        "deploy": {"start": "zero"},
        "resources": {"num_workers": 2, "timeout_s": 60},
    }
    for key, value in sections.items():
        raw[key] |= value  # type: ignore[operator]
    return parse_recipe(raw)


def examples(count: int, seed: int) -> pa.Table:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, 490, BLOCK * n).tolist() for n in generator.integers(2, 5, count)]
    lists = pa.list_(pa.int32())
    return pa.table(
        {
            "example_id": [f"{seed}-{i:03d}" for i in range(count)],
            "input_ids": pa.array(ids, lists),
            "labels": pa.array([[-100] * BLOCK + row[BLOCK:] for row in ids], lists),
        }
    )


def context(recipe: Recipe, stage: str = "target") -> StageContext:
    """A run with 40 prepared examples and 6 held-out ones, about to train `stage`."""
    run = RunDirectory(recipe.run_directory)
    material = key_material(stages_of(recipe)["prepare"], recipe, {})
    run.begin("prepare", material)
    directory = Path(run.stage_directory("prepare"))
    for split, table in (("train", examples(40, 0)), ("validation", examples(6, 1))):
        (directory / split).mkdir(exist_ok=True)
        pq.write_table(table, directory / split / "part-0.parquet")
    chunks = {"file": [0], "rows": [40], "tokens": [1], "labelled": [1]}
    names = ["part-0.parquet"]
    # Not the golden checkpoint's own tokenizer, which has no vocabulary: it is only copied into the model.
    train_tokenizer(["1 2 3"], 300).save_pretrained(directory / "tokenizer")
    run.finish("prepare", material, {"train": names, "validation": names, "chunks": chunks}, datetime.now(), 0.0)
    console = Console(file=io.StringIO(), width=200)
    inputs = stages_of(recipe)[stage].inputs
    return StageContext(recipe=recipe, run=run, stage=stage, key="0123456789abcdef" * 4, inputs=inputs, console=console)


def weights(ctx: StageContext) -> dict[str, torch.Tensor]:
    return load_file(Path(ctx.directory) / "model" / "model.safetensors")


def train_alone(ctx: StageContext) -> dict[str, torch.Tensor]:
    """The weights that the job gives in one process without Ray."""
    job = make_job(ctx)
    torch.set_num_threads(1)
    model = start_model(job).requires_grad_(True)
    source = ExampleSource(job.examples, job.noise, job.chunks)
    silent = Callbacks(lambda line: None, lambda step, save: None)
    settings = replace(job.settings, strategy="ddp")
    train(model, source, settings, job.residual, job.block_length, silent, noise=job.noise)
    return model.official_files()[1]


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The norm of the difference is below a thousandth of what training changed. Single numbers may differ by more,
    because Adam amplifies rounding where gradients are tiny."""
    start = load_file(GOLDEN / "sdar_tiny" / "model.safetensors")
    assert a.keys() == b.keys() == start.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * (b[name] - start[name]).norm(), name


def training_workers() -> list[psutil.Process]:
    """Ray Train's workers among the children of this process, which started the cluster."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                workers.append(process)
    return workers


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that Ray has registered for a stage."""
    for path in directory.glob("ray/*/checkpoint_manager_snapshot.json"):
        results = json.loads(path.read_text())["checkpoint_results"]
        return sorted(int(result["checkpoint_dir_name"].split("-")[1]) for result in results)
    return []


def losses(directory: str) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(directory)]


class Killer:
    """Sends SIGKILL to one training worker once `step` is logged and a checkpoint is registered."""

    def __init__(self, directory: str, step: int) -> None:
        self.directory, self.step = directory, step
        self.killed_at: float | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            with contextlib.suppress(OSError, ValueError, IndexError):
                last = read_metrics(self.directory)[-1]["step"]
                if last >= self.step and checkpoint_steps(Path(self.directory)):
                    os.kill(training_workers()[-1].pid, signal.SIGKILL)
                    self.killed_at = last
                    return
