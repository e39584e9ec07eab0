"""Contents and definitions of a page, in a real browser: on hover, by keyboard and by touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.report.evaluation import html_report, plots_of
from pipelines.report.glossary import TERMS, Page
from tests.pipelines.report.made_results import made


def test_each_term_is_marked_once_in_a_section_and_text_is_escaped() -> None:
    page = Page()
    assert page.section("One part") == "one-part"
    marked = page.define("SeqD <b> and SeqD, tokens per pass")
    assert marked.count('class="term"') == 2 and "&lt;b&gt;" in marked
    assert page.define("SeqD") == "SeqD"
    assert page.section("One part", part=True) == "one-part-1"
    assert 'class="term"' in page.define("SeqD")
    assert [term for term, _ in page.definitions()] == ["SeqD", "tokens per pass"]
    assert "term" not in page.define("SeqD-like, tokens/sec")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = made()
    file: Path = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html_report(results, [plots_of(results)]))
    return file.as_uri()


def test_the_contents_lead_to_every_section(browser: Any, page: str) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(page)
    links = tab.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))")
    headings = tab.evaluate("[...document.querySelectorAll('h2')].map(h => h.id)")
    assert links == headings and len(set(links)) == len(links) > 5
    verdict, contents = (tab.locator(where).bounding_box()["y"] for where in (".verdict", "nav"))
    assert verdict < contents
    tab.close()


@pytest.mark.parametrize("way", ["hover", "keyboard", "touch"])
def test_a_definition_is_shown(browser: Any, page: str, way: str) -> None:
    context = browser.new_context(has_touch=way == "touch", viewport={"width": 390, "height": 800})
    tab = context.new_page()
    tab.goto(page)
    term = tab.locator(".term").first
    meaning = term.locator(".meaning")
    assert not meaning.is_visible()
    if way == "hover":
        term.hover()
    elif way == "touch":
        term.tap()
    else:
        tab.keyboard.press("Tab")
    assert meaning.is_visible() and TERMS[term.evaluate("e => e.firstChild.textContent")] in meaning.text_content()
    box = meaning.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 800
    context.close()


def test_a_phone_has_the_name_of_every_figure_beside_it(browser: Any, page: str) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.goto(page)
    table = tab.locator("table", has_text="AUP over tokens per pass").first
    assert not table.locator("thead").is_visible()
    labels = table.locator("tbody tr").first.locator(".label").all_inner_texts()
    assert labels[1] == "AUP over tokens per pass"
    ends = tab.evaluate("[...document.querySelectorAll('td')].map(cell => cell.getBoundingClientRect().right)")
    assert len(ends) > 100 and max(ends) <= 390
    tab.set_viewport_size({"width": 1280, "height": 800})
    assert table.locator("thead").is_visible() and not table.locator(".label").first.is_visible()
    tab.close()
