"""An evaluation as Markdown, for a terminal, a model card or a pull request."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.report import text
from pipelines.report.text import Cells, Results
from pipelines.report.verdict import verdict


def markdown(results: Results) -> str:
    """The verdict, then what was measured and how."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Results) -> Iterator[str]:
    yield f"# {text.title(results)}"
    yield f"**{verdict(results)}**"
    yield " ".join(filter(None, (text.measured(results), text.grader(results))))
    yield "Accuracy in % @ tokens per pass, by confidence threshold:"
    yield table(text.curve_table(results))
    yield text.costs(results)
    if results["comparisons"]:
        yield "## Paired comparison with the baseline"
        yield table(text.comparison_table(results, "tokens_per_pass"))
        yield text.scope(results)
    yield "## How it was measured"
    yield f"{text.reproduce(results)} {text.hardware(results)}."


def table(cells: Cells) -> str:
    """Head and rows as a Markdown table."""
    head, rows = cells
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(content: str) -> str:
    return content.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
