"""The page for everyone: contrast, focus rings, names, and nothing cut, at three widths, in light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rcd_core.tasks import get_task
from tests.pipelines.serving.http.page import Page
from tests.pipelines.serving.served_app import MODEL, Served, served

SUDOKU = get_task("sudoku").problem(get_task("sudoku").synthetic(3, "test", 0)).prompt
EXAMPLE = {"path": "/v1/completions", "body": {"model": MODEL, "prompt": SUDOKU, "infill": True}}
# Texts with less contrast to what is behind them than WCAG's AA asks: 4.5, or 3 for large ones.
PALE = """() => {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgba(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const written = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!written || !element.checkVisibility() || element.closest("option, :disabled")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(style.color), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const what = `${element.className} ${element.textContent.trim()}`;
    if (contrast < (large ? 3 : 4.5)) pale.push(`${what}: ${contrast.toFixed(2)}`);
  }
  return pale;
}"""
CUT = """() => [...document.querySelectorAll(
    "th, td:not(:nth-child(2)), .token, .inspector .share, button, label, dd, dt, h2, .facts, .verdict"
  )].filter((e) => e.checkVisibility() && (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline"
    || e.getBoundingClientRect().right > innerWidth + 0.5))
  .map((e) => `${e.className} ${e.textContent.trim()}`)"""


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served(about={"example": EXAMPLE}, task="sudoku") as app:
        yield app


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_every_text_can_be_read_and_nothing_is_cut(browser: Any, app: Served, width: int, scheme: str) -> None:
    page = Page(browser, app.url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.tab.evaluate("document.querySelector('#more').open = true")
    page.run()
    page.ended()
    for number in (0, 2, int(page.tab.get_attribute("#pass", "max") or 0)):
        page.go_to(number)
        page.tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        page.tab.locator(".canvas").first.locator(".token").nth(2).hover()
        page.tab.wait_for_timeout(200)  # colours change slowly
        assert page.tab.evaluate(PALE) == [], number
        assert page.tab.evaluate(CUT) == [], number
        assert page.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.tab.close()
    assert page.complaints == []


def test_what_has_the_focus_is_marked_and_said(browser: Any, app: Served) -> None:
    page = Page(browser, app.url)
    page.run()
    page.ended()
    page.tab.focus(".skip")
    seen = []
    for _ in range(40):
        page.tab.keyboard.press("Tab")
        what, ring, name = page.tab.evaluate(
            """() => {
              const e = document.activeElement, style = getComputedStyle(e);
              const name = e.ariaLabel || e.labels?.[0]?.textContent || e.textContent;
              return [e.id || e.name || e.className || e.tagName, style.outlineStyle, name.trim()];
            }"""
        )
        seen.append(what)
        if what == "BODY":  # past the last one
            break
        assert ring != "none" or what == "outputs", what
        assert name, what
    wanted = "prompt run example model compare trace_candidates play pass pace save open"
    assert set(wanted.split()) <= set(seen)
    assert seen.count("canvas board") == 2
    page.tab.close()
    assert page.complaints == []
