"""`rcd evaluate --url` against the real HTTP application with small models, and against a foreign endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines import client
from pipelines.cli import main as cli
from pipelines.evaluation.actor import request_seed
from pipelines.run.keys import fingerprint
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.tasks import get_task
from tests.pipelines.serving.served_app import BASELINE, MODEL, SETTINGS, Served, served


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served() as app:
        yield app


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"the quick fox {i}", "answer": str(i)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def flags(questions: Path, tmp_path: Path) -> list[str]:
    return ["--model", MODEL, "--task", "qa", "--test", str(questions), "--output", str(tmp_path / "out")]


def evaluate(url: str, *more: str) -> int:
    return cli.main(["evaluate", "--url", url, *more])


def rows_of(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "results.parquet").to_pylist()


def decoded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the time, and without prefill passes, which prompts with a common prefix share."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "prefill")} for row in rows]


def test_the_report_of_an_endpoint_of_this_project(app: Served, flags: list[str], tmp_path: Path) -> None:
    """Every method sends its settings and seeds, and passes are counted."""
    out = tmp_path / "out"
    more = ["--baseline_model", BASELINE, "--thresholds", "0.3", "--starts", "zero", "reference", "--concurrency", "3"]
    more += ["--seed", "3", "--set", "decode.temperature=0.7", "--samples", "2", "--set", "decode.max_new_tokens=16"]
    assert evaluate(app.url + "/v1", *flags, *more) == 0
    rows, results = rows_of(out), json.loads((out / "results.json").read_text())
    assert len(rows) == 3 * 6 * 2
    assert len({row["example_id"] for row in rows}) == 6 and {row["sample"] for row in rows} == {0, 1}
    for row in map(json.loads, (out / "answers.jsonl").read_text().splitlines()):
        settings = DecodeSettings(**{**row["settings"], "stop_token_ids": tuple(row["settings"]["stop_token_ids"])})
        assert settings.seed == request_seed(3, row["example_id"], row["sample"])
        assert settings.temperature == 0.7 and settings.confidence_threshold == row["threshold"]
        assert settings.residual == (row["arm"] != "seqd")
        assert row["forwards"]["denoise"] > 0
        assert bool(row["forwards"]["reference"]) == (row["arm"] == "target/reference")
    assert [arm["name"] for arm in results["arms"]] == ["seqd", "target/zero", "target/reference"]
    assert [c["baseline"] for c in results["comparisons"]] == ["seqd", "seqd"]
    assert results["arms"][0]["block_length"] == 8 and results["num_samples"] == 2
    point = results["arms"][1]["curve"][0]
    tokens, passes = (sum(row[n] for row in rows if row["arm"] == "target/zero") for n in ("tokens", "denoise"))
    assert point["tokens_per_forward"] == pytest.approx(tokens / passes)
    page = (out / "report.html").read_text()
    assert "rcd evaluate --url" in page and "0 blocks had to start from zero" in page
    assert "counts as 1.00 target passes, an assumption (--reference_flops_weight)" in page
    assert (out / "pareto.png").stat().st_size > 1000


def test_answers_equal_those_of_the_library(app: Served, questions: Path, flags: list[str], tmp_path: Path) -> None:
    assert evaluate(app.url, *flags, "--thresholds", "0.5") == 0  # without starts: the endpoint's default
    prompts = [get_task("qa").problem(json.loads(line)).prompt for line in questions.read_text().splitlines()]
    expected = sorted(app.text(app.turns(prompt), SETTINGS) for prompt in prompts)
    assert sorted(row["completion"] for row in rows_of(tmp_path / "out")) == expected
    assert {row["arm"] for row in rows_of(tmp_path / "out")} == {"target"}


def test_canvases_are_filled(app: Served, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--model", MODEL, "--task", "sudoku", "--test", "synthetic", "--num_examples", "3", "--output", str(out)]
    assert evaluate(app.url, *flags, "--thresholds", "0.5") == 0
    rows = rows_of(out)
    assert [row["example_id"] for row in rows] == ["00000000", "00000001", "00000002"]
    assert all(row["completion"].startswith("#") and "MASK" not in row["completion"] for row in rows)
    assert all(row["tokens"] > 0 for row in rows)


def test_resumes_and_refuses_other_settings(
    app: Served, questions: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "out", [*flags, "--thresholds", "0.5"]
    assert evaluate(app.url, *flags) == 0
    whole, log = rows_of(out), out / "answers.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:20])  # killed in the middle of a line
    num_requests = app.statistics()["requests_total"]
    assert evaluate(app.url, *flags) == 0
    assert app.statistics()["requests_total"] == num_requests + 2
    assert decoded(rows_of(out)) == decoded(whole)
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 6
    capsys.readouterr()
    assert evaluate(app.url, *flags, "--seed", "1") == 2
    message = capsys.readouterr().err
    assert f"--output {out}" in message and "seed: 0" in message
    questions.write_text(questions.read_text().replace("fox", "dog"))
    fingerprint.cache_clear()  # of this process
    assert evaluate(app.url, *flags) == 2
    assert "data.test" in capsys.readouterr().err


def test_mistakes(app: Served, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "qa", "--test", str(questions), "--output", str(tmp_path / "out")]
    for more, named in (
        (["--model", "other"], "no model 'other'; it serves tiny, tiny-baseline"),
        ([], "--model"),
        (["--model", MODEL, "--target", "/x"], "--target"),
        (["--model", MODEL, "--concurrency", "0"], "--concurrency is 0"),
        (["--model", MODEL, "--set", "decode.top_k=-1"], "top_k is -1"),
        (["--model", MODEL, "--set", "decode.cfg_scale=1.0"], "cfg_scale is 1.0"),
        (["--model", MODEL, "--samples", "2"], "evaluate.samples is 2"),
    ):
        assert evaluate(app.url, *flags, *more) == 2, more
        assert named in capsys.readouterr().err


# -- foreign endpoints


@contextmanager
def server(respond: Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]) -> Iterator[str]:
    """An HTTP server on loopback. respond: body of a POST -> status, headers, JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {}, {"object": "list", "data": [{"id": "gpt", "owned_by": "somebody"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*respond(body | {"authorization": self.headers.get("Authorization")}))

        def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def reply(text: str) -> tuple[int, dict[str, str], Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 7}}


def test_a_foreign_endpoint_has_accuracy_and_speed_but_no_curve(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies: list[dict[str, Any]] = []

    def respond(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        bodies.append(body)
        return reply("<script> the answer is " + body["messages"][0]["content"].split()[3][0])

    monkeypatch.setenv("RCD_API_KEY", "s3cret")
    out = tmp_path / "out"
    flags = ["--model", "gpt", "--task", "qa", "--test", str(questions), "--output", str(out)]
    with server(respond) as url:
        assert evaluate(url, *flags, "--set", "decode.max_new_tokens=9", "--set", "decode.temperature=0.5") == 0
        assert evaluate(url, *flags, "--set", "decode.max_new_tokens=9", "--set", "decode.top_k=5") == 2
    assert "--set decode.top_k" in capsys.readouterr().err
    assert len(bodies) == 6
    fields = {"model", "seed", "messages", "max_tokens", "temperature", "authorization"}
    assert all(set(body) == fields and body["authorization"] == "Bearer s3cret" for body in bodies)
    assert len({body["seed"] for body in bodies}) == 6
    results = json.loads((out / "results.json").read_text())
    (point,) = results["arms"][0]["curve"]
    assert results["passes"] == "not reported" and point["tokens_per_pass"] is None and point["mean_denoise"] is None
    assert point["accuracy"] == sum(row["correct"] for row in rows_of(out)) / 6 and point["tokens_per_second"] > 0
    assert point["mean_tokens"] == 7 and all(row["denoise"] is None for row in rows_of(out))
    assert cli.main(["report", str(out)]) == 2
    assert "does not report passes" in capsys.readouterr().err
    page = (out / "report.html").read_text()
    assert (
        "does not report its passes" in page
        and "not reported" in page
        and "<script" not in page
        and "s3cret" not in page + json.dumps(results)
    )


def test_busy_and_unreachable_endpoints_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    answers = iter([(429, {"Retry-After": "2.5"}, {}), (503, {}, {}), (429, {"Retry-After": "soon"}, {}), reply("yes")])
    with server(lambda body: next(answers)) as url:
        answer = client.Endpoint(url).answer("gpt", "p", {}, infill=False, ours=False, seed=1)
    assert answer.text == "yes" and waits == [2.5, 1.0, 2.0]
    with pytest.raises(UserError, match="3 s"):
        client.Endpoint(url, patience_s=3).models()  # the server is closed
    waits.clear()
    ticks = iter(range(0, 1000, 2))  # seconds of a clock that each look moves
    monkeypatch.setattr(client.time, "monotonic", lambda: float(next(ticks)))
    with pytest.raises(UserError, match="127.0.0.1"):
        client.Endpoint(url).models()
    assert len(waits) < 5, "the first contact does not take as long as a retry"
    refusals = iter([(401, {}, {"error": {"message": "no key"}}), (200, {}, {"choices": []})])
    with server(lambda body: next(refusals)) as url:
        endpoint = client.Endpoint(url)
        with pytest.raises(UserError, match="no key.*RCD_API_KEY"):
            endpoint.answer("gpt", "p", {}, infill=False, ours=False, seed=1)
        with pytest.raises(UserError, match="OpenAI-compatible"):
            endpoint.answer("gpt", "p", {}, infill=False, ours=False, seed=1)
