"""Writes the files of cluster/kuberay that share one cluster, from the templates beside them.

python -m tests.docs.kuberay          # write the files
python -m tests.docs.kuberay --check  # exit with 1 when one is stale
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from tests.conftest import ROOT
from tests.docs.recipes import write_or_check

KUBERAY = ROOT / "cluster" / "kuberay"
TEMPLATES = KUBERAY / "templates"
ALERTS = ROOT / "cluster" / "grafana" / "alerts.yaml"
CLUSTER = "cluster.yaml.j2"  # a part of the others


def templates() -> list[Path]:
    return [path for path in sorted(TEMPLATES.glob("*.j2")) if path.name != CLUSTER]


def file_of(template: Path) -> Path:
    return KUBERAY / template.name.removesuffix(".j2")


def rendered(template: Path) -> str:
    """The file's text. Templates call cluster(served) for what they share, and alerts() for the alert rules."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def cluster(served: bool = False) -> str:
        return environment.get_template(CLUSTER).render(served=served).strip("\n")

    def alerts() -> str:
        return ALERTS.read_text().partition("\n\n")[2].strip()  # without the comment at the top

    return environment.get_template(template.name).render(cluster=cluster, alerts=alerts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    return max(write_or_check(file_of(path), rendered(path), argv) for path in templates())


if __name__ == "__main__":
    sys.exit(main())
