r"""Rewrites mathematical answers in one spelling of LaTeX: characters (x²), plain text (3*pi/4), delimiters.

Nothing here changes a value or drops a word. `units` has the closed list of what may be dropped.
"""

from __future__ import annotations

import re

from rcd_core.tasks.exact import MOST_DIGITS

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/",
    "±": r"\pm ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\neq ", "≈": r"\approx ",
    "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "π": r"\pi ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "λ": r"\lambda ", "μ": r"\mu ", "ω": r"\omega ",
    "φ": r"\phi ", "σ": r"\sigma ", "τ": r"\tau ", "ρ": r"\rho ", "Δ": r"\Delta ", "Ω": r"\Omega ", "ε": r"\epsilon ",
    "°": r"^\circ ", "º": r"^\circ ", "…": r"\dots ", "′": "'", "％": "%", "，": ",", "（": "(", "）": ")", "＝": "=",
    "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "\u2061": "", "\u200b": "", "ℝ": r"\mathbb{R}",
}  # fmt: skip
_VULGAR = {
    "½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35", "⅘": "45", "⅙": "16",
    "⅚": "56", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log".split()
GREEK = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi psi omega".split()
_WORDS = {name: f"\\{name} " for name in (*FUNCTIONS, *GREEK)} | {
    "infinity": r"\infty ", "infty": r"\infty ", "inf": r"\infty ", "oo": r"\infty ", "emptyset": r"\emptyset ",
    "asin": r"\arcsin ", "acos": r"\arccos ", "atan": r"\arctan ",
}  # fmt: skip
_WORD = re.compile(rf"(?<![A-Za-z\\])(?:np\.|math\.)?({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?![A-Za-z])")
_E_NOTATION = re.compile(r"(?<![\w\\.])((?:\d+\.?\d*|\.\d+))[eE]([-+]?\d+)(?![\w.])")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))(?!\d)")
_SIMPLE = (
    (
        re.compile(r"(?<!\\)\\[()\[\]]|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])|\\!"),
        "",
    ),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leqslant|leq)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\ne(?![A-Za-z])"), r"\\neq "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:ldots|cdots|dotsc|dotsb)(?![A-Za-z])|\.\.\.+"), r"\\dots "),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:degree|deg)(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"(?<=\d)(?:(?<!\\)\\[,:; ]|\{,\}|,\s*\\[,!])\s*(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!=|=/="), r"\\neq "),
    (re.compile(r"\\operatorname\*?\{([a-z]+)\}"), r"\\\1 "),
    (re.compile(r"\\%"), "%"),
)


def normalise(text: str) -> str:
    """The answer without delimiters and full stop, in one spelling of LaTeX."""
    text = _without_delimiters(text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀-₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub(f"[{''.join(_VULGAR)}]", lambda m: "\\frac{{{}}}{{{}}}".format(*_VULGAR[m[0]]), text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", text).replace("√(", "sqrt(")
    text = "".join(_CHARACTERS.get(character, character) for character in text)
    text = re.sub(r",\s*\\!\s*(?=\d{3}(?!\d))", ",", text)
    if "\\begin" not in text:  # in a matrix, \\ separates rows
        text = text.replace("\\\\", "\\")
    for pattern, replacement in _SIMPLE:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\\sqrt\s*(\d|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}", text)
    text = _plain_text_mathematics(text)
    return _E_NOTATION.sub(r"\1\\times10^{\2}", _REPEATING.sub(_repeating, text)).strip().rstrip(".").strip()


def _without_delimiters(text: str) -> str:
    text = text.strip()
    while True:
        before = text
        text = text.rstrip(".").strip() if not re.search(r"\.\.\.+$", text) else text
        for mark in ("**", "__", "`", "$$", "$", "*"):
            size = len(mark)
            if len(text) > 2 * size and text.startswith(mark) and text.endswith(mark) and text[-size - 1] != "\\":
                text = text[size:-size].strip()
        if text == before:
            break
    return re.sub(r"(?<!\\)\$(?!\s*[\d.])|(?<=\S)(?<!\\)\$", "", text)


def _plain_text_mathematics(text: str) -> str:
    r"""sqrt(2), exp(5), x**3, 3*pi, 10^-2, x^12 and (a)/(b) in LaTeX. Text with a backslash keeps x^12 as x^1 2."""
    plain = "\\" not in text and "{" not in text
    text = text.replace("**", "^")
    text = re.sub(r"(?<!\^)\*", r"\\cdot ", text)
    for name, opening in (("sqrt", "\\sqrt{"), ("exp", "e^{")):
        text = _call(text, name, opening)
    text = re.sub(r"\^\s*(-\s*\d+(?:\.\d+)?)", r"^{\1}", text)
    if plain:
        text = re.sub(r"\^\s*(\d+(?:\.\d+)?)", r"^{\1}", text)
        text = re.sub(r"_(\d+)", r"_{\1}", text)
    text = _call(text, "^", "^{")
    return _WORD.sub(lambda match: _WORDS[match[1]], text)


def _call(text: str, name: str, opening: str) -> str:
    """`name(argument)` as `opening` argument `}`, with balanced parentheses."""
    start = 0
    pattern = re.compile((re.escape(name) if name == "^" else rf"(?<![A-Za-z\\])(?:np\.|math\.)?{name}") + r"\s*\(")
    while match := pattern.search(text, start):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"(": 1, ")": -1}.get(text[i], 0)
            if not depth:
                text = f"{text[: match.start()]}{opening}{text[match.end() : i]}}}{text[i + 1 :]}"
                break
        start = match.start() + 1
    return text


def _repeating(match: re.Match[str]) -> str:
    whole, head, period = match[1] or "0", match[2], match[3] or match[4]
    if len(whole + head + period) > MOST_DIGITS:
        return match[0]
    bottom = (10 ** len(period) - 1) * 10 ** len(head)
    top = int(whole + head + period) - int(whole + head)
    return f"\\frac{{{top}}}{{{bottom}}}"
