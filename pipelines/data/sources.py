"""The rows behind a recipe's section `data`: files, hub data sets, or a task's generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice

from pipelines.data.hub import HUB, hub_files
from pipelines.recipe.model import ConvertSettings, Recipe
from pipelines.recipe.sources import SYNTHETIC, source_list
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import SPLITS, Problem, get_task
from rcd_core.tasks.dialects import Dialect
from rcd_core.tasks.files import BadRow
from rcd_core.tasks.rows import Row, choose_dialect, read_rows
from rcd_core.text.encoding import example_of


@dataclass(frozen=True, slots=True)
class Source:
    """One file of rows. label: its name in the recipe, or on the hub. path: the file to read."""

    label: str
    path: str


def check_early(recipe: Recipe) -> list[str]:
    """`check_sources` and `check_convert` before the first stage, without what is on the hub and does not answer.

    Returns a line per file for the plan: how its rows are read.
    """
    notes = check_sources(recipe, needs_hub=False)
    start = recipe.base.start if recipe.base else None
    if recipe.convert and isinstance(start, str) and storage.is_absolute(start):
        check_convert(recipe.convert, start, recipe.tokenizer_source or start)
    return notes


def check_tasks(recipe: Recipe) -> list[str]:
    """`check_sources` for every entry of evaluate.tasks."""
    notes = []
    for name in recipe.evaluate.tasks:
        with keys_of_task(name):
            notes += [_renamed(line, name) for line in check_sources(recipe.for_task(name), needs_hub=False)]
    return list(dict.fromkeys(notes))


@contextmanager
def keys_of_task(name: str) -> Iterator[None]:
    """An entry of evaluate.tasks is read as the test examples of a recipe: errors name its keys instead of theirs."""
    try:
        yield
    except UserError as error:
        raise UserError(_renamed(str(error), name)) from error


def _renamed(message: str, task: str) -> str:
    for key, own in (("test_fields", "fields"), ("num_test", "num_test"), ("test_task", "task"), ("test", "test")):
        message = message.replace(f"data.{key}", f"evaluate.tasks.{task}.{own}")
    return message.replace("data.max_length", f"evaluate.tasks.{task}.max_length")


def check_convert(convert: ConvertSettings, start: str, tokenizer: str) -> None:
    """Raise UserError for a checkpoint that cannot be converted, or a mask token that is in use."""
    from rcd_core.families.convert import convertible  # torch, which takes seconds
    from rcd_core.text.tokenizer import add_mask_token, load_tokenizer

    convertible(start, convert.shift, convert.attention)
    add_mask_token(load_tokenizer(tokenizer), convert.mask_token)


def check_sources(recipe: Recipe, needs_hub: bool = True) -> list[str]:
    """Raise UserError unless every source is readable and has the mapped columns. Reads the first rows only.

    Returns how the rows of each source are read.
    """
    notes = []
    for split in splits_of(recipe):
        names = _names(recipe, split)
        columns_of(recipe, split)
        if SYNTHETIC in names:
            if len(names) > 1:
                raise UserError(f"data.{split} mixes 'synthetic' with files; give one or the other")
            get_task(recipe.data.task_of(split)).synthetic(0, split, recipe.seed)
            continue
        for name in names:
            file = name
            if name.startswith(HUB):
                try:
                    file = hub_files(name, split, f"data.{split}")[0]
                except UserError:
                    if needs_hub:
                        raise
                    continue
            dialect = dialect_of(recipe, split, file)
            how = f"dialect {dialect.name}" if dialect else "columns " + ", ".join(columns_of(recipe, split).values())
            notes.append(f"data.{split}: {name}: {how}")
    return notes


def dialect_of(recipe: Recipe, split: str, file: str) -> Dialect | None:
    """How a file writes conversations; None if it has the task's columns. Raises UserError if it has neither.

    A test's conversations give question and answer, so its task must have these two fields.
    """
    task, (mapping, _) = get_task(recipe.data.task_of(split)), _mapping(recipe, split)
    usable = not task.infill and not mapping and (split == "train" or set(task.fields) == {"question", "answer"})
    chosen = recipe.data.dialect if split == "train" else None
    return choose_dialect(file, columns_of(recipe, split), f"data.{split}", chosen, usable)


def columns_of(recipe: Recipe, split: str) -> dict[str, str]:
    """Field of the task -> column of the data set."""
    task, (mapping, key) = get_task(recipe.data.task_of(split)), _mapping(recipe, split)
    for field in mapping:
        if field not in task.fields:
            raise UserError(f"{key}.{field}: task {task.name!r} has no such field; it has {', '.join(task.fields)}")
    return {field: mapping.get(field, field) for field in task.fields}


def _mapping(recipe: Recipe, split: str) -> tuple[dict[str, str], str]:
    """(field -> column, where they are set, and the recipe key)."""
    data = recipe.data
    if split == "test" and (data.test_fields is not None or data.test_task is not None):
        return data.test_fields or {}, "data.test_fields"  # another task has its own fields
    return data.fields, "data.fields"


def splits_of(recipe: Recipe) -> tuple[str, ...]:
    """The splits of a recipe; one that trains nothing may have test examples only."""
    return SPLITS if recipe.data.train is not None else ("test",)


def _names(recipe: Recipe, split: str) -> list[str]:
    return source_list(recipe.data.train if split == "train" else recipe.data.test)


def row_limit(recipe: Recipe, split: str) -> int | None:
    """Most rows to read of a split; None reads all."""
    return recipe.data.num_train if split == "train" else recipe.data.num_test


def source_files(recipe: Recipe, split: str) -> list[Source]:
    """The files of a split in order; none for synthetic data. Those on the hub are read there, at one commit."""
    sources = []
    for name in _names(recipe, split):
        if name.startswith(HUB):
            sources += [Source(path, path) for path in hub_files(name, split, f"data.{split}")]
        elif name != SYNTHETIC:
            sources.append(Source(name, name))
    return sources


def rows_of(recipe: Recipe, split: str, file: str) -> Iterator[Row]:
    """The rows of a file. Raises UserError if it cannot be read."""
    dialect = dialect_of(recipe, split, file)
    return read_rows(file, columns_of(recipe, split), dialect, recipe.data.reasoning == "keep")


def training_texts(recipe: Recipe, sources: list[Source], most: int) -> Iterator[str]:
    """Texts of the first `most` training rows in order, so that the same recipe trains the same tokenizer."""
    task = get_task(recipe.data.task)
    most = min(row_limit(recipe, "train") or most, most)
    if sources:
        rows: Iterable[Row] = chain.from_iterable(rows_of(recipe, "train", source.path) for source in sources)
    else:
        rows = (Row(i, values=task.synthetic(i, "train", recipe.seed)) for i in range(most))
    for row in islice(rows, most):
        with suppress(BadRow):  # bad rows are counted when they are encoded
            example = example_of(row, task)
            if not isinstance(example, Problem):
                yield from (message["content"] for message in example)
                continue
            yield example.response
            if not task.infill:  # an infilling prompt is its response with holes
                yield example.prompt
