"""Traces as files, in a real browser: saved by the page, opened by chooser and drop, and by `rcd trace`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rcd_core.tasks import get_task
from rcd_core.tasks.base import MASK_TEXT
from tests.pipelines.serving.http.page import END_S, Page
from tests.pipelines.serving.served_app import MODEL, Served, served

SUDOKU = get_task("sudoku").problem(get_task("sudoku").synthetic(3, "test", 0)).prompt
EXAMPLE = {"path": "/v1/completions", "body": {"model": MODEL, "prompt": SUDOKU, "infill": True}}


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served(about={"example": EXAMPLE}, task="sudoku") as app:
        yield app


def state(page: Page) -> list[Any]:
    """All that the panels show."""
    parts = ("h2", ".note", "dd", ".canvas .token", ".answer", ".verdict", ".rest")
    return [page.texts(f".panel {part}") for part in parts]


def save(page: Page, path: Path) -> Path:
    with page.tab.expect_download() as download:
        page.tab.click("#save")
    download.value.save_as(path)
    return path


def drop(page: Page, *files: Path) -> None:
    page.tab.evaluate(
        """(files) => {
          const data = new DataTransfer();
          for (const [name, text] of files) data.items.add(new File([text], name, { type: "application/json" }));
          for (const type of ["dragenter", "dragover", "drop"]) {
            document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
          }
        }""",
        [(file.name, file.read_text()) for file in files],
    )


@pytest.mark.parametrize("mode", ["infill", "completion"])
def test_a_saved_trace_opens_again_with_every_pass(page: Page, tmp_path: Path, mode: str) -> None:
    if mode == "completion":
        page.tab.check("input[value=completion]")
        page.tab.fill("#prompt", "the fox")
    assert page.tab.is_disabled("#save")
    page.run()
    page.ended()
    states = {}
    for number in range(int(page.tab.get_attribute("#pass", "max") or 0) + 1):
        page.go_to(number)
        states[number] = state(page)
    file = save(page, tmp_path / "trace.json")
    assert json.loads(file.read_text())["rcd_trace"] == 1
    page.tab.reload()
    page.wait("#model option")
    page.tab.set_input_files("#file", file)
    page.wait("#status:has-text('Opened trace.json')")
    page.tab.select_option("#pace", "0")
    page.ended()
    for number, seen in states.items():
        page.go_to(number)
        text = [part if number == len(states) - 1 else [] for part in seen[4:5]]
        assert state(page)[:4] == seen[:4] and state(page)[5:] == seen[5:]
        assert not text[0] or state(page)[4] == text[0], "the text, at the end"
    assert page.texts(".panel:first-child .prompt") == (["the fox"] if mode == "completion" else [""])
    assert page.tab.locator(".canvas.board").count() == (2 if mode == "infill" else 0)
    page.tab.locator(".canvas").first.locator(".token.committed").first.hover()
    assert len(page.texts(".panel:first-child .inspector li")) == 5
    assert page.bodies == page.bodies[:2], "nothing was decoded again"


def test_a_dropped_trace_opens_and_what_is_none_is_an_alert(page: Page, tmp_path: Path) -> None:
    page.run()
    page.ended()
    good = save(page, tmp_path / "good.json")
    before = state(page)
    trace = json.loads(good.read_text())
    short = json.loads(good.read_text())
    short["answers"][0]["steps"][0]["entropy"].pop()
    bad = {
        "picture.png": ("\x89PNG", "not JSON"),
        "run.json": ('{"name": "sudoku-reference"}', "rcd_trace"),
        "list.json": ("[1]", "rcd_trace"),
        "newer.json": (json.dumps(trace | {"rcd_trace": 2}), "rcd_trace is 2"),
        "empty.json": (json.dumps(trace | {"answers": []}), "answers"),
        "short.json": (json.dumps(short), "answers[0].steps[0]"),
        "null.json": (json.dumps(trace | {"answers": [None]}), "answers[0]"),
    }
    for name, (text, reason) in bad.items():
        file = tmp_path / name
        file.write_text(text)
        drop(page, file)
        page.wait(f"#alert:has-text('{name}')")
        [alert] = page.texts("#alert")
        assert reason in alert and "rcd generate --trace_file" in alert
    assert state(page) == before, "what was on display stays"
    drop(page, good, good)
    page.wait("#alert:has-text('2 files')")
    drop(page, good)
    page.wait("#status:has-text('Opened good.json')")
    page.ended()
    assert state(page) == before and page.texts("#alert") == [""]
    assert not page.tab.evaluate("document.body.classList.contains('dropping')")


def test_rcd_trace_serves_the_page_with_the_file_and_ends_by_itself(page: Page, browser: Any, tmp_path: Path) -> None:
    page.run()
    page.ended()
    before = state(page)
    file = save(page, tmp_path / "sudoku.json")
    words = [sys.executable, "-m", "pipelines.cli.main", "trace", str(file), "--idle_minutes", "0.2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}playground/../trace.py").status_code == 404
        assert "default-src 'none'" in httpx.get(url).headers["content-security-policy"]
        viewer = Page(browser, url, loaded=False)
        viewer.wait("#status:has-text('Opened sudoku.json')")
        viewer.ended()
        assert state(viewer) == before and viewer.tab.locator(".canvas.board").count() == 2
        assert not viewer.tab.is_visible("#form") and viewer.tab.is_visible("#open")
        viewer.tab.close()
        assert viewer.complaints == []
        begun = time.monotonic()
        assert process.wait(END_S) == 0
        assert time.monotonic() - begun > 5, "12 seconds without a request"


def test_text_of_a_trace_is_never_markup(page: Page, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    step = {"masked": [1], "argmax": [5], "argmax_text": [evil], "confidence": [0.5], "entropy": [1], "alpha": [0],
            "committed": [1], "candidates": [[{"text": evil, "id": 5, "probability": 0.5}]]}  # fmt: skip
    rcd = {"forwards": {"denoise": 1}, "tokens_per_forward": 1, "seconds": 1}
    answer = {"title": evil, "note": evil, "prompt": evil, "template": None, "text": evil, "rcd": rcd, "steps": [step]}
    file = tmp_path / "evil.json"
    file.write_text(json.dumps({"rcd_trace": 1, "answers": [answer, answer | {"template": evil + MASK_TEXT}]}))
    page.tab.set_input_files("#file", file)
    page.wait("#status:has-text('Opened evil.json')")
    page.ended()
    page.tab.locator(".canvas .token").first.click()
    assert page.tab.locator("#panels img").count() == 0
    assert page.texts(".panel h2") == [evil, evil] and page.texts(".inspector .text")[0] == evil
