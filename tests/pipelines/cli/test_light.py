"""Help, and `rcd chat`, start without the imports that only models need."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipelines.cli.main import COMMANDS, GROUPS

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from pipelines.cli import main as cli
cli.main(sys.argv[1:])
print("imported:", *(name for name in ("torch", "transformers", "ray") if name in sys.modules))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        *([*command.split(), "--help"] for command in ("", *GROUPS, *COMMANDS)),
        ["--version"],
        ["chat", "--url", "http://127.0.0.1:9", "--prompt", "p"],  # up to the first request; no server listens there
    ],
    ids=" ".join,
)
def test_help_and_chat_import_neither_torch_nor_ray(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1].split() == ["imported:"], result.stdout + result.stderr
    assert "--help" not in arguments or "Usage: rcd" in result.stdout
    assert "--version" not in arguments or result.stdout.startswith(f"rcd {version('rcd-ray')}")
    assert "chat" not in arguments or "--help" in arguments or result.stderr.startswith("error: --url")


STAGE = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit as done:
    print("imported:", *(name for name in ("torch", "transformers", "ray") if name in sys.modules), done.code)
"""


@pytest.mark.parametrize("name", ["full", "prepare", "precompute", "train", "calibrate", "evaluate", "serve"])
def test_a_stage_file_shows_its_help_without_them(name: str) -> None:
    """It hands over to the driver before its own imports; the driver imports it when its stage runs."""
    file = str(ROOT / "pipelines" / f"{name}.py")
    words = [sys.executable, "-c", STAGE, file, "--help"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "--redo" in result.stdout and result.stdout.splitlines()[-1] == "imported: 0", result.stdout + result.stderr


@pytest.mark.parametrize("command", [["evaluate", "--list_settings"], ["plan", "--recipe", "demo"]], ids=" ".join)
def test_a_reader_that_leaves_ends_a_command_without_a_word(command: list[str], tmp_path: Path) -> None:
    """As `rcd plan | head -1`; the first prints, the second leaves it to rich."""
    words = [sys.executable, "-m", "pipelines.cli.main", *command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "")
