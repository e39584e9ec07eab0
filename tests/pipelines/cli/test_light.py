"""`rcd chat` starts without what only models need."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pipelines.cli import main as cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
print("found:", *(name for name in ("torch", "transformers", "ray") if name in sys.modules))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--url", "http://127.0.0.1:9", "--prompt", "p"]])
def test_a_chat_needs_no_torch(arguments: list[str]) -> None:
    """Neither for its flags nor up to the first request, to a port where nothing listens."""
    command = [sys.executable, "-c", PROGRAM, "chat", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1].split() == ["found:"], ran.stdout + ran.stderr
    assert ran.stderr.startswith("error: --url: nothing answers") or "--help" in arguments
