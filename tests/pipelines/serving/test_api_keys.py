"""API keys: where they come from, and that a job which would serve everyone ends before its first stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipe.load import load_recipe
from pipelines.run.driver import main
from pipelines.serving.api_keys import api_keys, check
from rcd_core.errors import UserError


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n one \n\ntwo  # a guest's\n", encoding="utf-8")
    assert api_keys({"RCD_API_KEYS": "a, b", "RCD_API_KEYS_FILE": str(file)}) == ("a", "b", "one", "two")
    assert api_keys({}) == ()
    file.write_text("# none yet\n", encoding="utf-8")
    for name, value in (
        ("RCD_API_KEYS", " , "),
        ("RCD_API_KEYS_FILE", str(file)),
        ("RCD_API_KEYS_FILE", str(tmp_path / "none")),
        ("RCD_API_KEYS", "schl\u00fcssel"),  # clients encode it in different ways
    ):
        with pytest.raises(UserError, match=f"^{name} "):
            api_keys({name: value})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost", "::1"])
def test_a_loopback_host_needs_no_keys(host: str) -> None:
    check(load_recipe("sudoku-reference", [f"deploy.host='{host}'"]), {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_another_host_needs_keys_or_permission(host: str) -> None:
    there = f"deploy.host='{host}'"
    check(load_recipe("sudoku-reference", [there]), {"RCD_API_KEYS": "a"})
    check(load_recipe("sudoku-reference", [there, "deploy.allow_without_keys=true"]), {})
    with pytest.raises(UserError, match="deploy.host .*RCD_API_KEYS"):
        check(load_recipe("sudoku-reference", [there]), {})


def test_the_job_ends_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RCD_API_KEYS", raising=False)
    job = ["--recipe", "sudoku-reference", "--storage", str(tmp_path), "--set", "deploy.host=0.0.0.0"]
    assert main(job) == 2
    assert "deploy.host" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*job, "--stages", "prepare,base", "--dry-run"]) == 0  # does not deploy
