"""References, targets and examples for the signals benchmark: from a finished demo run, or trained here in minutes.

Needs no Ray: rcd_core makes tokenizer, examples and models in the form that the pipeline's stages write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcd_core.evaluation.signal_fidelity import Rule
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import new_model
from rcd_core.noise import NoiseSettings
from rcd_core.tasks import Task, get_task
from rcd_core.tasks.files import BadRow
from rcd_core.tasks.rows import read_rows
from rcd_core.text.encoding import Encoder, content_id
from rcd_core.text.tokenizer import mask_token_id, stop_token_ids, train_tokenizer
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings

ROWS_PER_GROUP = 1024
NEAR_DENSE = 256  # entries kept while the benchmark trains its targets, so that no smaller k is favoured


@dataclass(frozen=True)
class Workload:
    """Directories of a reference, a target and the target's start, the examples' files, and the rule for residuals."""

    name: str
    reference: str
    target: str
    start: str
    files: tuple[str, ...]
    noise: NoiseSettings
    block_length: int
    rule: Rule


@dataclass(frozen=True)
class Recipe:
    """What `make` trains. steps: of reference, base and target."""

    task: str
    vocab_size: int
    block_length: int
    max_length: int
    reference: ModelConfig
    target: ModelConfig
    steps: tuple[int, int, int]
    batch_size: int
    learning_rate: float
    rule: Rule = Rule(alpha="calibrated_entropy", alpha_scale=3.0)


def _sizes(width: int, layers: int) -> ModelConfig:
    return ModelConfig(
        family="sdar", hidden_size=width, num_layers=layers, num_heads=4, num_kv_heads=2, intermediate_size=3 * width
    )


SUDOKU = Recipe("sudoku", 320, 37, 37, _sizes(48, 2), _sizes(64, 3), (400, 500, 200), 64, 4e-3)
# Models and training of recipe arithmetic, but that its reference runs in the training step.
ARITHMETIC = Recipe(
    "arithmetic",
    512,
    8,
    128,
    _sizes(48, 2),
    _sizes(64, 3),
    (800, 2000, 500),
    32,
    4e-3,
    Rule(),
)
GSM8K = Recipe("gsm8k", 2048, 8, 160, _sizes(64, 2), _sizes(96, 2), (300, 300, 150), 16, 4e-3)


def finished_run(directory: Path) -> Workload:
    """The workload of a run directory whose stages up to `target` are done."""
    prepare = json.loads((directory / "prepare" / "manifest.json").read_text())["summary"]
    config = json.loads((directory / "target" / "model" / "config.json").read_text())
    rcd = config["rcd"]
    reference = json.loads((directory / "reference" / "manifest.json").read_text())["summary"]
    import yaml

    recipe = yaml.safe_load((directory / "recipe.yaml").read_text())
    return Workload(
        name="demo",
        reference=reference.get("checkpoint", str(directory / "reference" / "model")),  # checkpoint: the base is it
        target=str(directory / "target" / "model"),
        start=str(directory / "base" / "model"),
        files=tuple(str(directory / "prepare" / "train" / name) for name in prepare["train"]),
        noise=NoiseSettings(**recipe["noise"]),
        block_length=recipe["block_length"],
        rule=Rule(alpha=rcd["alpha"], alpha_scale=rcd.get("alpha_scale")),
    )


def make(
    recipe: Recipe, directory: Path, data: Path | None, num_examples: int, target_noise: NoiseSettings | None = None
) -> Workload:
    """Train tokenizer, reference, base and target on the first examples of a data file, or on synthetic ones.
    target_noise: that of the target, if it differs."""
    task = get_task(recipe.task)
    rows = list(islice(_records(task, data), num_examples))
    problems = [task.problem(row) for row in rows]
    tokenizer = train_tokenizer((f"{p.prompt}\n{p.response}" for p in problems), recipe.vocab_size)
    files = (_write_examples(Encoder(task, tokenizer, recipe.block_length, recipe.max_length), rows, directory),)
    info = CheckpointInfo(
        mask_token_id(tokenizer), stop_token_ids(tokenizer), int(tokenizer.pad_token_id), recipe.block_length
    )
    noise = NoiseSettings()
    reference, base = (
        new_model(start, vocab_size=len(tokenizer), info=info, seed=seed)
        for seed, start in enumerate((recipe.reference, recipe.target))
    )
    rule = recipe.rule
    residual = ResidualSettings(source="online", alpha=rule.alpha, alpha_scale=rule.alpha_scale)
    saved = {name: str(directory / name) for name in ("reference", "target", "start")}
    train_model(reference, files, noise, recipe, recipe.steps[0], ResidualSettings(source="none"), None)
    reference.save_pretrained(saved["reference"], tokenizer)
    train_model(base, files, noise, recipe, recipe.steps[1], ResidualSettings(source="none"), None)
    base.save_pretrained(saved["start"], tokenizer)
    noise = target_noise or noise
    train_model(base, files, noise, recipe, recipe.steps[2], residual, reference)
    base.save_pretrained(saved["target"], tokenizer)
    return Workload(recipe.task, *saved.values(), files, noise, recipe.block_length, rule)


def _records(task: Task, data: Path | None) -> Iterator[dict[str, str]]:
    if data is None:
        yield from (task.synthetic(index, "train", 0) for index in range(1 << 30))
    else:
        yield from (row.values for row in read_rows(str(data), {f: f for f in task.fields}) if row.values)


def _write_examples(encoder: Encoder, rows: list[dict[str, str]], directory: Path) -> str:
    """As the stage `prepare` writes them, ordered by content hash."""
    examples: dict[str, tuple[list[int], list[int]]] = {}
    for row in rows:
        problem = encoder.problem(row)
        try:
            example = encoder.train(problem)
        except BadRow:
            continue  # too long
        examples[content_id(problem)] = example.input_ids, example.labels
    directory.mkdir(parents=True, exist_ok=True)
    path = str(directory / "examples.parquet")
    _write_table(examples, path)
    return path


def _write_table(examples: dict[str, tuple[list[int], list[int]]], path: str) -> None:
    ids = sorted(examples)
    lists = pa.list_(pa.int32())
    table = pa.table(
        {
            "example_id": pa.array(ids),
            "input_ids": pa.array([examples[i][0] for i in ids], lists),
            "labels": pa.array([examples[i][1] for i in ids], lists),
        }
    )
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)


def train_model(
    model: DiffusionModel,
    files: tuple[str, ...],
    noise: NoiseSettings,
    recipe: Recipe,
    steps: int,
    residual: ResidualSettings,
    reference: DiffusionModel | None,
) -> None:
    settings = TrainSettings(
        steps=steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        schedule="cosine",
        loss_weight="uniform",
        log_every=max(1, steps // 2),
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def log(metrics: dict[str, Any]) -> None:
        print(f"  {recipe.task}: {residual.source:6} step {metrics['step']} loss {metrics['loss']:.3f}", flush=True)

    callbacks = Callbacks(log=log, checkpoint=lambda step, save: None)
    rule = SignalRule(top_k=NEAR_DENSE)
    source = ExampleSource(files, noise)
    more = {"reference": reference, "signal_rule": rule, "noise": noise}
    train(model, source, settings, residual, recipe.block_length, callbacks, **more)


def random_reference(directory: Path) -> Workload:
    """A larger reference with random weights and examples, for throughput. 12 M parameters in its layers, V = 32,000,
    rows of 256 tokens, blocks of 32."""
    sizes = ModelConfig(
        family="sdar", hidden_size=384, num_layers=6, num_heads=6, num_kv_heads=2, intermediate_size=1152
    )
    vocab_size, length, block_length = 32_000, 256, 32
    info = CheckpointInfo(3, (2,), 0, block_length)
    model = new_model(sizes, vocab_size=vocab_size, info=info, seed=0)
    model.save_pretrained(directory / "reference")
    generator = np.random.default_rng(0)
    ids = [generator.integers(4, vocab_size, length).tolist() for _ in range(ROWS_PER_GROUP)]
    path = str(directory / "examples.parquet")
    _write_table({f"{i:016x}": (row, row) for i, row in enumerate(ids)}, path)
    reference = str(directory / "reference")
    return Workload("random", reference, reference, reference, (path,), NoiseSettings(), block_length, Rule())
