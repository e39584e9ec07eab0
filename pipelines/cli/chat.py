"""`rcd chat`: talk to a served model from a terminal, and see the denoising as it happens.

rcd chat --url http://127.0.0.1:8000
echo "..." | rcd chat --url http://127.0.0.1:8000 --model rcd-demo
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from pipelines.cli.live_view import TraceCanvas, printable, trace_view
from pipelines.cli.terminal import INTERRUPTED, converse, read_stdin, refuse_in_one_line, statistics_line, turn
from pipelines.client import Endpoint
from pipelines.evaluation.decode_flags import add_decode_flags, add_flag, errors_as_flags, given_settings
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.tasks.base import MASK_TEXT

KEY_VARIABLE = "RCD_API_KEY"
# What the server says that reads otherwise on the command line.
REMEDIES = {
    "use infill": "use --infill",
    "use /v1/completions": "give --raw or --infill",
    "load one, or set": "set",
    "max_tokens": "--max_new_tokens",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rcd chat --url URL [--model ID] [--prompt TEXT] [flags]"
    parser.allow_abbrev = False
    refuse_in_one_line(parser, "rcd chat")
    server = parser.add_argument_group("endpoint", f"An API key is taken from the environment variable {KEY_VARIABLE}.")
    add_flag(server, "--url", required=True, metavar="URL", help="for example http://127.0.0.1:8000")
    add_flag(server, "--model", metavar="ID", help="default: the first that the endpoint lists")
    given = parser.add_argument_group("input", "Without --prompt, stdin: a chat in a terminal, else one turn.")
    add_flag(given, "--prompt", metavar="TEXT", help="one turn, and the end")
    add_flag(given, "--raw", action="store_true", help="no chat: the text is continued as it stands")
    add_flag(given, "--infill", action="store_true", help=f"fill the {MASK_TEXT} places of the text and nothing else")
    output = parser.add_argument_group("output", "Text on stdout, statistics on stderr.")
    add_flag(output, "--no-show", action="store_true", help="do not draw the denoising where stdout is a terminal")
    add_decode_flags(parser)


def run(options: argparse.Namespace) -> int:
    with errors_as_flags():
        DecodeSettings(**given_settings(options))  # before anything is asked
    _check(options)
    try:
        client = Endpoint(options.url, os.environ.get(KEY_VARIABLE), patience_s=0)
        served = list(client.models())
        if not served:
            raise UserError(f"--url: {client.url} serves no model")
        if options.model is not None and options.model not in served:
            raise UserError(f"--model is {options.model!r}; served there: {', '.join(served)}")
        options.model = options.model or served[0]
        if options.prompt is None and sys.stdin.isatty():
            return _chat(client, options)
        text = read_stdin() if options.prompt is None else options.prompt
        return _reply(client, options, [turn(text)]).exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def _check(options: argparse.Namespace) -> None:
    """Combinations that contradict each other. Raises UserError naming the flags."""
    if options.raw and options.infill:
        raise UserError("--raw and --infill are both given; continue a text or fill one")
    if options.infill and "max_new_tokens" in options:
        raise UserError("--max_new_tokens does not go with --infill, which fills every mask and adds nothing")
    if "trace" in options:
        raise UserError("--trace is for `rcd generate`; a chat draws the passes by itself, unless --no-show is given")


def _chat(client: Endpoint, options: argparse.Namespace) -> int:
    print(f"talking to {options.model}", file=sys.stderr)
    converse(lambda messages: _reply(client, options, messages).text)
    return 0


# -- one answer ------------------------------------------------------------------------------------------------------


@dataclass
class _Reply:
    text: str = ""
    rcd: dict[str, Any] | None = None  # what the server tells at the end
    num_tokens: int = 0
    exit_code: int = 0
    canvas: TraceCanvas = field(default_factory=TraceCanvas)

    def take(self, chunk: dict[str, Any]) -> str:
        """Note what a chunk says. Returns its text."""
        said = ""
        for choice in chunk["choices"]:
            said += choice.get("text") or choice.get("delta", {}).get("content") or ""
        self.text += said
        about = chunk.get("rcd") or {}
        if about.get("type") == "trace":
            self.canvas.add(about["step"])
        elif about:
            self.rcd = about
        if usage := chunk.get("usage"):
            self.num_tokens = usage["completion_tokens"]
        return said


def _reply(client: Endpoint, options: argparse.Namespace, messages: list[dict[str, str]]) -> _Reply:
    """Ask and print. After Ctrl-C: what was final, exit code 130."""
    live = _draws(options)
    path, body = _request(options, messages, live)
    reply = _Reply(canvas=TraceCanvas(messages[-1]["content"] if options.infill else None))
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            draw = stack.enter_context(trace_view(reply.canvas, Console())) if live else None
            for chunk in stack.enter_context(closing(_stream(client, path, body))):
                said = reply.take(chunk)
                if draw is not None:
                    draw()
                else:
                    _print(said)
    except KeyboardInterrupt:
        reply.exit_code = INTERRUPTED
    finally:  # an error leaves standing what was final before it
        if live:
            _print(reply.text)
        if reply.text:
            print(flush=True)
    if reply.rcd is None:
        print(f"interrupted · {time.monotonic() - started:.2f} s", file=sys.stderr)
    else:
        failures = reply.rcd.get("reference_failures")
        notes = [f"the reference failed {failures} times"] if failures else []
        print(statistics_line({**reply.rcd, "num_tokens": reply.num_tokens}, *notes), file=sys.stderr)
    return reply


def _request(options: argparse.Namespace, messages: list[dict[str, str]], live: bool) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": options.model, "stream_options": {"include_usage": True}}
    body |= given_settings(options)
    if live:
        body["return_trace"] = "steps"
    if options.infill:
        return "/v1/completions", body | {"prompt": messages[-1]["content"], "infill": True}
    if options.raw:
        return "/v1/completions", body | {"prompt": messages[-1]["content"]}
    return "/v1/chat/completions", body | {"messages": messages}


def _stream(client: Endpoint, path: str, body: dict[str, Any]) -> Any:
    """The chunks; refusals name flags instead of fields."""
    with errors_as_flags(REMEDIES):
        yield from client.stream(path, body)


def _draws(options: argparse.Namespace) -> bool:
    """Only a terminal that understands cursor movements is drawn on."""
    console = Console()
    return not options.no_show and console.is_terminal and not console.is_dumb_terminal


def _print(text: str) -> None:
    """Escaped for a terminal, on which control characters act; as it is for a file or a pipe."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
