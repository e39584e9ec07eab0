"""What a task is: where its rows come from, what the model sees, and when an answer is right."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rcd_core.errors import UserError

MASK_TEXT = "<|MASK|>"  # how SDAR spells its mask token; our trained tokenizer does the same
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem as text.

    prompt: the user's turn; for an infill task the canvas, MASK_TEXT at each unknown place.
    response: what is trained; for an infill task the filled canvas, as many tokens long as the prompt.
    answer: what `Task.grade` compares with.
    """

    prompt: str
    response: str
    answer: str


class Task(Protocol):
    """A row is a mapping of `fields` to text. `infill` tasks fill a canvas, the others continue a prompt."""

    name: str
    infill: bool
    fields: tuple[str, ...]

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        """Row `index` of a split: a pure function. UserError for a task that needs a dataset."""

    def problem(self, row: Mapping[str, str]) -> Problem:
        """The problem of a row. UserError saying what is wrong with the row."""

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        """Whether `completion` solves the problem; for an infill task it is the filled canvas."""


def no_generator(task: str, split: str, hub: str) -> UserError:
    """The error of a task without a generator that is asked for synthetic rows. hub: where its rows can be had."""
    return UserError(
        f"data.{split} is 'synthetic' but task {task!r} has no generator; give a .jsonl or .parquet file, or {hub}"
    )


def belongs_to(split: str, content: str) -> bool:
    """Split synthetic problems in halves by a checksum, so that no problem is in both train and test."""
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    return SPLITS[zlib.crc32(content.encode()) & 1] == split
