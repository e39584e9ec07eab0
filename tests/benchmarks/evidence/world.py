"""The task of an experiment: tokenizer, training rows in memory, test prompts and new models.

Everything is a pure function of the plan. Needs torch and transformers only: no files, Ray or pyarrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import new_model
from rcd_core.noise import NoiseSettings, mask_examples, seed_of
from rcd_core.text.encoding import Encoder, PromptExample, content_id
from rcd_core.text.tokenizer import mask_token_id, stop_token_ids, train_tokenizer
from rcd_core.training.data.rows import RowOrder, TrainingRow
from rcd_core.training.objective import IGNORED
from tests.benchmarks.evidence.plan import Experiment
from tests.benchmarks.evidence.tasks import find_task

DATA_SEED = 0


@dataclass(frozen=True)
class Examples:
    """Training examples, concatenated in the order of their content hashes."""

    example_ids: list[str]
    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray


class MemorySource:
    """Training rows from memory, with the same order and noise as the pipeline's files give."""

    def __init__(self, examples: Examples, noise: NoiseSettings) -> None:
        self.examples, self.noise = examples, noise
        self.order = RowOrder([len(examples.example_ids)], noise)
        self._draws: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def row(self, index: int) -> TrainingRow:
        _, place, draw = self.order.locate(index)
        e = self.examples
        if draw not in self._draws:
            self._draws[draw] = mask_examples(e.labels != IGNORED, e.offsets, e.example_ids, draw, self.noise)
        masked, p = self._draws[draw]
        part = slice(e.offsets[place], e.offsets[place + 1])
        return TrainingRow(index, e.example_ids[place], draw, e.input_ids[part], e.labels[part], masked[part], p[part])


class World:
    """One experiment's task."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.task = find_task(experiment.task)

    @cached_property
    def _problems(self) -> list:
        rows = (self.task.synthetic(i, "train", DATA_SEED) for i in range(self.experiment.num_train))
        return [self.task.problem(row) for row in rows]

    @cached_property
    def tokenizer(self):
        texts = (f"{p.prompt}\n{p.response}" for p in self._problems)
        return train_tokenizer(texts, self.experiment.vocab_size)

    @property
    def _encoder(self) -> Encoder:
        e = self.experiment
        return Encoder(self.task, self.tokenizer, pad_multiple=e.block_length, max_length=e.max_length)

    @cached_property
    def examples(self) -> Examples:
        encoder = self._encoder
        found = {content_id(p): encoder.train(p) for p in self._problems}
        names = sorted(found)
        lengths = [len(found[name].input_ids) for name in names]
        return Examples(
            example_ids=names,
            input_ids=np.concatenate([found[name].input_ids for name in names]).astype(np.int64),
            labels=np.concatenate([found[name].labels for name in names]).astype(np.int64),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    @cached_property
    def tests(self) -> list[PromptExample]:
        """Distinct problems of the test split; none is in the training split."""
        encoder, found, index = self._encoder, {}, 0
        while len(found) < self.experiment.num_test:
            problem = self.task.problem(self.task.synthetic(index, "test", DATA_SEED))
            found.setdefault(problem.prompt, problem)
            index += 1
        return [encoder.test(problem) for problem in found.values()]

    def rows(self, noise_seed: int) -> MemorySource:
        return MemorySource(self.examples, NoiseSettings(seed=noise_seed, draws=self.experiment.draws))

    def model(self, config: ModelConfig, seed: int, role: str) -> DiffusionModel:
        tokenizer = self.tokenizer
        info = CheckpointInfo(
            mask_token_id=mask_token_id(tokenizer),
            eos_token_ids=stop_token_ids(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            block_length=self.experiment.block_length,
        )
        return new_model(config, vocab_size=len(tokenizer), info=info, seed=seed_of(seed, role, "weights"))
