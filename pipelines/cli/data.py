"""`rcd data inspect`: how a data file is read, what would be dropped and why, and an example as the model sees it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cli.file_flags import DataInspectFlags
from pipelines.cli.live_view import printable
from pipelines.cli.terminal import absolute_path
from pipelines.data.hub import HUB, hub_files
from rcd_core.errors import UserError
from rcd_core.io.gguf import package_file
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.tasks import get_task
from rcd_core.tasks.dialects import DIALECTS, Dialect
from rcd_core.tasks.files import BadRow
from rcd_core.tasks.rows import OWN_COLUMNS, Row, choose_dialect, read_rows
from rcd_core.text.encoding import UNLABELLED, Encoder, TrainExample, example_of
from rcd_core.text.tokenizer import add_mask_token, load_tokenizer

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
_MASK, _STYLES = "▒", {"given": "dim", "trained": "green", "masked": "reverse"}


@dataclass
class _Found:
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> row and detail of the first one
    turns: list[int] = field(default_factory=list)  # answers per row
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    example: tuple[int, TrainExample] | None = None


def inspect(flags: DataInspectFlags) -> int:
    task = get_task(flags.task)
    allowed = (OWN_COLUMNS, *DIALECTS)
    if flags.dialect is not None and flags.dialect not in allowed:
        raise UserError(f"--dialect is {flags.dialect!r}; allowed: {', '.join(allowed)}")
    if flags.rows < 0:
        raise UserError(f"--rows is {flags.rows}; it must be at least 0, which reads all")
    columns = {name: name for name in task.fields}
    for text in flags.field:
        name, _, column = text.partition("=")
        if name not in columns or not column:
            raise UserError(f"--field {text}: give one of {', '.join(columns)} and its column, as a=b")
        columns[name] = column
    path, others = _file(flags.path)
    usable, remedy = not flags.field and not task.infill, "give --field {field}=COLUMN"
    dialect = choose_dialect(path, columns, "PATH", flags.dialect, usable, remedy)
    encoder = _encoder(flags)
    rows = read_rows(path, columns, dialect, flags.reasoning == "keep")
    console = Console(soft_wrap=True, highlight=False)
    if others:
        console.print(f"{path}, the first of {others + 1:,} files", markup=False)
    found = _read(islice(rows, flags.rows or None), encoder, flags.task)
    _report(found, dialect, columns, encoder, console)
    return 0


def _file(path: str) -> tuple[str, int]:
    """(the file to read, how many more there are). Of a data set on the hub, the first file of the split."""
    if not path.startswith(HUB):
        return absolute_path(path), 0
    files = hub_files(path, "train", "PATH")
    return files[0], len(files) - 1


def _encoder(flags: DataInspectFlags) -> Encoder | None:
    if flags.tokenizer is None:
        return None
    for name in ("max_length", "block_length"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is {getattr(flags, name)}; it must be at least 1")
    tokenizer = load_tokenizer(package_file(os.path.expanduser(flags.tokenizer)))
    add_mask_token(tokenizer, None)  # changes nothing if it has one
    return Encoder(
        get_task(flags.task), tokenizer, flags.block_length, flags.max_length, all_turns=flags.turns == "all"
    )


def _read(rows: Iterator[Row], encoder: Encoder | None, task: str) -> _Found:
    found = _Found()
    for row in rows:
        found.rows += 1
        try:
            item = example_of(row, get_task(task))
            roles = [message["role"] for message in row.conversation or ()]
            found.turns.append(roles.count("assistant") or 1)
            if encoder is not None:
                example = encoder.train(item)
                found.lengths.append(len(example.input_ids))
                found.trained.append(sum(label != UNLABELLED for label in example.labels))
                found.example = found.example or (row.number, example)
        except BadRow as bad:
            found.dropped[bad.reason] += 1
            found.first.setdefault(bad.reason, f"row {row.number}: {bad.detail}")
    return found


def _report(
    found: _Found, dialect: Dialect | None, columns: dict[str, str], encoder: Encoder | None, console: Console
) -> None:
    how = f"dialect {dialect.name}" if dialect else "columns " + ", ".join(dict.fromkeys(columns.values()))
    num_dropped = sum(found.dropped.values())
    several = sum(count > 1 for count in found.turns)
    console.print(
        f"{how}; {found.rows:,} rows read, {found.rows - num_dropped:,} usable, {several:,} with several answers",
        markup=False,
    )
    if found.dropped:
        table = Table("dropped", "rows", "the first")
        for reason, count in found.dropped.most_common():
            table.add_row(Text(reason), f"{count:,}", Text(printable(found.first[reason])[:160], overflow="fold"))
        console.print(table)
    if encoder is None:
        console.print("give --tokenizer to see lengths in tokens and an example")
    elif found.lengths:
        table = Table("tokens by quantile", *(f"{q:g}" for q in QUANTILES), "mean", "total")
        for name, counts in (("with padding", found.lengths), ("trained", found.trained)):
            cells = (f"{np.quantile(counts, q):.0f}" for q in QUANTILES)
            table.add_row(name, *cells, f"{np.mean(counts):.0f}", f"{sum(counts):,}")
        console.print(table)
    if encoder is not None and found.example is not None:
        number, example = found.example
        console.print(_picture(number, example, encoder, console.is_terminal))


def _picture(number: int, example: TrainExample, encoder: Encoder, coloured: bool) -> Text:
    """The text of an example under the first draw of the noise; masked tokens are blocks."""
    labels = np.array(example.labels)
    masked, p = mask_example(labels != UNLABELLED, f"row {number}", 0, NoiseSettings())
    given, trained = ("dim", "green") if coloured else ("outside", "inside [ ]")
    text = Text(
        f"row {number}: {len(labels)} tokens; given is {given}, trained {trained}, {int(masked.sum())} of "
        f"{int((labels != UNLABELLED).sum())} masked ({_MASK}) at p = {float(p.max()):.2f}\n\n"
    )
    parts: list[tuple[str, list[Any]]] = []
    for token, label, is_masked in zip(example.input_ids, example.labels, masked, strict=True):
        kind = "given" if label == UNLABELLED else "masked" if is_masked else "trained"
        if not parts or parts[-1][0] != kind:
            parts.append((kind, []))
        parts[-1][1].append(token)
    inside = False
    for kind, ids in parts:
        if not coloured and inside != (kind != "given"):
            inside = not inside
            text.append("[" if inside else "]")
        shown = _MASK * len(ids) if kind == "masked" else printable(str(encoder.tokenizer.decode(ids)))
        text.append(shown, style=_STYLES[kind] if coloured else "")
    return text.append("]" if inside else "")
