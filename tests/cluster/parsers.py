"""Parses a command line with its program's own parser, without running it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Callable
from typing import Any, NoReturn

import click
from cyclopts import CycloptsError

from pipelines.cli.main import make_app
from tests.conftest import ROOT


def problem(words: list[str]) -> str | None:
    """The parser's objection to a command, or None. Programs other than ours and Ray's are not checked."""
    program, *arguments = words
    if "--" in arguments:  # what follows is a job's command
        cut = arguments.index("--")
        if found := problem(arguments[cut + 1 :]):
            return found
    program = program.removeprefix(".venv/bin/")
    if program in ("ray", "serve"):
        return _click(program, arguments)
    if program == "rcd":
        return _rcd(arguments)
    if program == "make":
        return _make(arguments)
    if program in ("python", "python3") and arguments:
        return _python(arguments)
    return None


def _click(program: str, arguments: list[str]) -> str | None:
    where = "ray.scripts.scripts" if program == "ray" else "ray.serve.scripts"
    command: click.Command = importlib.import_module(where).cli
    try:
        while isinstance(command, click.Group):
            if not arguments or (inner := command.commands.get(arguments[0])) is None:
                return f"no command {arguments[:1]}"
            command, arguments = inner, arguments[1:]
        command.make_context(program, list(arguments))
    except click.ClickException as error:
        return error.format_message()
    return None


def _rcd(arguments: list[str]) -> str | None:
    try:
        make_app().parse_args(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return str(error)
    return None


def _python(arguments: list[str]) -> str | None:
    if arguments[0] == "-m":
        module, rest = arguments[1], arguments[2:]
        if importlib.util.find_spec(module) is None:
            return f"no module {module}"
    else:
        if not (ROOT / arguments[0]).is_file():
            return f"no file {arguments[0]}"
        module, rest = arguments[0].removesuffix(".py").replace("/", "."), arguments[1:]
    drivers = ("full", "prepare", "train", "precompute", "calibrate", "evaluate", "serve")
    if module in [f"pipelines.{name}" for name in drivers]:
        return _argparse("pipelines.run.driver", rest)
    return None


class _Parsed(BaseException):
    """Parsing is over; nothing of the program may run."""


def _argparse(module: str, arguments: list[str]) -> str | None:
    """By the parser that the module's main uses, which is stopped as soon as it has parsed."""
    parse = argparse.ArgumentParser.parse_known_args

    def only_parse(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]  # for sub-commands
        _, unknown = parse(self, *given)
        raise _Parsed(*unknown)

    main: Callable[..., object] = importlib.import_module(module).main
    complaint = io.StringIO()
    argparse.ArgumentParser.parse_known_args = only_parse  # type: ignore[method-assign, assignment]
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            main(arguments)
    except _Parsed as parsed:
        return f"unknown: {' '.join(parsed.args)}" if parsed.args else None
    except SystemExit as end:
        return complaint.getvalue().strip().splitlines()[-1] if end.code else None
    finally:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
    return "its main parsed nothing"


def _make(arguments: list[str]) -> str | None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = [word for word in arguments if "=" not in word]
    missing = [word for word in wanted if word not in targets]
    return f"no target {missing[0]}" if missing else None
