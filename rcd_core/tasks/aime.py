r"""AIME of 2024 and of 2025: 30 competition problems each, every answer an integer from 0 to 999.

A row looks like this one (made up):

    {"question": "How many positive integers below $100$ are divisible by $7$ but not by $2$?", "answer": "7"}

The answer may be a number in the file. Few problems, so they are decoded many times: the paper draws 16 samples at
temperature 0.6 and reports pass@1 (`evaluation.pass_at_1`). The competition's graders read an integer; evaluations read
the last box, as here. The grader that lighteval calls is
https://github.com/huggingface/Math-Verify/blob/5d148cfaaf99214c2e4ffb4bc497ab042c592a7a/src/math_verify/grader.py
"""

from __future__ import annotations

from rcd_core.tasks.boxed import BoxedTask


class Aime24(BoxedTask):
    name = "aime24"
    hub = "hf://HuggingFaceH4/aime_2024:train"


class Aime25(BoxedTask):
    name = "aime25"
    hub = "hf://math-ai/aime25:test"
