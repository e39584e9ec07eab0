r"""The closed list of units, and how they are split from a value: 5\text{ cm}, 3.5 m/s^2, 72^\circ, \$5, 50%."""

from __future__ import annotations

import re

_NAMES = """
mm millimeter millimeters millimetre millimetres; cm centimeter centimeters centimetre centimetres
m meter meters metre metres; km kilometer kilometers kilometre kilometres; in inch inches; ft foot feet; yd yard yards
mi mile miles; mg milligram milligrams; g gram grams; kg kilogram kilograms; lb lbs pound pounds; oz ounce ounces
ton tons tonne tonnes; ml mL milliliter milliliters millilitre millilitres; l L liter liters litre litres
gal gallon gallons; cup cups; s sec secs second seconds; ms millisecond milliseconds; min mins minute minutes
h hr hrs hour hours; day days; week weeks; month months; yr year years; mph; kph; rpm; Hz hertz; J joule joules
kJ; N newton newtons; W watt watts; kW; V volt volts; A amp amps ampere amperes; C coulomb coulombs; K kelvin kelvins
Pa pascal pascals; eV; erg ergs; mol mole moles; rad radian radians; degree degrees deg; unit units
dollar dollars USD; cent cents; euro euros EUR; percent %; acre acres; hectare hectares
apple apples; person people; student students; child children; way ways; time times; item items; point points
page pages; book books; ticket tickets; coin coins; marble marbles; ball balls; box boxes; car cars; egg eggs
block blocks; piece pieces; cookie cookies; game games; step steps; mark marks; card cards
""".replace("\n", ";")
UNITS = {word: names.split()[0] for names in _NAMES.split(";") for word in names.split()}
_WRAPPED = r"\\(?:text|textrm|textup|mathrm|mbox|rm|textit|textbf|hbox|operatorname)\s*\{([^{}]*)\}"
_POWER = r"(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?"
_TRAILING_WRAPPED = re.compile(rf"(.*?)\s*\{{?\s*{_WRAPPED}{_POWER}(?:\s*/\s*{_WRAPPED}{_POWER})?\s*\}}?", re.S)
_TRAILING_WORDS = re.compile(
    r"(.*?[\d})\]])(\s*)"
    r"((?:(?:sq\.?|square|cubic)\s+)?[A-Za-z]+(?:[\s/·^{}]|\\cdot |-?\d)*(?:[A-Za-z]|[\s/·^{}]|\\cdot |-?\d)*)"
)
_ORDINAL = re.compile(
    r"(\d{1,18})\s*\^?\s*\{?\s*(?:\\(?:text|mathrm|textrm|textsuperscript)\s*\{)?\s*(st|nd|rd|th)\s*\}*"
)


def split_unit(text: str) -> tuple[str, str]:
    """(value, unit in a normal form); the unit is empty if there is none, or if it is not on the list."""
    if match := _ORDINAL.fullmatch(text):
        return (match[1], "") if match[2] == _suffix(int(match[1])) else (text, "")
    if match := re.fullmatch(r"(-?)\s*\\?\$\s*(-?\s*[\d.].*)", text):
        value, unit = split_unit(match[1] + match[2])
        return (value, "dollar") if unit in ("", "dollar") else (text, "")
    if match := re.fullmatch(r"(?!.*\\(?:sin|cos|tan|cot|sec|csc)(?![a-z]))(.*?)\s*(?:%|\^\\circ)", text, re.S):
        return match[1].strip(), "percent" if text.endswith("%") else "degree"
    if match := re.fullmatch(r"(.*[\d})])\s*\^\\circ\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])\s*\}?", text):
        return match[1].strip(), f"degree {match[2]}"
    if match := _TRAILING_WRAPPED.fullmatch(text):
        unit = _unit(match[2] + (f"^{match[3]}" if match[3] else ""))
        below = _unit(match[4] + (f"^{match[5]}" if match[5] else "")) if match[4] is not None else None
        value = re.sub(r"\\(?:cdot)?\s*$", "", match[1]).strip()
        if value and unit and below != "":
            return value, unit + (f"/{below}" if below else "")
    if match := _TRAILING_WORDS.fullmatch(text):
        unit = _unit(match[3])
        letter = len(match[3].strip()) == 1  # a variable unless it is set off from a number
        if unit and (not letter or (match[2] and re.fullmatch(r"-?[\d.,]+", match[1]))):
            return match[1].strip(), unit
    return text, ""


def _unit(text: str) -> str:
    """A unit in a normal form, "m/s^2" for "metres per second squared"; empty if a word is not on the list."""
    text = re.sub(r"\bper\b", "/", text.replace("{", "").replace("}", "").replace("\\cdot", " ").replace("·", " "))
    text = re.sub(r"\b(?:sq\.?|square)\s+([A-Za-z]+)", r"\1^2", re.sub(r"\bcubic\s+([A-Za-z]+)", r"\1^3", text))
    text = re.sub(r"\s+squared\b", "^2", re.sub(r"\s+cubed\b", "^3", text)).strip().rstrip(".")
    parts = []
    for factor in re.findall(r"/|[^/\s]+", text):
        match = re.fullmatch(r"([A-Za-z%]+)(\^-?\d)?", factor)
        word = match and (UNITS.get(match[1]) or UNITS.get(match[1].lower() if len(match[1]) > 2 else ""))
        if factor != "/" and not word:
            return ""
        parts.append("/" if factor == "/" else f"{word}{match[2] or ''}" if match else "")
    return " ".join(parts).replace(" / ", "/")


def _suffix(number: int) -> str:
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
