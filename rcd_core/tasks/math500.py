r"""MATH-500: 500 problems of MATH (Hendrycks et al. 2021) that PRM800K held out, for evaluation: no solutions.

A row looks like this one (made up):

    {"question": "Write the set of all real $x$ with $x^2 \\le 9$ as an interval.", "answer": "[-3,3]"}

The official grader of MATH normalises LaTeX and compares text; that of PRM800K then compares by sympy:
https://github.com/hendrycks/math/blob/357963a7f5501a6c1708cf3f3fb0cdf525642761/modeling/math_equivalence.py
https://github.com/openai/prm800k/blob/main/prm800k/grading/grader.py
"""

from __future__ import annotations

from rcd_core.tasks.boxed import BoxedTask


class Math500(BoxedTask):
    name = "math500"
    hub = "hf://HuggingFaceH4/MATH-500@default:test"
