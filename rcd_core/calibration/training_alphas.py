"""Held-out examples, and the alpha of the reference's predictions on them under training noise.

Shapes: N masked positions, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from rcd_core.calibration.distance import Alphas
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.signals import ReferenceSignals
from rcd_core.tasks.base import Problem
from rcd_core.tasks.files import BadRow
from rcd_core.text.encoding import Encoder, PromptExample, TrainExample, content_id
from rcd_core.training.data.batches import collate
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.objective import IGNORED, masked_blocks, masked_hidden
from rcd_core.training.settings import SignalRule

_BATCH_ROWS = 32


@dataclass(frozen=True)
class Example:
    """A held-out problem, encoded for training and as a prompt for decoding."""

    example_id: str
    train: TrainExample
    prompt: PromptExample


def encode_examples(encoder: Encoder, problems: Iterable[Problem], limit: int) -> list[Example]:
    """The first `limit` usable problems. Raises UserError if there is none."""
    usable = (example for problem in problems if (example := _encode(encoder, problem)))
    if examples := list(islice(usable, limit)):
        return examples
    raise UserError("calibration: no held-out example is usable; are they of this task, and shorter than max_length?")


def _encode(encoder: Encoder, problem: Problem) -> Example | None:
    with suppress(BadRow):
        return Example(content_id(problem), encoder.train(problem), encoder.test(problem))
    return None


@torch.no_grad()
def training_alphas(
    reference: DiffusionModel,
    target: DiffusionModel,
    examples: Sequence[Example],
    settings: DecodeSettings,
    noise: NoiseSettings,
    rule: SignalRule,
) -> Alphas:
    """Alpha of the target's training at every masked position of every example, under the first draw of the noise."""
    parts = []
    block_length = settings.block_length or target.info.block_length
    assert settings.alpha is not None
    for rows in _noisy(examples, noise):
        batch, _ = collate(
            rows,
            mask_token_id=reference.mask_token_id,
            pad_token_id=reference.info.pad_token_id,
            block_length=block_length,
            noise=noise,
        )
        signals = ReferenceSignals.from_hidden(
            masked_hidden(reference, batch.to(reference.device), None),
            reference.lm_head_weight,
            1,
            alpha_temperature=rule.alpha_temperature,
            delta_temperature=rule.delta_temperature,
        )
        learned, groups = target.learned_alpha, masked_blocks(target, batch).to(reference.device)
        alpha = signals.alpha(target.vocab_size, settings.alpha, settings.alpha_scale, learned=learned, groups=groups)
        attention_block = target.attention_block(block_length)
        parts.append((alpha.cpu().numpy(), np.concatenate([training_shares(row, attention_block) for row in rows])))
    return Alphas(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _noisy(examples: Sequence[Example], noise: NoiseSettings) -> Iterator[list[TrainingRow]]:
    rows = []
    for index, example in enumerate(examples):
        ids, labels = (np.asarray(v, dtype=np.int64) for v in (example.train.input_ids, example.train.labels))
        masked, p = mask_example(labels != IGNORED, example.example_id, 0, noise)
        rows.append(TrainingRow(index, example.example_id, 0, ids, labels, masked, p))
    for start in range(0, len(rows), _BATCH_ROWS):
        yield rows[start : start + _BATCH_ROWS]


def training_shares(row: TrainingRow, block_length: int | None) -> NDArray[np.float64]:
    """(N,) masking ratio around each masked position of a training row: of its block, or (None) of the row."""
    blocks = np.arange(len(row.labels)) // (block_length or len(row.labels))
    labelled, masked = (np.bincount(blocks, weights=flags) for flags in (row.labels != IGNORED, row.masked))
    return (masked / np.maximum(labelled, 1))[blocks[row.masked]]
