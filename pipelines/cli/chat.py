"""`rcd chat`: a conversation with a served model in a terminal, with its denoising drawn as it happens."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from pipelines.cli.flags import ChatFlags, decode_settings
from pipelines.cli.live_view import TraceCanvas, live_view
from pipelines.cli.terminal import INTERRUPTED, can_draw, converse, print_text, read_stdin, statistics_line, turn
from pipelines.client import Endpoint
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError

KEY_VARIABLE = "RCD_API_KEY"


def chat(flags: ChatFlags) -> int:
    DecodeSettings(**decode_settings(flags.decode))  # raises before the first request
    _check(flags)
    client = Endpoint(flags.url, os.environ.get(KEY_VARIABLE), patience_s=0)
    served = list(client.models())
    if not served:
        raise UserError(f"--url: {client.url} serves no model")
    if flags.model is not None and flags.model not in served:
        raise UserError(f"--model is {flags.model!r}; served there: {', '.join(served)}")
    flags = replace(flags, model=flags.model or served[0])
    if flags.prompt is None and sys.stdin.isatty():
        print(f"talking to {flags.model}", file=sys.stderr)
        converse(lambda messages: _reply(client, flags, messages).text)
        return 0
    text = read_stdin() if flags.prompt is None else flags.prompt
    return _reply(client, flags, [turn(text)]).exit_code


def _check(flags: ChatFlags) -> None:
    """Raises UserError for flags that contradict each other."""
    if flags.raw and flags.infill:
        raise UserError("--raw and --infill are both given; continue a text or fill one")
    if flags.infill and "max_new_tokens" in flags.decode:
        raise UserError("--max_new_tokens has no effect with --infill, which fills the masks only; leave it out")
    if "trace" in flags.decode:
        raise UserError("--trace is a flag of `rcd generate`; a chat draws the passes unless --no-show is given")


# -- one answer ------------------------------------------------------------------------------------------------------


@dataclass
class _Reply:
    text: str = ""
    rcd: dict[str, Any] | None = None  # statistics, in the last chunk
    num_tokens: int = 0
    exit_code: int = 0
    canvas: TraceCanvas = field(default_factory=TraceCanvas)

    def take(self, chunk: dict[str, Any]) -> str:
        """Add a chunk of the stream. Returns its text."""
        text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in chunk["choices"])
        self.text += text
        extension = chunk.get("rcd") or {}
        if extension.get("type") == "trace":
            self.canvas.add(extension["step"])
        elif extension:
            self.rcd = extension
        if usage := chunk.get("usage"):
            self.num_tokens = usage["completion_tokens"]
        return text


def _reply(client: Endpoint, flags: ChatFlags, messages: list[dict[str, str]]) -> _Reply:
    """Send the messages and print the answer. After Ctrl-C: the text that was final, and exit code 130."""
    live = can_draw(not flags.no_show)
    path, body = _request(flags, messages, live)
    reply = _Reply(canvas=TraceCanvas(messages[-1]["content"] if flags.infill else None))
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            draw = stack.enter_context(live_view(reply.canvas, Console())) if live else None
            stream: Any = client.stream(path, body)
            for chunk in stack.enter_context(closing(stream)):
                text = reply.take(chunk)
                if draw is not None:
                    draw()
                else:
                    print_text(text, end="")
    except KeyboardInterrupt:
        reply.exit_code = INTERRUPTED
    finally:  # also after an error: print the text that was final before it
        if live:
            print_text(reply.text, end="")
        if reply.text:
            print(flush=True)
    if reply.rcd is None:
        print(f"interrupted · {time.monotonic() - started:.2f} s", file=sys.stderr)
    else:
        failures = reply.rcd.get("reference_failures")
        notes = [f"the reference failed {failures} times"] if failures else []
        print(statistics_line({**reply.rcd, "num_tokens": reply.num_tokens}, *notes), file=sys.stderr)
    return reply


def _request(flags: ChatFlags, messages: list[dict[str, str]], live: bool) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": flags.model, "stream_options": {"include_usage": True}}
    body |= flags.decode  # as given: a top_k of 0 means off here too, and null the server's default
    if live:
        body["return_trace"] = "steps"
    if flags.infill:
        return "/v1/completions", body | {"prompt": messages[-1]["content"], "infill": True}
    if flags.raw:
        return "/v1/completions", body | {"prompt": messages[-1]["content"]}
    return "/v1/chat/completions", body | {"messages": messages}
