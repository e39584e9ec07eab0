"""Runs a program that a model wrote, in a process with limits, and tells whether it came to its end.

The process (`code_worker.py`) has an empty temporary working directory, none of this process's environment or open
files, and limits on CPU time, address space, open files, written bytes and new processes; a hook refuses sockets, new
processes, signals, and writing or removing files. That stops accidents. It is no sandbox: such code may read what this
user may read, and code that sets out to can get around a hook that lives in its own interpreter (with its network
access and, as root, around the limit on processes). For models that are not trusted use a container without network.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SECONDS = 10.0  # of CPU and of wall time
MEMORY_BYTES = 2 << 30  # of address space
_WORKER = Path(__file__).with_name("code_worker.py")


def run_program(program: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether `program` ran to its last line within the limits. False if it raised, exited, or was stopped."""
    token = secrets.token_hex(16)  # sent back at the end only: exit(0) half-way is no success
    request = json.dumps({"program": program, "token": token, "seconds": seconds, "memory_bytes": memory_bytes})
    with tempfile.TemporaryDirectory(prefix="rcd-code-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_WORKER)],  # -I: no environment, no user or script directory on the path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": directory, "TMPDIR": directory},
            start_new_session=True,
            text=True,
        )
        try:
            output, _ = process.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return False
    return output == token
