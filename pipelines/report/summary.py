"""The first table of a report, gains beside costs, and how the evaluations of several tasks are put on one page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.report.costs import as_flops, beyond_base
from pipelines.report.text import Cells, Results, accuracy, title, titles
from pipelines.report.verdict import solved, subject, verdict
from rcd_core.tasks import layout

# results["examples"]["counts"]["correct"] -> who was right
_OUTCOMES = {
    (False, True): "only {1} is right",
    (False, False): "both are wrong",
    (True, False): "only {0} is right",
    (True, True): "both are right",
    (False,): "{0} is wrong",
    (True,): "{0} is right",
}
# Characters of a line: more than the first do not fit a column, more than the second are no table's.
_NARROW, _WIDE = 28, 80


def evaluations(results: Results) -> list[Results]:
    """The results of every task: those of the test examples first, then those of evaluate.tasks."""
    return [results, *results.get("tasks", {}).values()]


def page_title(results: Results) -> str:
    tasks = evaluations(results)
    return title(results) if len(tasks) == 1 else f"{results['recipe']}: {', '.join(names(results))}"


def names(results: Results) -> list[str]:
    """A name for every task: that of the test examples' task, then those of the entries of evaluate.tasks."""
    first = results["task"]
    return [first, *(f"{n} (evaluate.tasks)" if n == first else n for n in results.get("tasks", {}))]


def verdicts(results: Results) -> list[tuple[str, str]]:
    """(task, verdict); the name is empty if there is one task."""
    tasks = evaluations(results)
    named = names(results) if len(tasks) > 1 else [""]
    return [(name, verdict(one)) for name, one in zip(named, tasks, strict=True)]


def overview(results: Results) -> Cells:
    """A row per task, a column per method: its best accuracy, and the speed there."""
    methods = titles(results)
    rows = []
    for name, one in zip(names(results), evaluations(results), strict=True):
        curves = {m["name"]: m["curve"] for m in one["arms"]}
        best = [max(curves[m], key=lambda p: (p["accuracy"], p["tokens_per_pass"])) for m in methods]
        rows.append([name, *(f"{accuracy(p)}\n@ {p['tokens_per_pass']:.2f}" for p in best)])
    return ["task", *methods.values()], rows


def at_a_glance(results: Results) -> Cells | None:
    """The verdict's method beside its baseline: what it gains, and what it costs. None if nothing is compared."""
    comparison = subject(results)
    advice = comparison and comparison.get("advice")
    if not comparison or not advice or not solved(results):
        return None
    titled, sides = titles(results), {comparison["arm"]: "arm", comparison["baseline"]: "baseline"}
    points = [advice[side] for side in sides.values()]
    rows = [
        ["confidence threshold", *(f"{p['threshold']:g}" for p in points)],
        ["accuracy, % (95 % interval)", *map(accuracy, points)],
        ["tokens per pass", *(f"{p['tokens_per_pass']:.2f}" for p in points)],
        ["wall-clock speed, tokens/s", *map(_speed, points)],
    ]
    costs = [beyond_base(results, name) for name in sides]
    if any(costs):
        rows.append(["training beyond the base, s", *(f"{c[0]:,.0f}" if c else "not known" for c in costs)])
        flops = [as_flops(c[1]) if c else "not known" for c in costs]
        rows.append(["training beyond the base, FLOPs", *flops])
    return [results["task"] if results.get("tasks") else "", *(titled[name] for name in sides)], rows


def glance_note(results: Results) -> str:
    """What the figures of `at_a_glance` are of."""
    advice = (subject(results) or {})["advice"]
    which = "fastest one that is as accurate" if advice["reaches"] else "most accurate one, as none is as accurate"
    return (
        f"Both thresholds were chosen on half of the problems ({advice['chosen_on']}): the baseline's most accurate "
        f"one and the method's {which}. The figures are of the other half "
        f"({advice['measured_on']}), so the choice does not flatter them."
    )


def _speed(point: dict[str, Any]) -> str:
    return "not measured" if point["tokens_per_second"] is None else f"{point['tokens_per_second']:,.0f}"


# -- sample problems


def outcome(examples: dict[str, Any], correct: list[bool]) -> str:
    return _OUTCOMES[tuple(correct)].format(*(method["title"] for method in examples["methods"]))


def outcomes(examples: dict[str, Any]) -> str:
    """How many of all problems have which outcome."""
    parts = [f"{outcome(examples, c['correct'])}: {c['problems']}" for c in examples["counts"]]
    return "; ".join(parts)


def examples_note(results: Results) -> str:
    examples = results["examples"]
    shown, total = len(examples["problems"]), sum(c["problems"] for c in examples["counts"])
    at = " and ".join(f"{m['title']} at threshold {m['threshold']:g}" for m in examples["methods"])
    first = ", the first sample of each" if results["num_samples"] > 1 else ""
    return (
        f"{shown} of {total} problems with the answers of {at}{first}; failed ones first. The outcomes take turns, so "
        f"these are no random sample. All problems: {outcomes(examples)}."
    )


def shown_problems(results: Results) -> Iterator[dict[str, Any]]:
    """The sample problems for a page: texts as people read them, and a line about each answer."""
    examples, task = results["examples"], results["task"]
    for problem in examples["problems"]:
        answers = [
            {"title": m["title"], "text": layout(task, a["completion"]), **_mark(a)}
            for m, a in zip(examples["methods"], problem["answers"], strict=True)
        ]
        prompt, answer = (layout(task, problem[key]) for key in ("prompt", "answer"))
        yield {
            "name": f"problem {problem['example_id'][:12]}",
            "outcome": outcome(examples, [a["correct"] for a in problem["answers"]]),
            "prompt": prompt,
            "answer": answer,
            "answers": answers,
            "wide": any(
                _NARROW < max(map(len, text.splitlines())) <= _WIDE for text in (prompt, answer) if "\n" in text
            ),
        }


def _mark(answer: dict[str, Any]) -> dict[str, Any]:
    passes = f"{answer['denoise']} passes"
    if answer["reference"]:
        passes += f" and {answer['reference']} of the reference"
    cut = ", cut off at the limit of tokens" if answer["finish_reason"] == "length" else ""
    word = "right" if answer["correct"] else "wrong"
    return {"correct": answer["correct"], "line": f"{word}, {passes}, {answer['tokens']} tokens{cut}"}
