"""Parses a command line with its program's own parser, without running it."""

from __future__ import annotations

import contextlib
import importlib
import io
import re

import click
from cyclopts import CycloptsError

from pipelines.cli.main import make_app
from pipelines.run import driver
from tests.conftest import ROOT


def problem(words: list[str]) -> str | None:
    """The parser's objection to a command, or None. Programs other than ours and Ray's are not checked."""
    program, *arguments = words
    if "--" in arguments:  # what follows is a job's command
        cut = arguments.index("--")
        if message := problem(arguments[cut + 1 :]):
            return message
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
        return _driver(rest)
    return None


def _driver(arguments: list[str]) -> str | None:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            _, unknown = driver._parser().parse_known_args(arguments)
    except SystemExit:
        return errors.getvalue().strip().splitlines()[-1]
    return f"unknown: {' '.join(unknown)}" if unknown else None


def _make(arguments: list[str]) -> str | None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = [word for word in arguments if "=" not in word and word not in targets]
    return f"no target {missing[0]}" if missing else None
