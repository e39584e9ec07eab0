"""The playground: its files, and the page in a real browser over small models."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import httpx
import pytest

from pipelines.serving.http.page_files import FILES
from rcd_core import Decoder
from rcd_core.decoding.engine import Engine
from rcd_core.tasks import get_task
from rcd_core.tasks.base import MASK_TEXT
from tests.pipelines.serving.http.page import END_S, Page
from tests.pipelines.serving.served_app import BASELINE, MODEL, PLAIN, SETTINGS, Served, served

PUZZLE = "#" + "12.4..3.2.4..32.".replace(".", MASK_TEXT)
EXAMPLE = {"path": "/v1/completions", "body": {"model": MODEL, "prompt": PUZZLE, "infill": True}}


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served(about={"example": EXAMPLE}) as app:
        yield app


def complete(app: Served, prompt: str, **body: Any) -> dict[str, Any]:
    """The whole answer to the request that the page streams."""
    answer = httpx.post(f"{app.url}/v1/completions", json={"model": MODEL, "prompt": prompt, **body}, timeout=END_S)
    return dict(answer.raise_for_status().json())


# -- files


def test_the_page_and_its_files_use_only_this_server(app: Served) -> None:
    page = httpx.get(app.url)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text)
    assert len(links) == 3
    types = {"js": "javascript", "css": "css", "svg": "svg", "html": "html"}
    for path in {*links, *(f"playground/{file.name}" for file in FILES.iterdir() if file.suffix != ".png")}:
        file = httpx.get(f"{app.url}/{path}")
        assert file.status_code == 200 and types[path.rpartition(".")[2]] in file.headers["content-type"]
        assert file.headers["x-content-type-options"] == "nosniff"
        assert "http" not in file.text.replace("http://www.w3.org/2000/svg", "")
    assert httpx.get(f"{app.url}/playground/../playground.py").status_code == 404
    assert not [path for path in httpx.get(f"{app.url}/openapi.json").json()["paths"] if "playground" in path]


def test_models_are_listed_with_their_defaults_and_baseline(app: Served) -> None:
    models = httpx.get(f"{app.url}/playground/models.json").json()["models"]
    assert [(m["id"], m["baseline"]) for m in models] == [(MODEL, BASELINE), (BASELINE, None)]
    assert models[0]["settings"] == asdict(SETTINGS)


# -- in a browser


def test_denoising_is_drawn_and_replayed_pass_by_pass(page: Page, app: Served) -> None:
    steps = complete(app, PUZZLE, infill=True, return_trace="steps")["choices"][0]["rcd"]["steps"]
    assert page.tab.input_value("#prompt") == PUZZLE  # the server's example
    page.tab.select_option("#pace", "120")
    page.run()
    page.ended()
    first = {position: n for n, position in enumerate(sorted({p for s in steps for p in s["masked"]}))}
    filled: dict[int, str] = {}
    for number, step in enumerate(steps, start=1):
        page.go_to(number)
        filled |= {first[p]: t for p, t in zip(step["masked"], step["argmax_text"], strict=True)
                   if p in step["committed"]}  # fmt: skip
        assert page.tokens(1, ".committed") == [filled[n] for n in sorted(filled)]
        assert len(page.tokens(1, ".fresh")) == len(step["committed"])
        assert len(page.tokens(1, ".guess")) == len(step["masked"]) - len(step["committed"])
        assert page.texts("#pass-number")[0].startswith(f"{number} / ")
        label = page.tab.get_attribute(".panel:first-child .canvas", "aria-label")
        assert label == f"After pass {number}: {len(filled)} tokens committed, {len(step['committed'])} of them in " + (
            f"this pass, {PUZZLE.count(MASK_TEXT) - len(filled)} masked"
        )
    page.go_to(0)
    assert len(page.tokens(1, ".unseen")) == PUZZLE.count(MASK_TEXT)
    assert "".join(page.tokens(1, ".given")) == PUZZLE.replace(MASK_TEXT, "").removeprefix("#")
    page.tab.click("#play")
    page.ended()
    assert len(page.tokens(1, ".committed")) == PUZZLE.count(MASK_TEXT)


def test_a_token_is_never_broken_over_two_lines(page: Page) -> None:
    """Most begin with a space, at which a browser likes to break: its box would be in two pieces."""
    page.tab.set_viewport_size({"width": 360, "height": 740})
    page.tab.fill("#prompt", f"the quick fox {MASK_TEXT * 120}")
    page.run()
    page.ended()
    lines = r"(boxes) => boxes.filter((b) => !/\n/.test(b.textContent)).map((b) => b.getClientRects().length)"
    for number in (1, 2, 1000):
        page.go_to(number)
        found = page.tab.eval_on_selector_all(".panel:first-child .canvas .token:not(.given)", lines)
        assert len(found) > 60 and set(found) == {1}
        canvas = page.tab.locator(".canvas").first
        assert canvas.evaluate("(canvas) => canvas.scrollWidth <= canvas.clientWidth")


def test_the_first_view_decodes_an_example_and_says_whether_it_is_right(browser: Any) -> None:
    """In step with the replay: before the last pass there is neither the whole text nor a verdict."""
    puzzle = get_task("sudoku").problem(get_task("sudoku").synthetic(3, "test", 0)).prompt
    body = {"model": MODEL, "prompt": puzzle, "infill": True}
    with served(about={"example": {"path": "/v1/completions", "body": body}}, task="sudoku") as other:
        page = Page(browser, other.url, runs=True)
        page.ended()
        assert [b["prompt"] for b in page.bodies] == [puzzle] * 2, "the model and its baseline"
        assert "Sudoku" in page.texts("#trained")[0] and "#" in page.texts("#trained")[0]
        answer = complete(other, puzzle, infill=True)["choices"][0]
        assert answer["rcd"]["valid"] is False  # the model is random
        assert page.texts(".verdict")[0].startswith("✗") and page.texts(".answer")[0] == answer["text"]
        page.go_to(1)
        assert page.texts(".verdict") == ["", ""] and page.texts(".answer")[0] != answer["text"]
        page.tab.fill("#prompt", "")
        page.tab.click("#example")
        example = get_task("sudoku").problem(get_task("sudoku").synthetic(0, "test", 0)).prompt
        assert page.tab.input_value("#prompt") == example and page.tab.is_checked("input[value=infill]")
        page.tab.check("input[value=chat]")
        assert page.tab.input_value("#prompt") == "", "masks are nothing to chat about"
        page.tab.check("input[value=infill]")
        assert page.tab.input_value("#prompt") == example
        page.tab.focus("[name=confidence_threshold]")
        assert "sure" in page.texts("#explain")[0]
        page.tab.close()
        assert page.complaints == []


def test_the_shade_of_a_guess_grows_with_its_entropy(page: Page, app: Served) -> None:
    steps = complete(app, "the fox", return_trace="steps")["choices"][0]["rcd"]["steps"]
    number, step = max(enumerate(steps, start=1), key=lambda n: len(n[1]["masked"]) - len(n[1]["committed"]))
    page.tab.check("input[value=completion]")
    page.tab.fill("#prompt", "the fox")
    page.run()
    page.ended()
    page.go_to(number)
    guesses = page.tab.locator(".panel:first-child .guess")
    shades = guesses.evaluate_all("spans => spans.map(s => Number(s.style.getPropertyValue('--u')))")
    colours = guesses.evaluate_all("spans => spans.map(s => getComputedStyle(s).backgroundColor)")
    entropies = [e for e, p in zip(step["entropy"], step["masked"], strict=True) if p not in step["committed"]]
    assert sorted(range(len(shades)), key=shades.__getitem__) == sorted(range(len(shades)), key=entropies.__getitem__)
    assert len(set(colours)) > 3 and len(shades) == len(entropies)


def test_the_model_is_compared_with_its_baseline(page: Page, app: Served) -> None:
    page.run()
    page.ended()
    assert page.texts(".panel h2") == [MODEL, BASELINE]
    for panel, model, settings in ((1, MODEL, SETTINGS), (2, BASELINE, PLAIN)):
        [out] = Decoder(app.engines[model].model).infill([app.ids(PUZZLE)], settings)
        tokens, passes = len(out.token_ids), out.num_forwards.denoise
        assert page.figures(panel) == [passes, tokens, pytest.approx(tokens / passes, abs=0.0051)]
        assert page.texts(f".panel:nth-child({panel}) .answer") == [app.tokenizer.decode(out.canvas_ids)]
        assert f"{model}: {passes} passes" in page.texts("#status")[0]


def test_without_a_baseline_the_model_is_compared_with_itself(browser: Any) -> None:
    with served(baseline=False) as app:
        page = Page(browser, app.url)
        page.tab.fill("#prompt", f"the {MASK_TEXT}{MASK_TEXT} dog{MASK_TEXT}")  # switches to infill by itself
        page.run()
        assert page.texts(".panel h2") == [MODEL, f"{MODEL}, residual off"]
        assert "same checkpoint" in page.texts(".panel .note")[1]
        assert [body.get("residual") for body in page.bodies] == [None, False]
        assert page.complaints == []
        page.tab.close()


def test_settings_reach_the_model_under_their_own_names(page: Page, app: Served) -> None:
    page.tab.check("input[value=completion]")
    page.tab.fill("#prompt", "the fox")
    page.tab.uncheck("#compare")
    numbers = {"confidence_threshold": 0.4, "block_length": 4, "max_tokens": 12, "temperature": 0.7, "seed": 3}
    for name, value in numbers.items():
        page.tab.fill(f"[name={name}]", str(value))
    page.tab.select_option("[name=residual]", "true")
    page.tab.select_option("[name=start]", "self")
    page.tab.select_option("[name=policy]", "entropy_bounded")
    page.tab.fill("[name=entropy_bound]", "0.35")
    page.run()
    page.ended()
    [body] = page.bodies
    choices = {"residual": True, "start": "self", "policy": "entropy_bounded", "entropy_bound": 0.35}
    other = {"model", "prompt", "stream", "stream_options", "return_trace", "trace_candidates"}
    assert {name: value for name, value in body.items() if name not in other} == {**numbers, **choices}
    settings = replace(
        SETTINGS, confidence_threshold=0.4, block_length=4, max_new_tokens=12, temperature=0.7, seed=3,
        start="self", policy="entropy_bounded", entropy_bound=0.35,
    )  # fmt: skip
    assert page.texts(".answer") == [app.text(app.ids("the fox"), settings)]
    assert page.figures(1)[1] == 12


def test_chat_falls_back_to_completion_without_a_chat_template(page: Page, browser: Any, app: Served) -> None:
    page.tab.check("input[value=chat]")
    page.tab.fill("#prompt", "the fox")
    page.run()
    assert page.texts(".answer")[0] == app.text(app.turns("the fox"), SETTINGS)
    with served(template=False, baseline=False) as other:
        fallback = Page(browser, other.url)
        fallback.tab.fill("#prompt", "the fox")
        fallback.run()
        assert fallback.texts(".answer")[0] == other.text(other.ids("the fox"), SETTINGS)
        assert fallback.tab.is_checked("input[value=completion]")
        assert "chat template" in fallback.texts("#status")[0]
        fallback.tab.close()


def test_a_refusal_is_an_alert(page: Page) -> None:
    page.tab.fill("[name=block_length]", "9999")
    page.run()
    page.wait("#alert:has-text('block_length is 9999')")
    assert page.tab.get_attribute("#alert", "role") == "alert"
    page.complaints = [text for text in page.complaints if "400 (Bad Request)" not in text]  # logged by Chromium


def test_the_page_asks_for_an_api_key(browser: Any) -> None:
    with served(baseline=False, keys=("s3cret",)) as app:
        page = Page(browser, app.url, loaded=False)
        page.wait("#alert:has-text('API key')")
        assert page.tab.evaluate("document.activeElement.id") == "key"
        page.tab.fill("#key", "wrong")
        page.tab.press("#key", "Tab")
        page.wait("#alert:has-text('Error: ')")
        page.tab.fill("#key", "s3cret")
        page.tab.press("#key", "Tab")
        page.wait("#model option")
        page.tab.fill("#prompt", "the fox")
        page.run()
        assert page.texts(".answer")[0] == app.text(app.turns("the fox"), SETTINGS)
        assert page.texts("#alert") == [""]
        page.tab.close()


def test_stop_cancels_on_the_server(page: Page, app: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def slow(engine: Engine) -> Any:
        time.sleep(0.2)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow)
    before = app.statistics()["cancelled_total"]
    page.tab.check("input[value=completion]")
    page.tab.fill("[name=max_tokens]", "160")
    page.tab.fill("#prompt", "the fox")
    page.tab.click("#run")
    page.wait(".panel .token")
    page.tab.click("#stop")
    page.wait("#status:has-text('Stopped')")
    deadline = time.monotonic() + END_S
    while app.statistics()["cancelled_total"] == before or app.statistics()["running"]:
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


def test_model_output_is_never_markup(page: Page) -> None:
    evil = f"<img src=x onerror=alert(1)>{MASK_TEXT}<script>alert(2)</script>"
    page.tab.fill("#prompt", evil)
    page.run()
    page.ended()
    assert "".join(page.tokens(1, ".given")) == evil.replace(MASK_TEXT, "")
    assert page.tab.locator("#panels img, #panels script").count() == 0


def test_the_page_works_by_keyboard_and_every_control_has_a_name(page: Page) -> None:
    page.tab.focus("#prompt")
    page.tab.keyboard.press("Control+Enter")
    page.wait("#run:enabled")
    page.ended()
    page.tab.focus("#pass")
    page.tab.keyboard.press("Home")
    page.tab.keyboard.press("ArrowRight")
    assert page.texts("#pass-number")[0].startswith("1 / ")
    assert page.tab.get_attribute("#pass", "aria-valuetext").startswith("pass 1 of ")
    unnamed = page.tab.locator("input, select, textarea, button").evaluate_all(
        "all => all.filter(e => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel).map(e => e.outerHTML)"
    )
    assert unnamed == []
    page.tab.focus(".skip")
    focused = []
    for _ in range(30):
        page.tab.keyboard.press("Tab")
        focused.append(page.tab.evaluate("document.activeElement.id || document.activeElement.name"))
    order = ["prompt", "run", "model", "compare", "confidence_threshold", "play", "pass", "pace"]
    assert [name for name in focused if name in order][: len(order)] == order
    assert page.tab.get_attribute(".answer >> nth=0", "aria-live") == "polite"
    page.tab.click("details.table summary >> nth=0")
    page.wait(".panel:first-child tbody tr")


def test_light_dark_and_narrow(browser: Any, app: Served) -> None:
    backgrounds = set()
    for context in (
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 360, "height": 740}},
    ):
        page = Page(browser, app.url, **context)
        page.run()
        backgrounds.add(page.tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        wide = page.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, f"the page is {wide} px too wide for {context}"
        assert page.complaints == []
        page.tab.close()
    assert len(backgrounds) == 2


def test_events_are_parsed_however_the_stream_is_cut(page: Page) -> None:
    result = page.tab.evaluate(
        r"""async () => {
          const { serverSentEvents, parseChunk } = await import("/playground/api.js");
          const text = ': ping\n\ndata: {"a":"ü漢"}\r\n\r\ndata:x\ndata: y\n\ndata: [DONE]\n\n';
          const bytes = new TextEncoder().encode(text);
          const all = new Set();
          for (let size = 1; size <= bytes.length; size++) {
            const stream = new ReadableStream({
              start(c) {
                for (let i = 0; i < bytes.length; i += size) c.enqueue(bytes.slice(i, i + size));
                c.close();
              },
            });
            const events = [];
            for await (const data of serverSentEvents(stream)) events.push(data);
            all.add(JSON.stringify(events));
          }
          let failed = "";
          try { [...parseChunk({ error: { message: "lost" } })]; } catch (error) { failed = error.message; }
          return [[...all], failed];
        }"""
    )
    assert result == [['["{\\"a\\":\\"ü漢\\"}","x\\ny","[DONE]"]'], "lost"]
