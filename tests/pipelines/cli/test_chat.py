"""`rcd chat` against the real HTTP interface over small models, and against servers that fail."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from pipelines.cli import main as cli
from pipelines.cli.chat import _request
from pipelines.cli.flags import ChatFlags
from pipelines.cli.live_view import TraceCanvas, printable
from pipelines.client import Endpoint
from rcd_core import Decoder
from rcd_core.decoding.engine import Engine
from rcd_core.tasks.base import MASK_TEXT
from tests.pipelines.cli.terminal import in_terminal
from tests.pipelines.serving.served_app import BASELINE, MODEL, PLAIN, SETTINGS, Served, listening, served


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served() as app:
        yield app


def chat(*arguments: Any) -> int:
    return cli.main(["chat", *map(str, arguments)])


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# -- piped


def test_what_is_piped_is_one_turn_and_stdout_holds_only_the_answer(
    app: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "the fox\nthe dog\n")
    assert chat("--url", app.url) == 0
    out, err = capsys.readouterr()
    assert out == app.text(app.turns("the fox\nthe dog"), SETTINGS) + "\n"
    assert re.fullmatch(r"\d+ tokens in \d+ passes · \d+\.\d\d tokens per forward · besides 1 prefill · .* s\n", err)


def test_flags_choose_the_model_and_its_settings(app: Served, capsys: pytest.CaptureFixture[str]) -> None:
    settings = replace(PLAIN, temperature=0.9, seed=5, policy="low_confidence_static", denoising_steps=4)
    flags = ("--temperature", 0.9, "--seed", 5, "--policy", "low_confidence_static", "--denoising-steps", 4)
    assert chat("--url", app.url + "/v1/", "--model", BASELINE, "--raw", "--prompt", "the fox", *flags) == 0
    out = capsys.readouterr().out
    assert out == app.text(app.ids("the fox"), settings, BASELINE) + "\n"
    assert out != app.text(app.ids("the fox"), PLAIN, BASELINE) + "\n"


def test_infill_returns_the_filled_text(app: Served, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"the {MASK_TEXT}{MASK_TEXT} dog"
    assert chat("--url", app.url, "--infill", "--prompt", text, "--no-residual") == 0
    decoder = Decoder(app.engines[MODEL].model)
    [filled] = decoder.infill([app.ids(text)], replace(SETTINGS, residual=False))
    assert capsys.readouterr().out == app.tokenizer.decode(filled.canvas_ids) + "\n"


def test_a_top_k_of_0_is_sent_as_such() -> None:
    """null means the server's default."""
    flags = ChatFlags(url="http://x", decode={"top_k": 0, "temperature": 1.0})
    assert _request(flags, [{"role": "user", "content": "x"}], live=False)[1]["top_k"] == 0


# -- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--url nowhere", "--url is 'nowhere'"),
        ("--url http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("--url URL/docs", "/docs/v1/models"),
        ("--url URL --model gpt", f"--model is 'gpt'; served there: {MODEL}, {BASELINE}"),
        ("--url URL --top_k z", "--top_k"),
        ("--url URL --temperature -1", "temperature is -1.0"),
        ("--url URL --raw --infill", "--raw and --infill"),
        ("--url URL --infill --max_new_tokens 9", "--max_new_tokens"),
        ("--url URL --trace", "--trace"),
        ("--url URL --raw --prompt <|MASK|>", "infill"),
        ("--url URL --infill --prompt x", "mask token"),
        ("--url URL --prompt x --cache dual", "cache is 'dual'"),
        ("--url URL --prompt x --max_new_tokens 999", "999"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(
    app: Served, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    arguments = flags.replace("URL", app.url).split(" ")
    if "--prompt" not in arguments:
        arguments += ["--prompt", "x"]
    assert chat(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_model_without_a_chat_template(capsys: pytest.CaptureFixture[str]) -> None:
    with served(template=False, baseline=False) as app:
        assert chat("--url", app.url, "--prompt", "x") == 2
        assert "/v1/completions" in capsys.readouterr().err


def failing(*frames: bytes) -> Starlette:
    """An endpoint whose streams consist of these frames."""

    async def models(_: Any) -> JSONResponse:
        return JSONResponse({"data": [{"id": "m"}]})

    async def stream(_: Any) -> StreamingResponse:
        return StreamingResponse(iter(frames), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", stream, methods=["POST"])])


SO_FAR = b'data: {"choices": [{"text": "so far"}]}\n\n'


@pytest.mark.parametrize(
    ("frames", "out", "message"),
    [
        ([SO_FAR], "so far\n", "the stream ended"),
        ([SO_FAR, b'data: {"error": {"message": "a replica\\nwas lost"}}\n\n'], "so far\n", "a replica was lost"),
        ([b"data: <html>\n\n"], "", "not JSON"),
        ([b": ping\n\n", b"data: 3\n\n"], "", "not a JSON object"),
    ],
)
def test_a_stream_that_fails_is_never_taken_for_a_whole_one(
    frames: list[bytes], out: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(failing(*frames)) as url:
        assert chat("--url", url, "--raw", "--prompt", "x") == 2
    captured = capsys.readouterr()
    assert captured.out == out and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_key_is_sent_and_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def models(request: Any) -> Any:
        if request.headers.get("authorization") != "Bearer s3cret":
            return JSONResponse({"error": {"message": "no valid API key"}}, 401)
        return PlainTextResponse("busy", 503)

    with listening(Starlette(routes=[Route("/v1/models", models)])) as url:
        assert chat("--url", url, "--prompt", "x") == 2
        assert "set RCD_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("RCD_API_KEY", "s3cret")
        assert chat("--url", url, "--prompt", "x") == 2
        assert "answered 503" in capsys.readouterr().err


# -- in a terminal


def test_the_denoising_is_drawn_and_the_plain_text_remains(app: Served) -> None:
    screen, code = in_terminal("chat", "--url", app.url, "--raw", "--prompt", "the fox")
    assert code == 0
    lines = screen.text.splitlines()
    assert "\n".join(lines[:-1]) == printable(app.text(app.ids("the fox"), SETTINGS)).rstrip()
    assert re.match(r"\d+ tokens in \d+ passes · ", lines[-1])
    passes = [int(n) for frame in screen.frames for n in re.findall(r"(\d+) passes ·", frame)]
    assert passes == sorted(passes) and len(set(passes)) > 5
    assert len({style for style in screen.styles if "48;2;" in style}) > 3  # shades by entropy


def test_ctrl_c_cancels_the_reply_and_the_conversation_goes_on(app: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def slow(engine: Engine) -> Any:
        time.sleep(0.1)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow)
    before = app.statistics()["cancelled_total"]
    screen, code = in_terminal(
        *("chat", "--url", app.url, "--max_new_tokens", 160),
        keys=[("> ", "the fox\n"), ("9 passes", "\x03"), ("interrupted", ""), ("> ", "/exit\n")],
    )
    assert code == 0 and "Traceback" not in screen.text and "interrupted · " in screen.text
    assert app.statistics()["cancelled_total"] == before + 1
    deadline = time.monotonic() + 30
    while app.statistics()["running"]:
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


def test_a_conversation_keeps_its_history(app: Served) -> None:
    """In a terminal that cannot be drawn on."""
    screen, code = in_terminal(
        *("chat", "--url", app.url, "--max_new_tokens", 8),
        keys=[("> ", "the fox\n"), ("forward", ""), ("> ", "the dog\n"), ("forward", ""), ("> ", "/clear\n")]
        + [("> ", "the fox\n"), ("forward", ""), ("> ", "/exit\n")],
        TERM="dumb",
    )
    assert code == 0 and not screen.frames
    settings = replace(SETTINGS, max_new_tokens=8)
    first = app.text(app.turns("the fox"), settings)
    second = app.text(app.turns("the fox", first, "the dog"), settings)
    spoken = re.split(r"> [^\n]*\n", screen.text)[1:]
    said = [re.split(r"\n\d+ tokens in", part)[0] for part in spoken if "tokens in" in part]
    assert said == [printable(first), printable(second), printable(first)]
    assert second != app.text(app.turns("the dog"), settings)  # else the history had no say


# -- the canvas


def step(masked: list[int], texts: list[str], committed: list[int], entropy: float = 0.0) -> dict[str, Any]:
    return {
        "masked": masked,
        "argmax": [7] * len(masked),
        "argmax_text": texts,
        "entropy": [entropy] * len(masked),
        "committed": committed,
    }


def test_a_canvas_fills_the_masks_in_order_and_escapes_what_models_write() -> None:
    canvas = TraceCanvas(f"a{MASK_TEXT}b{MASK_TEXT}{MASK_TEXT}c\x1b")
    assert canvas.text(coloured=True).plain == "a·b··c\\x1b"
    canvas.add(step([1, 3], ["\x1b", "y"], [3], entropy=0.0))
    assert canvas.text(coloured=False).plain == "a░\\x1bby█·c\\x1b"
    canvas.add(step([1], ["\n"], [], entropy=9.0))
    assert canvas.text(coloured=False).plain == "a█↵by█·c\\x1b"
    canvas.add(step([1], ["x"], [1]))
    canvas.add(step([4], ["z"], [4]))
    assert canvas.text(coloured=False).plain == "axbyzc\\x1b"
    assert canvas.counters() == ["3 tokens", "4 passes", "0.75 tokens per forward"]
    canvas.add(step([1, 3, 4], ["no", "w", "no"], [3]))  # an edit; the others are predicted again, and kept
    assert canvas.text(coloured=False).plain == "axbwzc\\x1b"


def test_the_trace_of_the_server_is_what_the_canvas_reads(app: Served) -> None:
    text = f"the {MASK_TEXT}{MASK_TEXT} dog{MASK_TEXT}"
    body = {"model": MODEL, "prompt": text, "infill": True, "return_trace": "steps"}
    canvas, said = TraceCanvas(text), ""
    for chunk in Endpoint(app.url).stream("/v1/completions", body):
        said += "".join(choice["text"] for choice in chunk["choices"])
        if (chunk.get("rcd") or {}).get("type") == "trace":
            canvas.add(json.loads(json.dumps(chunk["rcd"]["step"])))
    assert canvas.num_passes > 1 and MASK_TEXT not in said
    assert canvas.text(coloured=True).plain == printable(said)
