"""GSM1K: GSM8K written anew, to find models that learned GSM8K's test set by heart (Zhang et al. 2024, 2405.00332).

A row looks like this one (made up); there is no worked answer:

    {"question": "A kiosk sells 4 papers an hour. How many does it sell in 6 hours?", "answer": "24"}

Graded as GSM8K is, by its authors too; its official grader:
https://github.com/openai/grade-school-math/blob/2909d34ef28520753df82a2234c357259d254aa8/grade_school_math/dataset.py
"""

from __future__ import annotations

from collections.abc import Mapping

from rcd_core.tasks.answers import MARKER
from rcd_core.tasks.gsm8k import Gsm8k


class Gsm1k(Gsm8k):
    name = "gsm1k"
    hub = "hf://ScaleAI/gsm1k:test"

    def response(self, row: Mapping[str, str]) -> str:
        answer = row["answer"].strip()
        return answer if MARKER in answer else f"{MARKER} {answer}"
