"""`rcd generate --trace_file` and `rcd trace`: the file, and what is refused. The page that shows it is tested in
serving/http/test_trace_page.py."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.cli import main as cli
from pipelines.cli.trace import CANDIDATES
from rcd_core.tasks.base import MASK_TEXT
from rcd_core.text.tokenizer import load_tokenizer


def traced(path: Path, target: Path, *arguments: Any) -> list[dict[str, Any]]:
    words = ["generate", "--model_dir", target, "--trace_file", path, *arguments]
    assert cli.main([str(word) for word in words]) == 0
    content = json.loads(path.read_text())
    assert content["rcd_trace"] == 1
    return list(content["answers"])


def test_each_prompt_is_an_answer_with_its_passes(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, path = checkpoints / "target", tmp_path / "trace.json"
    words = ("--prompt", "the fox", "--prompt", "dog", "--raw", "--max_new_tokens", 8)
    answers = traced(path, target, *words)
    told = capsys.readouterr().out
    assert [a["title"] for a in answers] == [f"{target}, prompt 1", f"{target}, prompt 2"]
    assert "".join(f"{a['text']}\n" for a in answers) == told
    decode: Any = load_tokenizer(target).decode
    for answer, prompt in zip(answers, ("the fox", "dog"), strict=True):
        assert (answer["prompt"], answer["template"], answer["valid"]) == (prompt, None, None)
        assert answer["note"] == "residual on, start zero"
        assert len(answer["steps"]) == answer["rcd"]["forwards"]["denoise"]
        assert answer["rcd"]["tokens_per_pass"] == answer["rcd"]["tokens_per_forward"]
        for step in answer["steps"]:
            assert [len(top) for top in step["candidates"]] == [CANDIDATES] * len(step["masked"])
            assert step["argmax_text"] == [decode([i]) for i in step["argmax"]]
        assert sum(len(s["committed"]) for s in answer["steps"]) >= answer["num_tokens"]


def test_an_infill_keeps_its_template(checkpoints: Path, tmp_path: Path) -> None:
    template = f"the {MASK_TEXT}dog{MASK_TEXT}{MASK_TEXT}"
    [answer] = traced(tmp_path / "trace.json", checkpoints / "target", "--infill", "--prompt", template)
    assert answer["template"] == template and answer["prompt"] is None
    assert answer["num_tokens"] == 3 and len({p for s in answer["steps"] for p in s["committed"]}) == 3


def test_reference_passes_count_by_their_flops(checkpoints: Path, tmp_path: Path) -> None:
    reference = ("--ref_model_dir", checkpoints / "reference", "--start", "reference", "--residual_temperature", 1)
    words = ("--prompt", "the fox", "--max_new_tokens", 16, *reference)
    [answer] = traced(tmp_path / "trace.json", checkpoints / "target", *words)
    rcd = answer["rcd"]
    assert rcd["forwards"]["reference"] > 0 and answer["note"] == "residual on, start reference"
    whole = answer["num_tokens"] / (rcd["forwards"]["denoise"] + rcd["forwards"]["reference"])
    assert whole < rcd["tokens_per_pass"] < rcd["tokens_per_forward"], "the reference is smaller than the target"


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "trace.json"
    assert cli.main(["generate", "--model_dir", "/nowhere", "--prompt", "p", "--trace_file", str(path)]) == 2
    assert "--trace_file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), (b"\x89PNG\xff", "not JSON"), (b'{"name": 1}', "rcd_trace is None"),
     (b'{"rcd_trace": 2}', "rcd_trace is 2"), (b"[]", "no trace")],
)  # fmt: skip
def test_what_is_no_trace_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, reason: str
) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["trace", str(path)]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and reason in message and "--trace_file" in message


def test_flags_of_the_server_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"rcd_trace": 1, "answers": []}')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["trace", str(path), "--port", str(port)]) == 2
    assert f"--port is {port}" in capsys.readouterr().err
    assert cli.main(["trace", str(path), "--port", "70000"]) == 2
    for minutes in ("0", "nan"):
        assert cli.main(["trace", str(path), "--idle_minutes", minutes]) == 2
    assert "--idle_minutes" in capsys.readouterr().err


def test_without_requests_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"rcd_trace": 1, "answers": []}')
    assert cli.main(["trace", str(path), "--idle_minutes", "0.01"]) == 0
    url = capsys.readouterr().err.split()[0]
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
