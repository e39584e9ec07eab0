"""The structure of normalised LaTeX answers: whether all of it is mathematics, lists, brackets, relations and bases."""

from __future__ import annotations

import re

from rcd_core.tasks.math_text import FUNCTIONS, GREEK

# LaTeX commands of mathematics; any other makes the answer a text.
_COMMANDS = frozenset(
    (
        *FUNCTIONS,
        *GREEK,
        *"Delta Gamma Lambda Omega Phi Pi Psi Sigma Theta Xi bar begin binom cap cdot chi circ cup ddot div".split(),
        *"dot ell emptyset end eta exp frac gcd ge hat hbar in infty int iota kappa lceil le lfloor mathbb".split(),
        *"mathbf mathrm max min mp neq nu odot overline partial pm prime rceil rfloor setminus sqrt sum times".split(),
        *"to upsilon varepsilon varphi vartheta vec vert xi zeta".split(),
    )
)
_WHOLE = re.compile(
    r"(?:\\(?P<command>[A-Za-z]+)|\\[{}|\\]|_\{[^{}\\]*\}|\{[a-z]*matrix\}|\{array\}(?:\{[lcr|]*\})?|\d+(?:\.\d*)?|\.\d+|[A-Za-z]{1,3}"
    r"(?![A-Za-z])|[-+*/^_=<>()\[\]{}|,!'&%]|\s)"
)
_RELATION = re.compile(r"\\(?:le|ge|neq|in|to)(?![A-Za-z])|[=<>]")
_BASE = re.compile(
    r"(-?\s*[0-9A-Za-z.]*\d[0-9A-Za-z.]*)\s*(?:_\s*\{?\s*(?:\\text\{)?\s*(?:base\s*)?(\w+?)\s*\}*|"
    r"\s+(?:\\text\{\s*)?\(?(?:in )?base\s+(\w+)\)?\s*\}?)"
)
_NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_WRAPPER = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mbox|hbox|operatorname)\s*\{([^{}]*)\}")
_OPEN, _CLOSE = "([{", ")]}"


def is_whole(text: str) -> bool:
    """Whether every part of `text` is mathematics: no words, dots, colons or unknown commands, all brackets closed."""
    at = 0
    while at < len(text):
        match = _WHOLE.match(text, at)
        if match is None or (match["command"] and match["command"] not in _COMMANDS):
            return False
        at = match.end()
    braces = re.sub(r"\\[{}]", "", text)
    return text.strip() != "" and braces.count("{") == braces.count("}")


def as_text(text: str) -> str:
    """The answer for comparison as text: no markup, spaces only between digits, no case unless it is one symbol."""
    text = _WRAPPER.sub(r"\1", _WRAPPER.sub(r"\1", text)).replace("$", "")
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".")
    text = re.sub(r"[{}]", "", text.replace("\\dots", "..."))
    if re.fullmatch(r"\([A-Za-z]\)", text):
        text = text[1]
    return text.casefold() if re.search(r"[^\W\d]{3}", text) else text


def unwrap_subscripts(text: str) -> str:
    r"""\lambda_{\text{red}} as \lambda_{red}."""
    return re.sub(r"_\s*\{\s*\\(?:text|mathrm|rm)\s*\{\s*([A-Za-z]+)\s*\}\s*\}", r"_{\1}", text)


def split_list(text: str) -> list[str]:
    """The parts between commas outside brackets, and between "and" and "or"; one part if it is no list."""
    text = re.sub(r"\s*,?\s*\\(?:text|mbox|mathrm)\{\s*(?:and|or)\s*\}\s*|\s*,?\s+(?:and|or)\s+", " , ", text)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and depth <= 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def brackets(text: str) -> tuple[str, str, str] | None:
    """(opening, content, closing) if one pair of brackets encloses the text; a set's brackets are braces."""
    text = text.strip().replace("\\{", "{").replace("\\}", "}") if text.strip().startswith("\\{") else text.strip()
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return None
    depth = 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and i < len(text) - 1:
            return None
    return (text[0], text[1:-1].strip(), text[-1]) if depth == 0 else None


def relations(text: str) -> tuple[str, ...]:
    r"""The relations of a text in order, such as ("<", "\le")."""
    return tuple(_RELATION.findall(text))


def without_name(text: str) -> str:
    r"""The right side of x = 5, f(x) = 5 and x \in [0, 1); other texts as they are."""
    match = re.fullmatch(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?\s*(?:\([a-z]\))?\s*(?:=|\\in(?![A-Za-z]))\s*(.+)", text, re.S)
    return text if match is None or relations(match[1]) or re.match(r"[A-Za-z]{2}", text) else match[1].strip()


def in_base(text: str) -> tuple[str, str] | None:
    r"""(digits, base) of 314_6, 314_{6} or 314 base six; None without a base."""
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    base = (match[2] or match[3]).casefold()
    return match[1].replace(" ", "").upper(), str(_NUMERALS.index(base)) if base in _NUMERALS else base
