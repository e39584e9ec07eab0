"""The denoising of a served model, drawn live in a terminal from the trace that it streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipelines.cli.live_view import COMMITTED, GIVEN, append_guess, is_coloured, printable
from rcd_core.tasks.base import MASK_TEXT


@dataclass
class _Token:
    text: str
    entropy: float
    committed: bool


@dataclass
class TraceCanvas:
    """The tokens of one request as its trace tells of them. template: the text with masks that is filled; None: text
    is added."""

    template: str | None = None
    num_passes: int = 0
    tokens: dict[int, _Token] = field(default_factory=dict)  # by position

    def add(self, step: dict[str, Any]) -> None:
        """A pass, as return_trace 'steps' sends it: a decoding.Step with argmax_text."""
        self.num_passes += 1
        committed = set(step["committed"])
        for position, text, entropy in zip(step["masked"], step["argmax_text"], step["entropy"], strict=True):
            self.tokens[position] = _Token(text, entropy, position in committed)

    def text(self, *, coloured: bool) -> Text:
        drawn = Text(tab_size=8)
        tokens = [token for _, token in sorted(self.tokens.items())]
        if self.template is None:
            for token in tokens:
                _append(drawn, token, coloured)
            return drawn
        # Blocks come in order and a block's first pass sees all of its masks: the n-th token fills the n-th mask.
        for n, given in enumerate(self.template.split(MASK_TEXT)):
            if n:
                _append(drawn, tokens[n - 1] if n <= len(tokens) else None, coloured)
            drawn.append(printable(given), GIVEN)
        return drawn

    def counters(self) -> Text:
        filled = sum(token.committed for token in self.tokens.values())
        rate = f"{filled / max(1, self.num_passes):.2f} tokens per forward"
        said = f"{filled} tokens · {self.num_passes} passes · {rate}"
        return Text(said, style="dim", no_wrap=True, overflow="ellipsis")


def _append(drawn: Text, token: _Token | None, coloured: bool) -> None:
    if token is None:
        append_guess(drawn, "", 1.0, coloured)
    elif token.committed:
        drawn.append(printable(token.text), COMMITTED)
    else:  # 0 for one candidate, 1/2 for two that are equally likely
        append_guess(drawn, printable(token.text, newline="↵"), 1.0 - math.exp(-token.entropy), coloured)


@contextmanager
def trace_view(canvas: TraceCanvas, console: Console) -> Iterator[Callable[[], None]]:
    """A region of the terminal, gone at the end, and the function that draws the canvas' present state there."""
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def update() -> None:
            width, height = console.size
            lines = canvas.text(coloured=is_coloured(console)).wrap(console, width)[-max(1, height - 3) :]
            live.update(Group(*lines, Text(), canvas.counters()), refresh=True)

        yield update
