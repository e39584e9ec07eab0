"""What the terms of a report mean. The page shows a term's definition on hover, focus or touch, and lists them at the
end; the Markdown report lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from markupsafe import Markup

TERMS = {
    "SeqD": "The base model trained as long as the target, without residuals: what RCD is compared with.",
    "RCD": (
        "Residual Context Diffusion. The predictions that a pass does not commit are fed into the next pass as a "
        "residual."
    ),
    "confidence threshold": (
        "A pass commits the tokens whose probability is above it, and at least one. A lower threshold means fewer "
        "passes and more mistakes."
    ),
    "tokens per pass": (
        "Generated tokens divided by the passes that choose tokens. A pass of the reference model counts by its FLOPs. "
        "Higher is faster."
    ),
    "tokens per forward": "The paper's measure: tokens per pass without counting the passes of the reference model.",
    "tokens/s": "Generated tokens divided by the seconds that one decoding process took, on the hardware named below.",
    "95 % interval": (
        "A range that covers the true value in 95 of 100 such evaluations. It covers the choice of problems, not the "
        "chance in a training."
    ),
    "paired bootstrap": (
        "The problems are drawn again with replacement, 2,000 times, each with the answers of both methods; the "
        "interval has the middle 95 % of the results."
    ),
    "AUP": "Area under the curve of accuracy against speed, in which inaccurate points count little. Higher is better.",
    "reference": "The model whose predictions are the residuals in training; at decoding it can start a block.",
    "zero start": "The first pass of a block has no residual.",
    "reference start": "A pass of the reference model makes the first residual of a block.",
    "T_res": "The temperature of the residual's weight alpha at decoding.",
    "alpha": "The weight of a residual: 0 leaves the mask token's embedding alone, 1 replaces it.",
    "block": "The tokens that are decoded together.",
    "FLOPs": "Arithmetic operations of a computer, here of matrix products.",
    "percentage points": "The difference of two percentages: from 90 % to 95 % is 5 percentage points.",
    "percentile": "The value below which a given percentage of the results lies.",
    "prefill": "A pass that only puts the prompt into the cache.",
    "store": "A pass that only puts a finished block into the cache.",
}
_LONGEST_FIRST = sorted(TERMS, key=len, reverse=True)
_WORDS = re.compile("|".join(rf"(?<![\w/-]){re.escape(term)}(?![\w-])" for term in _LONGEST_FIRST))


def used(text: str) -> list[str]:
    """The terms of a text, in the order of TERMS."""
    found = set(_WORDS.findall(text))
    return [term for term in TERMS if term in found]


class Page:
    """What a template collects while it is rendered: its sections, and the terms that it shows.

    contents: (id, title, whether it is a part of the section before).
    """

    def __init__(self) -> None:
        self.contents: list[tuple[str, str, bool]] = []
        self._in_section: set[str] = set()
        self._on_page: set[str] = set()

    def section(self, title: str, part: bool = False) -> str:
        """Note a heading -> its id. Terms are marked again below it."""
        self._in_section.clear()
        name = re.sub(r"\W+", "-", title.lower()).strip("-") or "section"
        taken = [identifier for identifier, _, _ in self.contents]
        identifier = name if name not in taken else f"{name}-{len(taken)}"
        self.contents.append((identifier, title, part))
        return identifier

    def define(self, text: str) -> Markup:
        """The text, escaped, with the first occurrence of each term in a section marked for its definition."""
        parts, end = [], 0
        for match in _WORDS.finditer(text):
            if match[0] not in self._in_section:
                self._in_section.add(match[0])
                self._on_page.add(match[0])
                parts += [Markup.escape(text[end : match.start()]), _marked(match[0])]
                end = match.end()
        return Markup("").join([*parts, Markup.escape(text[end:])])

    def definitions(self) -> Iterable[tuple[str, str]]:
        """The terms marked so far and what they mean."""
        return [(term, meaning) for term, meaning in TERMS.items() if term in self._on_page]


def _marked(term: str) -> Markup:
    # Focusable, so that a tap or the Tab key shows the definition as well. No script is needed.
    return Markup('<span class="term" tabindex="0">{}<span class="meaning" role="tooltip">{}</span></span>').format(
        term, f"{term}: {TERMS[term]}"
    )
