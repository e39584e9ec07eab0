r"""HumanEval: complete a Python function so that its hidden tests pass (Chen et al. 2021, arXiv 2107.03374).

A row looks like this one (made up):

    {"task_id": "HumanEval/0", "entry_point": "double",
     "prompt": "def double(x: int) -> int:\n    \"\"\"Twice x. double(2) is 4.\"\"\"\n",
     "canonical_solution": "    return 2 * x\n",
     "test": "def check(candidate):\n    assert candidate(3) == 6\n"}

Grading runs generated code. It is disabled unless RCD_RUN_CODE=1; `code_runner` says what its limits do not prevent.
The program is the official one: prompt + completion + tests. `code_blocks` takes the code from a completion.
https://github.com/openai/human-eval/blob/463c980b59e818ace59f6f9803cd92c749ceae61/human_eval/execution.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.base import Problem, no_generator
from rcd_core.tasks.code_blocks import extract_code
from rcd_core.tasks.code_runner import run_program

RUN_CODE = "RCD_RUN_CODE"  # environment variable
INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block.\n\n"
_HIDDEN = ("prompt", "test", "entry_point")


class HumanEval:
    name = "humaneval"
    infill = False
    fields: tuple[str, ...] = ("prompt", "canonical_solution", "test", "entry_point")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        raise no_generator(self.name, split, "hf://openai/openai_humaneval:test")

    def problem(self, row: Mapping[str, str]) -> Problem:
        """The answer is JSON: prompt, tests and function name."""
        if not row["entry_point"].strip().isidentifier():
            raise UserError(f"entry_point is {row['entry_point'][:40]!r}; it must be a function name")
        return Problem(
            prompt=INSTRUCTION + _in_block(row["prompt"]),
            response=_in_block(row["prompt"] + row["canonical_solution"]),
            answer=json.dumps({field: row[field] for field in _HIDDEN}),
        )

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        check_allowed()
        return run_program(program(completion, answer))


def check_allowed() -> None:
    """Raise UserError unless the environment allows running generated code."""
    if os.environ.get(RUN_CODE) != "1":
        raise UserError(
            f"task 'humaneval' runs generated code, and {RUN_CODE} is {os.environ.get(RUN_CODE)!r}; "
            f"set {RUN_CODE}=1 if that is safe, e.g. in a container without network"
        )


def program(completion: str, answer: str) -> str:
    """The source to run: prompt, code of the completion, tests and their call."""
    try:
        head, test, name = (json.loads(answer)[field] for field in _HIDDEN)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"answer is {answer[:40]!r}; grading humaneval needs JSON with {', '.join(_HIDDEN)}") from error
    newline = "" if head.endswith("\n") else "\n"  # the prompt, which ends in a docstring, is a complete function
    code = extract_code(completion, head + newline, name)
    return f"{head}{newline}{code}\n{test}\ncheck({name})\n"


def _in_block(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"
