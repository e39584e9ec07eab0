"""Held-out examples, and alpha as the target's training would have it on them: the reference's, under random noise.

Shapes: N masked positions, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

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
from rcd_core.tasks.rows import BadRow
from rcd_core.text.encoding import Encoder, PromptExample, TrainExample, content_id
from rcd_core.training.data.batches import collate
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.objective import IGNORED, masked_blocks, masked_hidden
from rcd_core.training.settings import SignalRule

_BATCH_ROWS = 32


@dataclass(frozen=True)
class Example:
    """A held-out problem as training would have it and as decoding gets it."""

    example_id: str
    problem: Problem
    trained: TrainExample
    given: PromptExample


def encode(encoder: Encoder, problems: Iterable[Problem], most: int) -> list[Example]:
    """The first `most` that can be used. UserError where there is none."""
    found: list[Example] = []
    for problem in problems:
        with suppress(BadRow):
            found.append(Example(content_id(problem), problem, encoder.train(problem), encoder.test(problem)))
        if len(found) == most:
            break
    if not found:
        raise UserError("calibration: no held-out example can be used; are they of this task, and short enough?")
    return found


@torch.no_grad()
def training_alphas(
    reference: DiffusionModel,
    target: DiffusionModel,
    examples: Sequence[Example],
    settings: DecodeSettings,
    noise: NoiseSettings,
    rule: SignalRule,
) -> Alphas:
    """alpha that the target would be trained with at every masked position of every example, under the first draw."""
    parts = []
    block_length = settings.block_length or target.info.block_length
    assert settings.alpha is not None
    for rows in _noisy(examples, noise):
        batch, _ = collate(
            rows,
            mask_token_id=reference.mask_token_id,
            pad_token_id=reference.info.pad_token_id,
            block_length=block_length,
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
        together = target.attention_block(block_length)
        parts.append((alpha.cpu().numpy(), np.concatenate([training_shares(row, together) for row in rows])))
    return Alphas(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _noisy(examples: Sequence[Example], noise: NoiseSettings) -> Iterator[list[TrainingRow]]:
    rows = []
    for index, example in enumerate(examples):
        ids, labels = (np.asarray(v, dtype=np.int64) for v in (example.trained.input_ids, example.trained.labels))
        masked, p = mask_example(labels != IGNORED, example.example_id, 0, noise)
        rows.append(TrainingRow(index, example.example_id, 0, ids, labels, masked, p))
    for start in range(0, len(rows), _BATCH_ROWS):
        yield rows[start : start + _BATCH_ROWS]


def training_shares(row: TrainingRow, block_length: int | None) -> NDArray[np.float64]:
    """(N,) masking ratio around each masked position of a training row: of its block, or of the row (None)."""
    blocks = np.arange(len(row.labels)) // (block_length or len(row.labels))
    labelled, masked = (np.bincount(blocks, weights=flags) for flags in (row.labels != IGNORED, row.masked))
    return (masked / np.maximum(labelled, 1))[blocks[row.masked]]
