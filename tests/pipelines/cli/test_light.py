"""Help, and `rcd chat`, start without the imports that only models need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.cli.main import COMMANDS, GROUPS

PROGRAM = """
import sys
from pipelines.cli import main as cli
cli.main(sys.argv[1:])
print("found:", *(name for name in ("torch", "transformers", "ray") if name in sys.modules))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        *([*command.split(), "--help"] for command in ("", *GROUPS, *COMMANDS)),
        ["chat", "--url", "http://127.0.0.1:9", "--prompt", "p"],  # up to the first request; nothing listens there
    ],
    ids=" ".join,
)
def test_help_and_chat_import_neither_torch_nor_ray(arguments: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1].split() == ["found:"], ran.stdout + ran.stderr
    assert "--help" not in arguments or "Usage: rcd" in ran.stdout
    assert "--help" in arguments or ran.stderr.startswith("error: --url")
