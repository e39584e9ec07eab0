"""How results.json is shown, on the terminal and as a page: in the same words whichever method is ahead."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.report import plots
from pipelines.report.evaluation import html_report, plot, plots_of, print_tables
from pipelines.report.markdown import markdown
from pipelines.report.plots import Look, Plot
from pipelines.report.text import hardware, headlines
from pipelines.report.verdict import verdict
from tests.pipelines.report.made_results import made

PLOTS = {"pareto": Plot(b"light", b"dark")}


def page_of(results: dict[str, Any]) -> str:
    return html_report(results, [PLOTS | {"throughput": PLOTS["pareto"]}])


def terminal(results: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_tables(results, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(("speed", "low", "high"), [(1.5, 1.4, 1.6), (0.75, 0.7, 0.8)])
def test_headlines_use_the_same_words_for_gains_and_losses(speed: float, low: float, high: float) -> None:
    (subject, sentences) = headlines(made(speed=speed))[0]
    assert "RCD, zero start" in subject and "SeqD" in subject
    start, _, rest = sentences[1].partition(": ")
    value, rest = rest.split(" ", 1)
    assert start == "At the best accuracy of SeqD, 90 %" and rest.endswith("times the tokens per pass.")
    assert low < float(value) < high
    assert sentences[2].endswith("percentage points.") and sentences[2].count(" % against ") == 1


def test_a_level_that_is_not_reached_has_a_reason_instead_of_a_ratio() -> None:
    worse = made(skill=0.2)
    assert headlines(worse)[0][1][1].endswith("no ratio, as RCD, zero start is below it at every threshold.")
    assert "not crossed: method below" in page_of(worse) and "not crossed: method below" in terminal(worse)
    assert "share no range of speeds" in headlines(made(speed=0.1))[0][1][-1]


def test_the_page_without_measured_times_has_no_throughput_plot() -> None:
    untimed = made(timed=False)
    assert set(plots_of(untimed)) == {"pareto"} and set(plots_of(made())) == {"pareto", "throughput"}
    assert "not measured" in html_report(untimed, [PLOTS])


def test_the_page_needs_no_other_file_and_has_all_settings() -> None:
    results = made()
    page = html_report(results, [plots_of(results)])
    assert "http://" not in page and "https://" not in page and page.count('src="data:image/png') == 2
    for name in results["arms"][0]["decode"]:
        assert (f">{name}<" in page) == (name != "trace"), name
    assert "1.7312" in page and "trained with dropout" in page and "swept: 0.6, 0.7, 0.8, 0.9, 1" in page
    assert hardware(results) in page and "Abacus" in hardware(results) and "seed 3" in page
    assert "sample 2" in page_of(made(samples=3))


def test_text_of_users_and_models_is_escaped() -> None:
    results = made() | {"recipe": "<script>name", "task": "<script>task"}
    results["arms"][1]["title"] = '<script>"title'
    results["arms"][1]["decode"]["alpha"] = "<script>alpha"
    results["settings_file"] = {
        "name": "<script>file", "sha256": "0" * 64, "source": "<script>source",
        "unpublished": ["<script>line"], "changed": ["<script>key"],
    }  # fmt: skip
    page = page_of(results)
    for name in ("name", "task", "&#34;title", "alpha", "file", "source", "line", "key"):
        assert f"&lt;script&gt;{name}" in page
    assert "<script" not in page


def test_the_terminal_has_settings_and_hardware() -> None:
    text = terminal(made())
    for words in ("max_new_tokens 256", "alpha_scale", "Abacus", "counts as 0.40 target passes"):
        assert words in text


def test_equal_results_give_equal_plots() -> None:
    assert plot(made(), "pareto") == plot(made(), "pareto")
    looks = [Look(dark, narrow) for dark in (False, True) for narrow in (False, True)]
    assert len({plot(made(), name, look) for name in ("pareto", "throughput") for look in looks}) == 8


def test_the_axis_of_accuracy_ends_at_0_and_100_percent() -> None:
    _, axes = plots.figure()
    plots.curve(axes, [1, 2], [1, 99.9], 0, False, "RCD", [[1, 2], [3, 0.1]])
    assert axes.get_ylim()[1] > 102 or max(axes.get_yticks()) > 100
    plots.percent_axis(axes)
    low, high = axes.get_ylim()
    assert -2 <= low < 0 and 100 < high <= 102
    assert min(axes.get_yticks()) >= 0 and max(axes.get_yticks()) == 100


def test_several_tasks_are_on_one_page_each_with_its_verdict() -> None:
    """One of them may be called like the task of the test examples."""
    results = made(speed=1.5) | {"tasks": {"chain": made(skill=0.2) | {"task": "chain"}, "sudoku": made(speed=0.75)}}
    page, text = html_report(results, 3 * [PLOTS | {"throughput": PLOTS["pareto"]}]), markdown(results)
    for shown in (page, text, terminal(results)):
        for one in (results, *results["tasks"].values()):
            assert verdict(one).split(". ")[0] in plain(shown)
    best = max(p["accuracy"] for p in results["tasks"]["chain"]["arms"][1]["curve"])
    assert f"{100 * best:.1f} (" in text.split("| chain |")[1].split("\n")[0]
    assert "Task sudoku (evaluate.tasks)" in page and page.count("<picture>") == 6


def plain(page: str) -> str:
    """Without tags and definitions."""
    shown = re.sub(r"<span class=\"meaning\".*?</span>", "", page)
    return html.unescape(re.sub(r"<[^>]*>", "", shown))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_whole_page_in_both_schemes(browser: Any, scheme: str, tmp_path: Path) -> None:
    results = made()
    (tmp_path / "report.html").write_text(html_report(results, [plots_of(results)]))
    tab = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
    urls: list[str] = []
    tab.on("request", lambda request: urls.append(request.url))
    tab.goto((tmp_path / "report.html").as_uri())
    assert all(url.startswith(("file:", "data:")) for url in urls)
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    sizes = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert sizes == [800, 800]
    shown = tab.evaluate("[...document.images].map(image => image.currentSrc)")
    look = Look(dark=scheme == "dark", narrow=True)
    assert base64.b64decode(shown[0].partition(",")[2]) == plot(results, "pareto", look)
    tab.close()


@pytest.mark.parametrize(
    ("grader", "differ", "words"),
    [
        ("default", 7, "default grader; the official grader judges 7 of 600 "),
        ("official", 0, "official grader; the default grader judges 0 of 600 "),
        ("default", None, "the only grader of the task sudoku"),
    ],
)
def test_page_and_terminal_say_which_grader_judged(grader: str, differ: int | None, words: str) -> None:
    results = made(grader=grader, differ=differ)
    assert words in page_of(results) and words in terminal(results)


def test_results_of_older_releases_are_shown_without_a_grader() -> None:
    results = made()
    del results["grader"]
    assert "grader" not in page_of(results) and "grader" not in terminal(results)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"resolved": 0.4, "chosen": 0.3, "both": 0.001}, "both: 0.001. No gain is to be expected"),
        ({"resolved": 0.45, "chosen": 0.41, "both": 0.041}, "both: 0.041. A gain is likely"),
        ({"predictions": 3, "resolved": 0.45, "chosen": 0.41}, "An older release measured this"),
        ({}, "both: 0.000. No gain is to be expected"),  # nothing was discarded
    ],
)
def test_page_and_terminal_say_what_the_baseline_throws_away(found: dict[str, float], words: str) -> None:
    results = made() | {"thrown_away": {"prompts": 64, **found}}
    assert all(words in " ".join(plain(shown).split()) for shown in (page_of(results), markdown(results)))
    assert words in " ".join(terminal(results).split())
    assert "SeqD here, 64 prompts" in page_of(results) and "throws away" not in terminal(made())
