"""Draws denoising live in a terminal: committed tokens are solid, masked ones show their current best guess, darker the
less certain it is. Text of a model is escaped, as control characters would act on the terminal.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from rcd_core.decode_settings import SCALED_RULES
from rcd_core.tasks.base import MASK_TEXT

if TYPE_CHECKING:  # `rcd chat` draws with this module too, without torch
    from rcd_core.decoding.sequence import Sequence

Decode = Callable[[list[int]], str]
PROMPT, COMMITTED = Style(dim=True), Style(bold=True)
_CERTAIN, _UNCERTAIN = (190, 222, 240), (30, 40, 52)  # backgrounds of a masked token at entropy 0 and 1
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


class Canvas(Protocol):
    def text(self, *, coloured: bool, limit: int) -> Text:
        """The text, or its last `limit` tokens."""

    def counters(self) -> list[str]: ...


@contextmanager
def live_view(canvas: Canvas, console: Console) -> Iterator[Callable[[], None]]:
    """A region of the terminal that is removed at the end. Yields a function that draws the canvas there."""
    coloured = console.color_system is not None and not console.no_color
    # Drawn on demand only: a drawing thread would see a canvas in the middle of a pass.
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def update() -> None:
            width, height = console.size
            rows = max(1, height - 3)
            lines = canvas.text(coloured=coloured, limit=rows * width).wrap(console, width)[-rows:]
            counters = Text(" · ".join(canvas.counters()), style="dim", no_wrap=True, overflow="ellipsis")
            live.update(Group(*lines, Text(), counters), refresh=True)

        update()
        yield update


def _rate(tokens: int, passes: int) -> list[str]:
    return [f"{tokens} tokens", f"{passes} passes", f"{tokens / max(1, passes):.2f} tokens per forward"]


@dataclass
class SequenceCanvas:
    """A sequence in this process. Its settings must have trace=True: guesses and entropies come from the last step."""

    sequence: Sequence
    decode: Decode

    def text(self, *, coloured: bool, limit: int = 1 << 16) -> Text:
        """Up to the end of the current block; when infilling, the whole canvas."""
        sequence = self.sequence
        end = len(sequence.canvas) if sequence.infill else sequence.block[1]
        first = max(0 if sequence.infill else sequence.num_prompt, end - limit)
        masked = sequence.canvas == sequence.model.mask_token_id
        guesses = self._guesses()
        text = Text(tab_size=8)

        def style_of(position: int) -> Style | None:
            if masked[position]:
                return None
            return COMMITTED if sequence.initially_masked[position] else PROMPT

        for style, run in groupby(range(first, end), style_of):
            positions = list(run)
            if style is not None:  # decoded together: a character may take several tokens
                text.append(printable(self.decode(sequence.canvas[positions].tolist())), style)
                continue
            for position in positions:
                token, uncertainty = guesses.get(position, (None, 1.0))
                guess = "" if token is None else self.decode([token])
                _append_guess(text, guess, uncertainty, coloured)
        return text

    def counters(self) -> list[str]:
        sequence = self.sequence
        filled = int((sequence.initially_masked & (sequence.canvas != sequence.model.mask_token_id)).sum())
        block = f"block {sequence.block_index + 1}/{len(sequence.blocks)}"
        return [block, f"step {sequence.live[0].step}", *_rate(filled, sequence.forwards.denoise)]

    def _guesses(self) -> dict[int, tuple[int, float]]:
        """Position -> (top guess, uncertainty in [0, 1]) in the last pass. 1: an entropy of ln V, or alpha_scale."""
        sequence = self.sequence
        if not sequence.steps:
            return {}
        settings, step = sequence.settings, sequence.steps[-1]
        calibrated = settings.alpha_scale if settings.alpha in SCALED_RULES else None
        scale = calibrated or math.log(sequence.model.vocab_size)
        shares = [min(1.0, max(0.0, nats / scale)) for nats in step.entropy]
        return dict(zip(step.masked, zip(step.argmax, shares, strict=True), strict=True))


@dataclass
class _Token:
    text: str
    entropy: float  # nats
    committed: bool


@dataclass
class TraceCanvas:
    """A request to a server that streams its trace. template: the text whose masks are filled; None: text is added."""

    template: str | None = None
    num_passes: int = 0
    tokens: dict[int, _Token] = field(default_factory=dict)  # by position

    def add(self, step: dict[str, Any]) -> None:
        """Add a pass: a decoding.Step with argmax_text, as sent for return_trace "steps"."""
        self.num_passes += 1
        committed = set(step["committed"])
        for position, text, entropy in zip(step["masked"], step["argmax_text"], step["entropy"], strict=True):
            before = self.tokens.get(position)
            if position in committed or before is None or not before.committed:  # else predicted again, and kept
                self.tokens[position] = _Token(text, entropy, position in committed)

    def text(self, *, coloured: bool, limit: int = 0) -> Text:
        drawn = Text(tab_size=8)
        tokens = [token for _, token in sorted(self.tokens.items())]
        if self.template is None:
            for token in tokens:
                _append(drawn, token, coloured)
            return drawn
        # Blocks come in order and a block's first pass has all of its masks, so the n-th token fills the n-th mask.
        for n, fixed in enumerate(self.template.split(MASK_TEXT)):
            if n:
                _append(drawn, tokens[n - 1] if n <= len(tokens) else None, coloured)
            drawn.append(printable(fixed), PROMPT)
        return drawn

    def counters(self) -> list[str]:
        return _rate(sum(token.committed for token in self.tokens.values()), self.num_passes)


def _append(drawn: Text, token: _Token | None, coloured: bool) -> None:
    if token is None:
        _append_guess(drawn, "", 1.0, coloured)
    elif token.committed:
        drawn.append(printable(token.text), COMMITTED)
    else:  # uncertainty 0 for one candidate, 1/2 for two equally likely ones
        _append_guess(drawn, token.text, 1.0 - math.exp(-token.entropy), coloured)


def _append_guess(text: Text, guess: str, uncertainty: float, coloured: bool) -> None:
    """A masked token, shaded by its uncertainty in [0, 1]. An empty guess: no pass has seen it yet."""
    guess = printable(guess, newline="↵") or _UNKNOWN
    if coloured:
        text.append(guess, _shade(uncertainty))
    else:
        text.append(_BLOCKS[round(uncertainty * (len(_BLOCKS) - 1))] + guess)


def _shade(uncertainty: float) -> Style:
    red, green, blue = (round(a + (b - a) * uncertainty) for a, b in zip(_CERTAIN, _UNCERTAIN, strict=True))
    ink = "rgb(20,26,34)" if uncertainty < 0.5 else "rgb(200,212,224)"
    return Style.parse(f"{ink} on rgb({red},{green},{blue})")
