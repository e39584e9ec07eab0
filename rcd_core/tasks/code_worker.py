"""The process behind `code_runner`: takes away what a program should not have, then runs it. Run as a script.

Standard input: JSON with program, token, seconds, memory_bytes. Standard output: the token, where the program came to
its end. It imports nothing of this project.
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
    """Limits of this process, which it cannot raise again; a lower one that it has already stays."""
    for kind, most in (
        (resource.RLIMIT_CPU, ceil(seconds)),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
    ):
        with suppress(ValueError, OSError):  # lower already, or unknown to this system
            resource.setrlimit(kind, (most, most))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578), which Python code cannot remove."""
    if event.startswith(_REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        raise PermissionError("writing is not allowed here")


def main() -> None:
    request = json.load(sys.stdin)
    reply = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    limit(request["seconds"], request["memory_bytes"])
    sys.addaudithook(refuse)
    exec(compile(request["program"], "program", "exec"), {"__name__": "program"})
    os.write(reply, request["token"].encode())


if __name__ == "__main__":
    main()
