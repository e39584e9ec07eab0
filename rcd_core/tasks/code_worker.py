"""The subprocess of `code_runner`: drops privileges, then runs the program. A script that imports nothing of rcd_core.

Standard input: JSON with program, token, seconds, memory_bytes. Standard output: the token, if the program ran to its
end.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import suppress
from math import ceil
from typing import Any

_REFUSED = (
    "ctypes.", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn",
    "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system", "os.truncate", "pty.", "resource.",
    "shutil.", "signal.pthread_kill", "socket.", "subprocess.",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(seconds: float, memory_bytes: int) -> None:
    """Set limits that this process cannot raise again. Lower existing limits are kept."""
    for kind, value in (
        (resource.RLIMIT_CPU, ceil(seconds)),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
    ):
        with suppress(ValueError, OSError):  # already lower, or unsupported on this system
            resource.setrlimit(kind, (value, value))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook (PEP 578). Python code cannot remove it."""
    if event.startswith(_REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        raise PermissionError("writing is not allowed here")


def main() -> None:
    request = json.load(sys.stdin)
    reply = os.dup(1)
    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(devnull, stream)
    limit(request["seconds"], request["memory_bytes"])
    sys.addaudithook(refuse)
    exec(compile(request["program"], "program", "exec"), {"__name__": "program"})
    os.write(reply, request["token"].encode())


if __name__ == "__main__":
    main()
