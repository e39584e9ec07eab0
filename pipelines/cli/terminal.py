"""What the commands that talk in a terminal have in common: turns in, answers and their statistics out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from pipelines.cli.live_view import printable
from rcd_core.errors import UserError

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def refuse_in_one_line(parser: argparse.ArgumentParser, command: str) -> None:
    """Without the usage, which is long where every setting is a flag."""

    def error(message: str) -> NoReturn:
        print(f"error: {message}; `{command} --help` lists the flags", file=sys.stderr)
        sys.exit(2)

    parser.error = error  # type: ignore[assignment, method-assign]


def converse(answer: Callable[[list[dict[str, str]]], str]) -> None:
    """Turn by turn, until the end of input or /exit. answer: all messages so far -> the model's text. A turn that it
    refuses (UserError) is said and forgotten."""
    print("Ctrl-C stops an answer, /clear forgets the conversation, /exit ends it", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while (text := ask()) is not None and text.strip() != "/exit":
        if text.strip() == "/clear":
            messages = []
        elif text.strip():
            asked = [*messages, turn(text)]
            try:
                messages = [*asked, turn(answer(asked), "assistant")]
            except UserError as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)


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
