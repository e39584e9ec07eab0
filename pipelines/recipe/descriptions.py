"""One sentence per field of rcd_core's settings classes: for the recipe reference, the HTTP schema and `rcd --help`."""

from __future__ import annotations

from pathlib import Path

import yaml

# Class -> "section" or a field -> sentence, which may end with "; null: ...".
DESCRIPTIONS: dict[str, dict[str, str]] = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader
)
