"""`rcd report RUN...`: runs side by side, in the terminal and as one HTML page.

rcd report ~/rcd-runs/demo-s0 ~/rcd-runs/demo-s1 s3://bucket/rcd/sdar-4b-b32 --output compared.html
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from fnmatch import fnmatch

from rich.console import Console

from pipelines.report.comparison import Group, differences, group_runs, load_runs, method_table, methods_of
from pipelines.report.comparison_page import NOTE, html, warnings
from pipelines.report.render import print_table
from rcd_core.errors import UserError
from rcd_core.io import storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directory or URI of a run, or of rcd evaluate's --output"
    )
    parser.add_argument("--output", metavar="FILE", help="also write one HTML page: a path or URI")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these; patterns like 'target/*' work")


def run(options: argparse.Namespace) -> int:
    groups = group_runs(load_runs(options.runs))
    methods = chosen_methods(groups, options.arms)
    console = Console()
    for text in warnings(groups):
        console.print(f"note: {text}", markup=False, highlight=False)
    for name, title in methods.items():
        print_table(console, method_table(groups, name), title)
    head, rows = differences(groups)
    if rows:
        print_table(console, (head, rows), "differences between the recipes")
    console.print(NOTE, markup=False, highlight=False)
    if options.output:
        output = (
            options.output if storage.is_uri(options.output) else os.path.abspath(os.path.expanduser(options.output))
        )
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
