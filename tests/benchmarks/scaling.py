"""Every table of cluster/SCALING.md: measured figures, carried to 300M tokens and 100 nodes by arithmetic.

    python -m tests.benchmarks.scaling                              # prints the tables
    python -m tests.benchmarks.scaling --link_gbps 100              # any assumption is a flag
    python -m tests.benchmarks.scaling --write cluster/SCALING.md   # puts them into the document
    python -m tests.benchmarks.scaling --measure                    # the rates of one core that go in; seconds

What goes in is in scaling_figures.py, formulas are in scaling_costs.py. Only --measure runs anything.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from tests.benchmarks.scaling_costs import Assumptions
from tests.benchmarks.scaling_tables import Scaling, Table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Assumptions):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=field.metadata["help"])
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables of a document")
    parser.add_argument("--measure", action="store_true", help="measure the rates of one core instead")
    options = vars(parser.parse_args(arguments))
    path, measures = options.pop("write"), options.pop("measure")
    if measures:
        from tests.benchmarks.scaling_measure import measure

        measure()
        return
    tables = list(Scaling(Assumptions(**options)).tables())
    if path is None:
        print("\n\n".join(map(str, tables)))
    else:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def with_tables(document: str, tables: Sequence[Table]) -> str:
    """The document with each of these tables in place of the one below its marker."""
    for table in tables:
        below = re.compile(rf"<!-- {table.name} -->\n(\|.*\n)*")
        document = below.sub(f"{table}\n".replace("\\", r"\\"), document)
    return document


if __name__ == "__main__":
    main()
