"""`rcd data inspect` on files of chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli.main import main
from rcd_core.text.tokenizer import train_tokenizer
from tests.hub_server import hub_server


@pytest.fixture
def chats(tmp_path: Path) -> str:
    train_tokenizer(["What is it? Four."] * 9, 300).save_pretrained(tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Four \x1b[31m."}]
    rows = [{"messages": turns}, {"messages": turns * 2}, {"messages": turns[:1]}, {"messages": turns * 40}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "chats.jsonl")


def test_dialect_lengths_drops_and_an_example(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = str(Path(chats).parent / "tokenizer")
    assert main(["data", "inspect", chats, "--tokenizer", tokenizer, "--max_length", "256"]) == 0
    out = capsys.readouterr().out
    assert "dialect messages" in out and "4 rows read, 2 usable, 2 with several answers" in out
    assert "no answer" in out and "data.max_length" in out
    given, _, trained = out[out.index("row 1: ") :].partition("\n[")
    assert given.endswith("<|im_start|>assistant") and trained.rstrip().endswith("]") and "▒" in trained
    assert "\x1b" not in out, "control characters of the data do not reach the terminal"


def test_without_a_tokenizer_it_says_what_it_can(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", chats, "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 rows read, 2 usable" in out and "--tokenizer" in out


def test_of_a_data_set_on_the_hub_the_first_file_is_read(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = Path(chats).read_bytes()
    with hub_server() as hub:
        hub.add("owner/name", {"data/train-0.jsonl": content, "data/train-1.jsonl": b"", "data/test-0.jsonl": b""})
        assert main(["data", "inspect", "hf://owner/name"]) == 0
        out = capsys.readouterr().out
        assert "train-0.jsonl, the first of 2 files" in out and "4 rows read" in out
        assert main(["data", "inspect", "hf://owner/name:dev"]) == 2
        assert "hf://owner/name:dev" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dialect", "xml"], "--dialect"),
        (["--field", "question=prompt"], "--field question=COLUMN"),
        (["--field", "topic=x"], "--field topic"),
        (["--dialect", "conversations"], "'conversations'"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
        (["--rows", "-1"], "--rows"),
    ],
)
def test_mistakes_are_named(chats: str, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", chats, *flags]) == 2
    assert named in capsys.readouterr().err
