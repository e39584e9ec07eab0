"""Runs a generated program in a subprocess with limits and reports whether it ran to its end.

The subprocess (`code_worker.py`) has an empty temporary working directory, no environment or open files of this
process, and limits on CPU time, address space, open files, written bytes and new processes. An audit hook refuses
sockets, processes, signals, and writing or removing files. This stops accidents. It is not a sandbox: the code can read
what this user can read, and malicious code can bypass a hook in its own interpreter (and then use the network and, as
root, exceed the limit on processes). Run untrusted models in a container without network.
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

SECONDS = 10.0  # limit of CPU time and of wall time
MEMORY_BYTES = 2 << 30  # of address space
_WORKER = Path(__file__).with_name("code_worker.py")


def run_program(program: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether `program` ran to its last line within the limits. False if it raised, exited or was killed."""
    token = secrets.token_hex(16)  # returned only at the end, so that exit(0) is not a success
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
