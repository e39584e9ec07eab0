"""`rcd report RUN...`: runs side by side, in the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from rich.console import Console

from pipelines.cli.flags import ReportFlags
from pipelines.cli.terminal import writable_file
from pipelines.report.comparison import Group, differences, graders, group_runs, load_runs, method_table, methods_of
from pipelines.report.comparison_page import NOTE, html, warnings
from pipelines.report.render import print_table
from rcd_core.errors import UserError
from rcd_core.io import storage


def report(flags: ReportFlags) -> int:
    output = writable_file("--output", flags.output) if flags.output else None
    groups = group_runs(load_runs(flags.runs))
    methods = chosen_methods(groups, flags.arms)
    console = Console()
    for text in warnings(groups):
        console.print(f"note: {text}", markup=False, highlight=False)
    for name, title in methods.items():
        print_table(console, method_table(groups, name), title)
    head, rows = differences(groups)
    if rows:
        print_table(console, (head, rows), "differences between the recipes")
    for line in graders(groups):
        console.print(line, markup=False, highlight=False)
    console.print(NOTE, markup=False, highlight=False)
    if output:
        storage.write_bytes(output, html(groups, methods).encode())
        console.print(f"page: {output}", soft_wrap=True, markup=False, highlight=False)
    return 0


def chosen_methods(groups: Sequence[Group], patterns: Sequence[str] | None) -> dict[str, str]:
    """Name -> title of the methods to show. UserError for a pattern that no run has."""
    known = methods_of(groups)
    for pattern in patterns or ():
        if not any(fnmatch(name, pattern) for name in known):
            raise UserError(f"--arms: no run has a method {pattern!r}; they have {', '.join(known)}")
    return {name: title for name, title in known.items() if any(fnmatch(name, p) for p in patterns or ("*",))}
