"""The page of a calibration."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from pipelines.report.calibration import html_page


class Tags(HTMLParser):
    """Open tags; asserts that each one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("img", "source", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_the_numbers(calibration: dict[str, Any]) -> None:
    baseline = {"discarded": calibration["discarded"]}
    page = html_page("<script>", {"target": calibration, "baseline": baseline})
    tags = Tags()
    tags.feed(page)
    assert not tags.open and page.count("<picture>") >= 4 and page.count("<h2 ") == 4
    assert f"T_res {calibration['residual_temperature']:g}" in page and f"{calibration['distance']:.4f}" in page
    assert f"{calibration['agreement']['by_progress']['js'][0]:.3f}" in page and "SeqD" in page
    assert "<script" not in page
    assert html_page("baseline", {"baseline": baseline}).count("<h2 ") == 1
