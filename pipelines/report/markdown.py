"""An evaluation as Markdown, for a terminal, a model card or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.report import costs, glossary, prediction, summary, text
from pipelines.report.text import Cells, Results


def markdown(results: Results) -> str:
    """The verdict, gains beside costs, then what was measured and how, task by task, and what the terms mean."""
    parts = list(_parts(results))
    terms = glossary.used("\n".join(parts))
    parts += ["## What the terms mean", "\n".join(f"- {term}: {glossary.TERMS[term]}" for term in terms)]
    return "\n\n".join(parts) + "\n"


def _parts(results: Results) -> Iterator[str]:
    yield f"# {summary.page_title(results)}"
    for name, sentence in summary.verdicts(results):
        yield f"{name}: **{sentence}**" if name else f"**{sentence}**"
    if results.get("tasks"):
        yield "Each method's best accuracy in % with its 95 % interval, @ tokens per pass there:"
        yield table(summary.overview(results))
    if glance := summary.at_a_glance(results):
        yield table(glance)
        yield summary.glance_note(results)
    tasks = summary.evaluations(results)
    headings = [f"Task {name}: " if len(tasks) > 1 else "" for name in summary.names(results)]
    for heading, one in zip(headings, tasks, strict=True):
        yield from _task(one, heading)
    if results.get("costs"):
        yield "## Costs of training"
        yield table(costs.by_stage(results))
        yield table(costs.by_method(results))
        yield costs.NOTE
    if results.get("calibration"):
        yield "## Calibration of T_res"
        yield "\n".join(f"- {line}" for line in results["calibration"])
    for heading, one in zip(headings, tasks, strict=True):
        if one.get("examples"):
            yield from _samples(one, heading)
    yield "## How it was measured"
    yield f"{text.reproduce(results)} {text.hardware(results)}."


def _task(results: Results, name: str) -> Iterator[str]:
    yield f"## {name}Accuracy and speed"
    yield " ".join(filter(None, (text.measured(results), text.grader(results))))
    yield "Accuracy in % @ tokens per pass, by confidence threshold:"
    yield table(text.curve_table(results))
    yield text.costs(results)
    if results["comparisons"]:
        yield f"## {name}Paired comparison with the baseline"
        yield table(text.comparison_table(results, "tokens_per_pass"))
        yield text.scope(results)
    if found := results.get("thrown_away"):
        yield f"## {name}What plain decoding throws away"
        yield f"{prediction.EXPLANATION} {prediction.sentence(found)}"
        yield table(prediction.table(found, "SeqD here"))


def _samples(results: Results, name: str) -> Iterator[str]:
    yield f"## {name}Sample problems"
    yield summary.examples_note(results)
    for problem in summary.shown_problems(results):
        yield f"### {problem['name']}: {problem['outcome']}"
        yield f"The problem:\n\n{fenced(problem['prompt'])}"
        yield f"A right answer:\n\n{fenced(problem['answer'])}"
        for answer in problem["answers"]:
            yield f"{answer['title']}: {answer['line']}\n\n{fenced(answer['text'])}"


def fenced(content: str) -> str:
    """A text as it is, whatever it holds: the fence is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{content}\n{fence}"


def table(cells: Cells) -> str:
    """Head and rows as a Markdown table."""
    head, rows = cells
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(content: str) -> str:
    return content.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
