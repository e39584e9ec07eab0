"""What the page says about a token, in a real browser: its candidates, by mouse, tap and keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rcd_core.tasks.base import MASK_TEXT
from tests.pipelines.serving.http.page import END_S, Page
from tests.pipelines.serving.served_app import MODEL, Served, served

PUZZLE = "#" + "12.4..3.2.4..32.".replace(".", MASK_TEXT)
EXAMPLE = {"path": "/v1/completions", "body": {"model": MODEL, "prompt": PUZZLE, "infill": True}}
CANVAS, FACTS, ITEMS = (f".panel:first-child {part}" for part in (".canvas", ".inspector .facts", ".inspector li"))


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served(about={"example": EXAMPLE}, baseline=False) as app:
        yield app


@pytest.fixture
def page(browser: Any, app: Served) -> Iterator[Page]:
    page = Page(browser, app.url, has_touch=True)
    yield page
    page.tab.close()
    assert page.complaints == []


def steps_of(app: Served, prompt: str, **body: Any) -> list[dict[str, Any]]:
    request = {"model": MODEL, "prompt": prompt, "return_trace": "steps", "trace_candidates": 5, **body}
    answer = httpx.post(f"{app.url}/v1/completions", json=request, timeout=END_S).raise_for_status().json()
    return list(answer["choices"][0]["rcd"]["steps"])


def guess_in(steps: list[dict[str, Any]]) -> tuple[int, dict[str, Any], int]:
    """(pass, its step, number among `masked` of a position that it leaves masked)."""
    for number, step in enumerate(steps, start=1):
        for n, position in enumerate(step["masked"]):
            if position not in step["committed"]:
                return number, step, n
    raise AssertionError("every pass commits all it predicts")


def shown(page: Page) -> list[tuple[str, float]]:
    """(text, probability) of the candidates on display."""
    pairs = zip(page.texts(f"{ITEMS} .text"), page.texts(f"{ITEMS} .share"), strict=True)
    return [(text, float(share.removeprefix("<").removesuffix(" %")) / 100) for text, share in pairs]


def visible(text: str) -> str:
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return ("␣" + text[1:] if text.startswith(" ") else text) or "·"


def test_hover_shows_the_candidates_of_a_position_and_follows_the_passes(page: Page, app: Served) -> None:
    steps = steps_of(app, PUZZLE, infill=True)
    number, step, n = guess_in(steps)
    page.run()
    assert page.bodies[0]["trace_candidates"] == 5
    page.ended()
    page.go_to(number)
    masks = sorted({p for s in steps for p in s["masked"]})
    cell = [i for i, cell in enumerate("12.4..3.2.4..32.") if cell == "."][masks.index(step["masked"][n])]
    assert "Hover" in page.texts(FACTS)[0] and page.texts(ITEMS) == []
    page.tab.hover(f"{CANVAS} .token >> nth={cell}")
    facts = page.texts(FACTS)[0]
    assert facts.startswith(f"Row {cell // 4 + 1}, column {cell % 4 + 1}: masked, pass {number}.")
    assert f"Confidence {step['confidence'][n]:.2f}" in facts and f"alpha {step['alpha'][n]:.2f}" in facts
    expected = [(visible(one["text"])[-1:], one["probability"]) for one in step["candidates"][n]]
    assert [(text[-1:], share) for text, share in shown(page)] == [
        (text, pytest.approx(share, abs=0.0051)) for text, share in expected
    ]
    page.go_to(len(steps))
    assert "committed in pass" in page.texts(FACTS)[0], "the same token, in the pass on display"
    page.tab.hover("h1")
    assert "Hover" in page.texts(FACTS)[0] and page.texts(ITEMS) == []


def test_arrow_keys_and_taps_choose_a_token(page: Page) -> None:
    page.run()
    page.ended()
    page.go_to(1)
    page.tab.focus(CANVAS)
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Shift+Tab")  # back, by keyboard
    first = page.texts(FACTS)[0]
    assert first.startswith("Row ") and ("masked" in first or "committed" in first or "given" in first)
    page.tab.keyboard.press("Home")
    assert page.texts(FACTS)[0] == "Row 1, column 1: given."
    for key, place in (("ArrowRight", "Row 1, column 2"), ("ArrowDown", "Row 2, column 2"), ("End", "Row 4, column 4"),
                       ("ArrowDown", "Row 4, column 4"), ("ArrowUp", "Row 3, column 4"),
                       ("ArrowLeft", "Row 3, column 3")):  # fmt: skip
        page.tab.keyboard.press(key)
        assert page.texts(FACTS)[0].startswith(place), key
    assert page.tab.locator(f"{CANVAS} .inspected").count() == 1
    ring = page.tab.evaluate(f"getComputedStyle(document.querySelector('{CANVAS} .inspected')).outlineStyle")
    assert ring == "solid"
    assert page.tab.get_attribute(".inspector", "aria-live") == "polite"
    page.tab.keyboard.press("Escape")
    assert page.tab.locator(f"{CANVAS} .inspected").count() == 0 and "Hover" in page.texts(FACTS)[0]
    page.tab.tap(f"{CANVAS} .token >> nth=2")
    assert page.texts(FACTS)[0].startswith("Row 1, column 3") and len(page.texts(ITEMS)) == 5


def test_a_text_has_positions_and_the_server_is_asked_for_as_many_candidates_as_wanted(page: Page, app: Served) -> None:
    steps = steps_of(app, "the fox", trace_candidates=2)
    number, step, n = guess_in(steps)
    page.tab.check("input[value=completion]")
    page.tab.fill("#prompt", "the fox")
    for wanted, found in ((2, 2), (0, 0)):
        page.tab.fill("[name=trace_candidates]", str(wanted))
        page.run()
        page.ended()
        assert page.bodies[-1]["trace_candidates"] == wanted
        page.go_to(number)
        page.tab.hover(f"{CANVAS} .guess >> nth=0")
        assert page.texts(FACTS)[0].startswith(f"Position {step['masked'][n]}: masked")
        assert len(page.texts(ITEMS)) == found


def test_candidates_are_never_markup(page: Page) -> None:
    page.tab.evaluate(
        """async () => {
          const { Inspector } = await import("/playground/inspector.js");
          const box = document.querySelector("#panel").content.querySelector(".inspector").cloneNode(true);
          const canvas = document.createElement("div");
          canvas.innerHTML = '<span class="token" data-index="0">x</span>';
          document.body.append(canvas, box);
          const inspector = new Inspector(canvas, box, 0);
          const candidates = [{ text: "<img src=x onerror=alert(1)>", probability: 1 }];
          inspector.update([{ state: "guess", position: 3, pass: 1, confidence: 1, entropy: 0, alpha: 0, candidates }]);
          canvas.firstChild.click();
        }"""
    )
    assert page.texts("body > .inspector .text") == ["<img src=x onerror=alert(1)>"]
    assert page.tab.locator("body > .inspector img").count() == 0
