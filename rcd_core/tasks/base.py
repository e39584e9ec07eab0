"""The interface of a task: where its rows come from, what the model is given, and when an answer is right."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.noise import hash_key, uniforms

MASK_TEXT = "<|MASK|>"  # SDAR's mask token; tokenizers trained here use the same text
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem as text.

    prompt: the user's turn; for an infill task the canvas, with MASK_TEXT at each unknown place.
    response: the training target; for an infill task the filled canvas, with as many tokens as the prompt.
    answer: the argument of `Task.grade`.
    """

    prompt: str
    response: str
    answer: str


class Task(Protocol):
    """A row maps `fields` to text. `infill` tasks fill a canvas; the others continue a prompt. A task that can tell
    from the prompt alone whether a completion is right also has `check(prompt, completion) -> bool | None`; one whose
    text is hard to read as it is has `layout(text) -> str`. about: what a model of the task does and what its prompts
    look like, for those who try it; not every task has it."""

    name: str
    infill: bool
    fields: tuple[str, ...]

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        """Row `index` of a split: a pure function. Raises UserError if the task needs a dataset."""

    def problem(self, row: Mapping[str, str]) -> Problem:
        """The problem of a row. Raises UserError if the row is invalid."""

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        """Whether `completion` solves the problem. For an infill task it is the filled canvas."""


def no_generator(task: str, split: str, hub: str) -> UserError:
    """The error of `synthetic` for a task without a generator. hub: where its dataset is."""
    return UserError(
        f"data.{split} is 'synthetic' but task {task!r} has no generator; give a .jsonl or .parquet file, or {hub}"
    )


def draw_row(
    task: str, index: int, split: str, seed: int, num_draws: int, make: Callable[[NDArray[np.float64]], tuple[str, ...]]
) -> dict[str, str]:
    """Synthetic row `index` of a split.

    make: (num_draws,) uniform numbers in [0, 1) -> (content, question, answer). A checksum of the content assigns a row
    to one split, so that train and test share no problem; rows of the other split are drawn again.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    for attempt in range(64):
        content, question, answer = make(uniforms(hash_key(task, seed, split, index, attempt), num_draws))
        if SPLITS[zlib.crc32(content.encode()) & 1] == split:
            return {"question": question, "answer": answer}
    raise RuntimeError(f"no {split} row in 64 draws: index {index}, seed {seed}")  # probability 2**-64
