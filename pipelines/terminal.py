"""What the commands that talk in a terminal have in common: turns in, answers and their statistics out."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from pipelines.live_view import printable
from rcd_core.errors import UserError

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def turn(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def read_stdin() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is no valid {error.encoding} text: {error.reason}") from error
    if not text.strip():
        raise UserError("--prompt is not given and stdin is empty; give one of them")
    return text.removesuffix("\n")


def print_text(text: str) -> None:
    """Escaped for a terminal, on which control characters act; as it is for a file or a pipe."""
    print(printable(text) if sys.stdout.isatty() else text, flush=True)


def statistics_line(report: dict[str, Any], *notes: str) -> str:
    """One line. report: num_tokens, tokens_per_forward, seconds, and forwards by kind, as the HTTP interface has it."""
    forwards = report["forwards"]
    kinds = [f"{forwards[kind]} {kind}" for kind in ("prefill", "store", "reference") if forwards[kind]]
    parts = [
        *notes,
        f"{report['num_tokens']} tokens in {forwards['denoise']} passes",
        f"{report['tokens_per_forward']:.2f} tokens per forward",
        *([f"besides {', '.join(kinds)}"] if kinds else []),
        f"{report['seconds']:.2f} s",
    ]
    return " · ".join(parts)


def ask() -> str | None:
    """The next line, or None at the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    prompt = "> "
    if not sys.stdout.isatty():  # input() would write it there
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None
