"""Renders table cells on the terminal, and templates as HTML pages that need no other file."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.report.glossary import Page
from pipelines.report.plots import INK, PAPER
from pipelines.report.text import Cells

_ENVIRONMENT = Environment(
    loader=PackageLoader("pipelines.report"),
    autoescape=True,  # names, prompts and answers come from users and models
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals |= {"INK": INK, "PAPER": PAPER}
_ENVIRONMENT.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"


def render(template: str, **values: Any) -> str:
    """A file of templates/ with these values, which are escaped."""
    return _ENVIRONMENT.get_template(template).render(values, page=Page())


def print_table(console: Console, cells: Cells, title: str, caption: str | None = None) -> None:
    """Print head and rows. A table wider than the console is transposed if that makes it narrower."""
    table = _table(cells, title, caption)
    head, rows = cells
    width = console.measure(table, options=console.options.update(width=1 << 16)).maximum
    if len(rows) < len(head) and width > console.width:
        first, *others = (list(column) for column in zip(head, *rows, strict=True))
        table = _table((first, others), title, caption)
    console.print(table)


def _table(cells: Cells, title: str, caption: str | None) -> Table:
    head, rows = cells
    table = Table(*map(escape, head), title=escape(title), caption=caption)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
