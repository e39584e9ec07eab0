"""The denoising, drawn live in a terminal: what is committed stands solid, what is masked as its current best guess,
the darker the less certain.

Model output is drawn, so it is escaped: a control character that reached the terminal could act on it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from rcd_core.decode_settings import SCALED_RULES
from rcd_core.tasks.base import MASK_TEXT

if TYPE_CHECKING:  # `rcd chat` draws with this too, and does without torch
    from rcd_core.decoding.sequence import Sequence

Decode = Callable[[list[int]], str]
GIVEN, COMMITTED = Style(dim=True), Style(bold=True)
_CERTAIN, _UNCERTAIN = (190, 222, 240), (30, 40, 52)  # backgrounds of a masked token, entropy 0 and 1
_BLOCKS = "░▒▓█"  # the same without colours
_UNKNOWN = "·"  # a masked token that no pass has seen yet
_UNSAFE = {"Cc", "Cf", "Zl", "Zp", "Cs"}  # controls, formats (text direction among them), separators, surrogates
_JOINERS = "\u200c\u200d"  # formats that scripts and emoji are written with


def printable(text: str, newline: str = "\n") -> str:
    """Text that is safe to send to a terminal: control characters as `\\x1b`, `\\u202e`; newlines as `newline`."""
    return "".join(_escape(c, newline) for c in text)


def _escape(character: str, newline: str) -> str:
    if character == "\n":
        return newline
    if unicodedata.category(character) in _UNSAFE and character not in _JOINERS:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


@contextmanager
def live_view(sequence: Sequence, decode: Decode, console: Console) -> Iterator[Callable[[], None]]:
    """A region of the terminal, gone at the end, and the function that draws the sequence's present state there.

    The sequence's settings must have trace=True: guesses and entropies come from its last step.
    """
    # Drawn when asked and only then: a thread that draws would look at a canvas in the middle of a pass.
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def update() -> None:
            live.update(draw(sequence, decode, console), refresh=True)

        update()
        yield update


def draw(sequence: Sequence, decode: Decode, console: Console) -> Group:
    """The end of the canvas that fits the console, and a line of counters."""
    width, height = console.size
    rows = max(1, height - 3)
    text = canvas_text(sequence, decode, coloured=is_coloured(console), most=rows * width)
    return Group(*text.wrap(console, width)[-rows:], Text(), _counters(sequence))


def canvas_text(sequence: Sequence, decode: Decode, *, coloured: bool, most: int) -> Text:
    """At most `most` tokens up to the current block's end (infilling: the canvas), one style per kind of token."""
    end = len(sequence.canvas) if sequence.infill else sequence.block[1]
    first = max(0 if sequence.infill else sequence.num_prompt, end - most)
    masked = sequence.canvas == sequence.model.mask_token_id
    guesses = _guesses(sequence)
    text = Text(tab_size=8)

    def kind(position: int) -> Style | None:
        if masked[position]:
            return None
        return COMMITTED if sequence.initially_masked[position] else GIVEN

    for style, run in groupby(range(first, end), kind):
        positions = list(run)
        if style is not None:  # together: a character may be spread over several tokens
            text.append(printable(decode(sequence.canvas[positions].tolist())), style)
            continue
        for position in positions:
            token, uncertainty = guesses.get(position, (None, 1.0))
            guess = "" if token is None else printable(decode([token]), newline="↵")
            append_guess(text, guess, uncertainty, coloured)
    return text


def append_guess(text: Text, guess: str, uncertainty: float, coloured: bool) -> None:
    """A masked token, shaded by its uncertainty in [0, 1]; guess: safe to print, or empty where there is none."""
    if coloured:
        text.append(guess or _UNKNOWN, _shade(uncertainty))
    else:
        text.append(_BLOCKS[round(uncertainty * (len(_BLOCKS) - 1))] + (guess or _UNKNOWN))


def _guesses(sequence: Sequence) -> dict[int, tuple[int, float]]:
    """Position -> (top guess, entropy in [0, 1]) by the last pass. 1 is what it is for alpha: ln V, or alpha_scale."""
    if not sequence.steps:
        return {}
    settings, step = sequence.settings, sequence.steps[-1]
    calibrated = settings.alpha_scale if settings.alpha in SCALED_RULES else None
    scale = calibrated or math.log(sequence.model.vocab_size)
    shares = [min(1.0, max(0.0, nats / scale)) for nats in step.entropy]
    return dict(zip(step.masked, zip(step.argmax, shares, strict=True), strict=True))


def _shade(uncertainty: float) -> Style:
    red, green, blue = (round(a + (b - a) * uncertainty) for a, b in zip(_CERTAIN, _UNCERTAIN, strict=True))
    ink = "rgb(20,26,34)" if uncertainty < 0.5 else "rgb(200,212,224)"
    return Style.parse(f"{ink} on rgb({red},{green},{blue})")


def _counters(sequence: Sequence) -> Text:
    passes = sequence.forwards.denoise
    filled = int((sequence.initially_masked & (sequence.canvas != sequence.model.mask_token_id)).sum())
    parts = [
        f"block {sequence.block_index + 1}/{len(sequence.blocks)}",
        f"step {sequence.step}",
        f"{filled} tokens",
        f"{passes} passes",
        f"{filled / max(1, passes):.2f} tokens per forward",
    ]
    return Text(" · ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def is_coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


# -- from a served model's trace ---------------------------------------------------------------------------------------


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
