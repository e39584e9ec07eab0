"""A pseudo terminal for commands under test, and a small screen that interprets what they send."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
COLUMNS, ROWS = 100, 24


class Screen:
    """A terminal that knows the few control sequences the commands may send, and fails at any other.

    frames: the text before each erasure.
    """

    def __init__(self) -> None:
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.frames: list[str] = []
        self.styles: set[str] = set()

    def feed(self, sent: str) -> None:
        for code, letter, other in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([\s\S])", sent):
            if other:
                self._put(other)
            elif letter == "m":
                self.styles.add(code)
            elif letter == "A":
                self.row -= int(code or 1)
            elif letter == "K" and code == "2":
                if any(self.rows[self.row]):
                    self.frames.append(self.text)
                self.rows[self.row] = []
            else:
                assert letter in "hl" and code in ("?25", "?2004"), f"unexpected control sequence {code}{letter}"

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
            self.rows += [[]] * (self.row == len(self.rows))
        else:
            assert unicodedata.category(character) != "Cc", f"control character {character!r} reached the terminal"
            line = self.rows[self.row]
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            line += [" "] * (self.column + width - len(line))
            line[self.column : self.column + width] = [character, ""][:width]
            self.column += width

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip()


def in_terminal(
    command: str, *arguments: Any, keys: Sequence[tuple[str, str]] = (), **environment: str
) -> tuple[Screen, int]:
    """Run `rcd command` under a pseudo terminal until it ends. keys: pairs (output to wait for, what to type then)."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells ignore it for background processes
        os.chdir(ROOT)
        os.environ.update({"TERM": "xterm-256color", "COLORTERM": "truecolor", "INPUTRC": "/dev/null", **environment})
        os.execv(sys.executable, [sys.executable, "-m", "pipelines.cli.main", command, *map(str, arguments)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    sent, looked_at, waiting = b"", 0, list(keys)
    while select.select([terminal], [], [], 60)[0]:
        try:
            sent += os.read(terminal, 1 << 16)
        except OSError:  # on Linux: the other side has closed
            break
        while waiting and (index := sent.find(waiting[0][0].encode(), looked_at)) >= 0:
            looked_at = index + len(waiting[0][0].encode())
            os.write(terminal, waiting.pop(0)[1].encode())
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert not waiting, f"never seen: {waiting[0][0]!r}"
    screen = Screen()
    screen.feed(sent.decode())
    return screen, code
