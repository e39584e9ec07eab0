"""Shared by the commands: paths, the loop of a chat, printing answers and their statistics."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console

from pipelines.cli.live_view import printable
from rcd_core.errors import UserError
from rcd_core.io import storage

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


def absolute_path(path: str) -> str:
    """URIs are returned unchanged."""
    return path if storage.is_uri(path) else os.path.abspath(os.path.expanduser(path))


def writable_file(flag: str, path: str) -> str:
    """The absolute path of a file to be written. Raises UserError, before any work is done, where none can be."""
    absolute = absolute_path(path)
    if path.endswith("/") or os.path.isdir(absolute):
        raise UserError(f"{flag} {path} is a directory; name a file, for example {os.path.join(path, 'NAME')}")
    return _probed(flag, path, absolute, absolute)


def writable_directory(flag: str, path: str) -> str:
    """The absolute path of a directory for files, which may be missing. Raises UserError as `writable_file`."""
    absolute = absolute_path(path).rstrip("/")
    if os.path.isfile(absolute):
        raise UserError(f"{flag} {path} is a file; name a directory")
    return _probed(flag, path, absolute, os.path.join(absolute, "probe") if os.path.isdir(absolute) else absolute)


def _probed(flag: str, path: str, absolute: str, place: str) -> str:
    """absolute, after a file beside `place` was written and removed."""
    probe = f"{place}.{uuid.uuid4().hex[:8]}"
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise UserError(f"{flag} {path}: nothing can be written there ({reason}); choose another place") from error
    return absolute


def can_draw(requested: bool) -> bool:
    """Whether to draw live. False for files, pipes and terminals without cursor movements."""
    console = Console()
    return requested and console.is_terminal and not console.is_dumb_terminal


def converse(answer: Callable[[list[dict[str, str]]], str]) -> None:
    """Chat until the end of input or /exit. answer: all messages so far -> the model's text. A turn for which it raises
    UserError is reported and dropped."""
    print("Ctrl-C stops an answer, /clear forgets the conversation, /exit ends it", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while (text := ask()) is not None and text.strip() != "/exit":
        if text.strip() == "/clear":
            messages = []
        elif text.strip():
            with_turn = [*messages, turn(text)]
            try:
                messages = [*with_turn, turn(answer(with_turn), "assistant")]
            except UserError as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)


def turn(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def read_stdin() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not valid {error.encoding}: {error.reason}") from error
    if not text.strip():
        raise UserError("--prompt is not given and stdin is empty; give one of them")
    return text.removesuffix("\n")


def print_text(text: str, end: str = "\n") -> None:
    """Print text of a model: escaped for a terminal, where control characters have effects, else unchanged."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def statistics_line(report: dict[str, Any], *notes: str) -> str:
    """One line. report: num_tokens, tokens_per_forward, seconds, and forwards by kind, as in the HTTP API."""
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
    if not sys.stdout.isatty():  # input() would write the prompt to stdout
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None
