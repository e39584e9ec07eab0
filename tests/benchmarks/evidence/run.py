"""Trains and decodes the cells of the plan, one after the other. Finished cells are on disk and are skipped.

A cell is (experiment, base, reference, method, second-stage seed). Its file holds, for each start, threshold and
problem: correct or not, tokens, target passes, reference passes. Methods are paired: same start weights, rows, noise
and problems.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcd_core.calibration.entropy_histogram import entropy_histogram, entropy_quantile
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.decoder import Decoder
from rcd_core.families.base import DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import load_model
from rcd_core.training.data.batches import collate
from rcd_core.training.data.rows import RowSource, TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.objective import reference_signals
from rcd_core.training.own_signals import OwnSignals
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings
from tests.benchmarks.evidence.feedback import feedback
from tests.benchmarks.evidence.plan import Arm, Experiment, Plan
from tests.benchmarks.evidence.world import MemorySource, World

PLAIN = ResidualSettings(source="none")
NO_REFERENCE = "none"
SCALE_ROWS = 2048  # rows whose entropies give h of the calibrated rule
SIGNAL_TOP_K = 32


@dataclass(frozen=True)
class Cell:
    experiment: Experiment
    base: int
    seed: int
    arm: Arm
    reference: str

    @property
    def name(self) -> str:
        return f"{self.experiment.name}/base{self.base}.seed{self.seed}.{self.arm.name}.{self.reference}"


def cells(plan: Plan, names: list[str], replicates: int) -> Iterator[Cell]:
    """In running order: all methods of a replicate before the next replicate."""
    for name in names:
        experiment = plan.experiments[name]
        for number, (base, seed) in enumerate(experiment.replicates[:replicates]):
            for arm in (plan.arms[a] for a in (experiment.later if number else experiment.arms)):
                for reference in experiment.references if arm.asks_reference else (NO_REFERENCE,):
                    yield Cell(experiment, base, seed, arm, reference)


class Signals:
    """Rows with the model's signals, made 64 rows at a time as training reaches them, by a copy of the model."""

    def __init__(
        self,
        model: DiffusionModel,
        settings: ResidualSettings,
        rows: MemorySource,
        numbers: range,
        seed: int,
        on_policy: float,
    ) -> None:
        self.rows, self.numbers = rows, numbers
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        rule, block = SignalRule(top_k=SIGNAL_TOP_K), model.info.block_length
        self.own = OwnSignals(frozen, settings, rule, rows.noise, block, seed, on_policy)
        # The base sees the rows' own masks, as a reference does, unless they are masked anew.
        self.plain = frozen if not (settings.feeds_back or on_policy) else None
        self._made: tuple[int, list[TrainingRow]] = (-1, [])

    def row(self, index: int) -> TrainingRow:
        number, place = divmod(index - self.numbers.start, 64)
        if self._made[0] != number:
            first = self.numbers.start + 64 * number
            self._made = (
                number,
                self._signals([self.rows.row(g) for g in range(first, min(first + 64, self.numbers.stop))]),
            )
        return self._made[1][place]

    def _signals(self, rows: list[TrainingRow]) -> list[TrainingRow]:
        if self.plain is None:
            rows, signals = self.own(rows)
        else:
            ids = {"mask_token_id": self.plain.mask_token_id, "pad_token_id": self.plain.info.pad_token_id}
            batch, _ = collate(rows, **ids, block_length=self.plain.info.block_length)
            signals = reference_signals(self.plain, batch.to(self.plain.device), self.own.rule)
        ends = np.cumsum([int(row.masked.sum()) for row in rows])
        signals = signals.to("cpu")
        return [
            replace(row, signals=signals[torch.arange(end - int(row.masked.sum()), end)])
            for row, end in zip(rows, ends.tolist(), strict=True)
        ]


class Runner:
    """output: directory of bases, references and cells. deadline: monotonic time after which no cell starts."""

    def __init__(self, output: Path, device: torch.device, deadline: float, say: Callable[[str], None]) -> None:
        self.output, self.device, self.deadline, self.say = output, device, deadline, say
        self.worlds: dict[str, World] = {}

    def run(self, cell: Cell) -> None:
        path = self.output / f"{cell.name}.npz"
        if path.exists() or time.monotonic() > self.deadline:
            return
        with feedback(cell.arm.feedback):
            self._run(cell, self._world(cell.experiment), path)

    def _run(self, cell: Cell, world: World, path: Path) -> None:
        base = self.base(cell)
        reference = None if cell.reference == NO_REFERENCE else self._reference(world, cell.reference, cell.base)
        began = time.perf_counter()
        rows = world.rows(1000 * cell.base + cell.seed + 1)
        residual = self._scaled(cell.arm.residual, rows, reference or base)
        settings = cell.experiment.second_train
        steps = math.ceil(settings.steps * cell.arm.steps_factor)
        settings = replace(settings, steps=steps, seed=cell.seed, log_every=steps, checkpoint_every=steps)
        if cell.arm.residual is not None and cell.arm.residual.source == "signals":
            assert residual is not None
            loss = self._in_rounds(base, settings, residual, rows, cell.arm)
        else:
            loss = self._train(base, settings, residual or PLAIN, rows, reference)
        trained = time.perf_counter() - began
        found = {
            start: self._decode(world, base, reference, residual, start) for start in (cell.arm.starts or ("none",))
        }
        arrays = {f"{start}.{name}": array for start, part in found.items() for name, array in part.items()}
        facts = {
            "train_seconds": trained,
            "decode_seconds": time.perf_counter() - began - trained,
            "train_loss": loss,
            "alpha_scale": (residual.alpha_scale if residual else None) or math.nan,
            "parameters": base.num_parameters(),
            "reference_parameters": reference.num_parameters() if reference else 0,
            "thresholds": np.array(cell.experiment.thresholds),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, **arrays, **{f"fact.{name}": np.asarray(value) for name, value in facts.items()})
        partial.rename(path)
        best = {start: float(part["correct"].mean(1).max()) for start, part in found.items()}
        self.say(f"{cell.name}: trained {trained:.0f} s, decoded {facts['decode_seconds']:.0f} s, best {best}")

    # -- models
    def base(self, cell: Cell) -> DiffusionModel:
        e = cell.experiment
        return self._plain(self._world(e), f"base{cell.base}", e.target, e.base_train, 10_000 + cell.base)

    def _world(self, experiment: Experiment) -> World:
        return self.worlds.setdefault(experiment.name, World(experiment))

    def _reference(self, world: World, which: str, base: int) -> DiffusionModel:
        """One per base, so that the spread over replicates includes the reference's."""
        config, settings = world.experiment.references[which]
        return self._plain(world, f"reference.{which}.base{base}", config, settings, 20_000 + base)

    def _plain(
        self, world: World, role: str, config: ModelConfig, settings: TrainSettings, seed: int
    ) -> DiffusionModel:
        """A model trained from scratch and kept as a checkpoint."""
        directory = self.output / world.experiment.name / role
        if not (directory / "config.json").exists():
            model = world.model(config, seed, role).to(self.device)
            began = time.perf_counter()
            settings = replace(settings, seed=seed, log_every=settings.steps, checkpoint_every=settings.steps)
            loss = self._train(model, settings, PLAIN, world.rows(seed), None)
            model.save_pretrained(directory)
            self.say(f"{world.experiment.name}/{role}: {time.perf_counter() - began:.0f} s, last loss {loss:.3f}")
        return load_model(directory, device=self.device)

    def _train(
        self,
        model: DiffusionModel,
        settings: TrainSettings,
        residual: ResidualSettings,
        rows: MemorySource,
        reference: DiffusionModel | None,
        source: RowSource | None = None,
        **more: Any,
    ) -> float:
        """source: of the same rows with signals. more: arguments of `train`."""
        lines: list[dict[str, float]] = []
        save = more.pop("checkpoint", lambda step, save: None)
        block = model.info.block_length
        callbacks = Callbacks(log=lines.append, checkpoint=save)
        train(
            model, source or rows, settings, residual, block, callbacks, reference=reference, noise=rows.noise, **more
        )
        return lines[-1]["loss"]

    def _in_rounds(
        self, model: DiffusionModel, settings: TrainSettings, residual: ResidualSettings, rows: MemorySource, arm: Arm
    ) -> float:
        """As the recipe's target.rounds: optimiser and schedule go on from part to part."""
        loss, ends = math.nan, [settings.steps * n // arm.rounds for n in range(arm.rounds + 1)]
        with tempfile.TemporaryDirectory() as directory:
            states = [Path(directory, str(end)) for end in ends]
            for number, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
                size = settings.batch_size
                maker = replace(residual, source="self" if number else "none")
                signals = Signals(model, maker, rows, range(first * size, end * size), number, arm.on_policy)
                part = {"stop_at": end, "checkpoint": lambda step, save, to=states[number + 1]: save(to)}
                if number:
                    part["resume"] = states[number]
                model.requires_grad_(True)
                loss = self._train(model, settings, residual, rows, None, signals, **part)
        return loss

    def _scaled(
        self, residual: ResidualSettings | None, rows: MemorySource, source: DiffusionModel
    ) -> ResidualSettings | None:
        """Sets h of the calibrated rule: a quantile of the entropies of the model that supplies the residuals."""
        if residual is None or residual.alpha != "calibrated_entropy":
            return residual
        histogram = 0
        for first in range(0, SCALE_ROWS, 64):
            batch, _ = collate(
                [rows.row(g) for g in range(first, first + 64)],
                mask_token_id=source.mask_token_id,
                pad_token_id=source.info.pad_token_id,
                block_length=source.info.block_length,
            )
            signals = reference_signals(source, batch.to(self.device), SignalRule(top_k=SIGNAL_TOP_K))
            histogram = histogram + entropy_histogram(signals.entropy.float().cpu().numpy())
        return replace(residual, alpha_scale=entropy_quantile(histogram, residual.alpha_quantile))

    # -- decoding
    def _decode(
        self,
        world: World,
        model: DiffusionModel,
        reference: DiffusionModel | None,
        residual: ResidualSettings | None,
        start: str,
    ) -> dict[str, np.ndarray]:
        """Arrays of shape (T thresholds, N problems)."""
        e, tests = world.experiment, world.tests
        feeds = residual is not None and residual.feeds_back
        mixes = feeds and model.loophole is None  # Loopholing feeds hidden states back, without alpha and delta
        decoder = Decoder(model, reference if start == "reference" else None, max_batch=256)
        decode = decoder.infill if world.task.infill else decoder.generate
        found: dict[str, list[list[float]]] = {n: [] for n in ("correct", "tokens", "denoise", "reference")}
        for threshold in e.thresholds:
            settings = DecodeSettings(
                block_length=e.block_length,
                max_new_tokens=e.max_new_tokens,
                confidence_threshold=threshold,
                stop_token_ids=model.info.eos_token_ids,
                residual=feeds,
                start=start if feeds else None,
                residual_temperature=1.0 if mixes else None,
                residual_top_k=residual.top_k if mixes and residual else None,
                alpha=residual.alpha if mixes and residual else None,
                alpha_scale=residual.alpha_scale if mixes and residual else None,
            )
            outputs = decode([test.prompt_ids for test in tests], settings)
            ids = [o.canvas_ids if world.task.infill else o.token_ids for o in outputs]
            texts = [str(world.tokenizer.decode(i, skip_special_tokens=not world.task.infill)) for i in ids]
            found["correct"].append(
                [float(world.task.grade(t.prompt, text, t.answer)) for t, text in zip(tests, texts, strict=True)]
            )
            # Counts the stop token, but not what follows it in its block.
            found["tokens"].append([len(o.token_ids) + (o.finish_reason == "stop") for o in outputs])
            for kind in ("denoise", "reference"):
                found[kind].append([asdict(o.num_forwards)[kind] for o in outputs])
        kinds = {"correct": np.bool_}
        return {name: np.array(rows).astype(kinds.get(name, np.int16)) for name, rows in found.items()}
