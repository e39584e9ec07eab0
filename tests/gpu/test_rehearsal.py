"""The check for a real GPU, rehearsed on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import __main__ as script
from tests.gpu.common import Run


def test_rehearsal(tmp_path: Path) -> None:
    """All parts run and hold, without Ray, and leave their results."""
    code = (
        "import sys; from tests.gpu.__main__ import main; code = main();"
        "assert not {'ray', 'pydantic', 'pytest'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "--out", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in script.PARTS:
        part = json.loads((tmp_path / f"{name}.json").read_text())
        assert part["rehearsal"] and part["results"] and "error" not in part
        assert f"## {name}" in (tmp_path / "table.md").read_text()
    rows = json.loads((tmp_path / "decoding.json").read_text())["results"]
    assert {row["method"] for row in rows} == {"seqd", "rcd", "rcd 32 ids"} and all(row["tokens_per_s"] for row in rows)


def test_a_part_that_fails_or_hangs_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: Run) -> Any:
        raise ZeroDivisionError("no such kernel")

    def endless(run: Run) -> Any:
        while True:
            time.sleep(0.1)

    def unequal(run: Run) -> Any:
        return {"sdpa": 1.0, "sdpa ok": False}

    monkeypatch.setattr(script, "GRACE", 0.2)
    parts = {"broken": (broken, 9), "endless": (endless, 0.1), "unequal": (unequal, 9), "fine": (lambda run: {}, 9)}
    monkeypatch.setattr(script, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--rehearse", "--parts", ",".join(parts)])
    assert script.main() == 1
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts}
    assert "no such kernel" in found["broken"]["error"] and "time limit" in found["endless"]["error"]
    failed = [name for name, result in found.items() if script.failures(result)]
    assert failed == ["broken", "endless", "unequal"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_script_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "--rehearse" in capsys.readouterr().err
