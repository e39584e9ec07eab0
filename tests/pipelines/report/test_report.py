"""results.json and how it is shown: the same words whichever arm is ahead, nothing where nothing was reached."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipelines.report.evaluation import html_report, plot, plots_of, print_tables
from pipelines.report.text import hardware, headlines
from rcd_core.errors import UserError
from rcd_core.evaluation.statistics import aup
from tests.pipelines.report.made_results import THRESHOLDS, made

PICTURES = {"pareto": (b"light", b"dark")}


def terminal(results: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_tables(results, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


# -- results.json


def test_results_are_json_and_say_what_was_measured() -> None:
    found = made()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert (found["schema_version"], found["seed"], found["num_problems"], found["num_samples"]) == (2, 3, 60, 1)
    assert found["thresholds"] == list(THRESHOLDS)
    seqd, rcd = found["arms"]
    assert (seqd["reference_weight"], seqd["reference_flops_weight"]) == (0.0, 0.0)
    assert (rcd["reference_weight"], rcd["reference_flops_weight"]) == pytest.approx((0.45, 0.4))
    assert "confidence_threshold" not in rcd["decode"] and rcd["decode"]["alpha_scale"] == 1.7312
    assert seqd["curve"][0]["tokens_per_second"] == pytest.approx(120 / 0.01)
    assert found["statistics"]["leading_measure"] == "tokens_per_pass"


def test_the_reference_counts_in_one_measure_and_not_in_the_other() -> None:
    """At 1.5 times the speed, threshold 0.6: 8 passes and one of the reference for 120 tokens."""
    point = made()["arms"][1]["curve"][0]
    assert point["tokens_per_forward"] == 15
    assert point["tokens_per_pass"] == pytest.approx(120 / 8.4)
    assert point["tokens_per_pass_by_parameters"] == pytest.approx(120 / 8.45)
    best = {measure: made()["comparisons"][0][measure]["best"] for measure in ("tokens_per_pass", "tokens_per_forward")}
    assert best["tokens_per_forward"]["ratio"]["value"] == pytest.approx(1.5)
    assert best["tokens_per_pass"]["ratio"]["value"] == pytest.approx(60 / 40.4)


def test_the_area_is_that_of_the_curve() -> None:
    found = made()
    for arm in found["arms"]:
        rate, accuracy = (np.array([p[name] for p in arm["curve"]]) for name in ("tokens_per_pass", "accuracy"))
        best = found["statistics"]["aup"]["best_accuracy"]
        assert arm["aup"]["tokens_per_pass"]["value"] == pytest.approx(float(aup(rate, accuracy, best)))


def test_samples_change_the_interval_and_it_says_so() -> None:
    found = made(samples=3)
    assert found["num_samples"] == 3 and "standard errors" in found["statistics"]["accuracy_interval"]
    assert len(found["arms"][0]["curve"][0]["accuracy_by_sample"]) == 3
    assert "3 samples of each" in html_report(found, PICTURES) and "sample 2" in html_report(found, PICTURES)
    assert "Wilson" in made()["statistics"]["accuracy_interval"]


# -- words


@pytest.mark.parametrize(("speed", "low", "high"), [(1.5, 1.4, 1.6), (0.75, 0.7, 0.8)])
def test_a_loss_is_told_like_a_win(speed: float, low: float, high: float) -> None:
    (subject, sentences) = headlines(made(speed=speed))[0]
    assert subject == "RCD, zero start against SeqD"
    best = sentences[1]
    assert best.startswith("At the best accuracy of SeqD, 90 %: ")
    value, rest = best.removeprefix("At the best accuracy of SeqD, 90 %: ").split(" ", 1)
    assert low < float(value) < high and rest.endswith("times the tokens per pass.")
    assert sentences[2].endswith("points.") and sentences[2].count(" % against ") == 1


def test_what_was_not_reached_gets_no_number_but_a_reason() -> None:
    worse = made(skill=0.2)
    sentences = headlines(worse)[0][1]
    assert sentences[1].endswith("no ratio, as RCD, zero start is below it at every threshold.")
    page = html_report(worse, PICTURES)
    assert "not crossed: arm below" in page and "not crossed: arm below" in terminal(worse)
    slow = headlines(made(speed=0.1))[0][1]
    assert slow[-1] == "No speed that both reach, so no difference in accuracy at equal speed."


def test_times_that_nobody_took_are_not_shown() -> None:
    untimed = made(timed=False)
    assert set(plots_of(untimed)) == {"pareto"} and set(plots_of(made())) == {"pareto", "throughput"}
    assert "not taken" in html_report(untimed, PICTURES)


# -- the page


def test_page_is_whole_and_escaped_and_prints_all_settings() -> None:
    found = made()
    page = html_report(found, plots_of(found), [("Calibration", "<p>ready</p>")])
    assert "&lt;made up&gt;" in page and "<made up>" not in page
    assert "http://" not in page and "https://" not in page and page.count('src="data:image/png') == 2
    assert "<h2>Calibration</h2><p>ready</p>" in page
    for name in found["arms"][0]["decode"]:
        assert (f">{name}<" in page) == (name != "trace"), name
    assert "1.7312" in page and "trained with dropout" in page and "swept: 0.6, 0.7, 0.8, 0.9, 1" in page
    assert hardware(found) in page and "Abacus" in hardware(found) and "seed 3" in page


def test_terminal_has_settings_and_hardware_too() -> None:
    text = terminal(made())
    assert (
        "max_new_tokens 256" in text and "alpha_scale" in text and "Abacus" in text and "0.40 of a target pass" in text
    )


def test_equal_results_give_equal_plots() -> None:
    assert plot(made(), "pareto") == plot(made(), "pareto")
    assert len({plot(made(), name, dark) for name in ("pareto", "throughput") for dark in (False, True)}) == 4


def test_an_arm_with_a_gap_is_refused() -> None:
    from tests.pipelines.report import made_results

    table = made_results.answers("seqd", 1.0, 0.4).slice(1)
    with pytest.raises(UserError, match="every sample of every example"):
        made_results.analyse(
            recipe="r", task="t", seed=0, arms=[made_results.info("seqd", "SeqD")], table=table,
            settings={"seqd": {}}, accuracy_levels=(), hardware={},
        )  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_whole_in_both_schemes_on_a_phone(browser: Any, scheme: str, tmp_path: Path) -> None:
    found = made()
    (tmp_path / "report.html").write_text(html_report(found, plots_of(found)))
    tab = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / "report.html").as_uri())
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    sizes = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert sizes == [1200, 1200]
    shown = tab.evaluate("[...document.images].map(image => image.currentSrc)")
    assert (shown[0] == tab.evaluate("document.images[0].src")) == (scheme == "light")
    tab.close()
