"""Section `evaluate` of the recipe."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Literal

from pydantic import Field

from pipelines.recipe.types import Count, DataSource, EntryName, Section, Share
from rcd_core.decode_settings import DecodeAttention, DecodeSettings, Start, Weights

Grader = Literal["default", "official"]


class ExtraArm(Section):
    """One more decoding method for a model of the run. The threshold is swept as everywhere."""

    model: str
    """`target`, `target-<variant>`, `baseline`, `baseline-<name>` or `base`."""
    title: str | None = None
    """Name in reports."""
    decode: DecodeSettings = DecodeSettings()
    """What differs from `evaluate.decode`."""


class ExtraTask(Section):
    """Test problems of one more task, which every method solves as well. null: as in `evaluate` or `data`."""

    task: str | None = None
    """Task that defines prompts and grading; null: the name of this entry."""
    test: DataSource = "synthetic"
    """Test examples, given like `data.test`."""
    num_test: Count | None = None
    """Examples to generate or to read at most; null reads all."""
    fields: dict[str, str] = {}
    """Field of the task -> column of the data set, where the names differ."""
    max_length: Count | None = None
    """Most tokens of a prompt; null: `data.max_length`."""
    grader: Grader | None = None
    """Grader of this task."""
    samples: Count | None = None
    """Answers per problem."""
    thresholds: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None
    """Confidence thresholds to sweep."""
    decode: DecodeSettings = DecodeSettings()
    """What differs from `evaluate.decode`."""


class EvaluateSettings(Section):
    """Accuracy against tokens per forward pass."""

    settings: str | None = None
    """A shipped file that fills in this section, for example `paper-sdar-b64`."""
    num_examples: Count | None = None
    """Test examples to use; null uses all."""
    samples: Count = 1
    """Answers per problem, for pass@1 at a temperature above 0."""
    batch_size: Count = 256
    """Requests decoded at once."""
    decode: DecodeSettings = DecodeSettings()
    """Decoding settings of all methods."""
    thresholds: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
    """Confidence thresholds to sweep; 1.0 commits one token per pass."""
    block_lengths: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Block lengths to sweep; null uses the recipe's."""
    accuracy_levels: tuple[Share, ...] = (0.9,)
    """Accuracies at which speeds are compared, in addition to the baseline's best."""
    starts: Annotated[tuple[Start, ...], Field(min_length=1)] = ("zero", "reference")
    """How the first residual of a block is made; each start is one method."""
    arms: dict[EntryName, ExtraArm] = {}
    """Further decoding methods by name."""
    tasks: dict[EntryName, ExtraTask] = {}
    """Further tasks by name, to see what a training cost on tasks it was not made for."""
    grader: Grader = "default"
    """`default` compares values; `official` judges as GSM8K's and MATH's graders do. Results say where they differ."""
    attention: DecodeAttention = "auto"
    """Attention of decoding; `auto` takes the fastest that runs where the stage runs, and its log says which."""
    weights: Weights = "full"
    """Keep the layers' weights as they are, or quantised (torchao) to save memory; residual embeddings stay exact."""
    run_code: bool = False
    """Let `humaneval` run generated code, in limited processes that are no sandbox."""

    def for_task(self, name: str) -> EvaluateSettings:
        """These settings for an entry of `tasks`. What an arm changes in `decode`, it changes there as well."""
        task = self.tasks[name]
        given = {key: value for key in ("grader", "samples", "thresholds") if (value := getattr(task, key)) is not None}
        arms = {}
        for arm_name, arm in self.arms.items():
            own = {
                f.name: value
                for f in fields(DecodeSettings)
                if (value := getattr(arm.decode, f.name)) != getattr(self.decode, f.name)
            }
            arms[arm_name] = arm.model_copy(update={"decode": replace(task.decode, **own)})
        return self.model_copy(update={**given, "decode": task.decode, "arms": arms, "tasks": {}})
