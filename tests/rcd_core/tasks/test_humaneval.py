"""HumanEval: disabled by default, the official program, and the limits of its processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from rcd_core.errors import UserError
from rcd_core.tasks import check_gradable, get_task, grade
from rcd_core.tasks.code_runner import run_program
from rcd_core.tasks.humaneval import program

HEAD = 'def add(a: int, b: int) -> int:\n    """Sum of both."""\n'
ROW = {
    "prompt": HEAD,
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
ANSWER = json.dumps({field: ROW[field] for field in ("prompt", "test", "entry_point")})


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCD_RUN_CODE", "1")


@pytest.mark.parametrize("value", [None, "0", "yes"])
def test_code_runs_only_if_allowed(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RCD_RUN_CODE", raising=False)
    if value is not None:
        monkeypatch.setenv("RCD_RUN_CODE", value)
    for check in (lambda: check_gradable("humaneval"), lambda: grade("humaneval", "", ANSWER)):
        with pytest.raises(UserError, match="RCD_RUN_CODE=1"):
            check()
    check_gradable("gsm8k")


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("    return a + b", True),
        ("    return a - b", False),
        ("    return a +", False),
        ("def add(a, b):\n    return a + b", True),
        ("Sure!\n```python\ndef add(a, b):\n    return a + b\n```\nThat adds.", True),
        ("```python\nprint(add(1, 2))\n```\n```python\ndef add(a, b):\n    return b + a\n```", True),
        ("```python\ndef add(a, b):\n    return a + b\n```\n```python\nadd(1, 2)\n```", True),
        ("```python\ndef add(a, b):\n    return a\n```\nNo:\n```python\ndef add(a, b):\n    return a + b\n```", True),
        ("```python\ndef add(a, b):\n    return a + b\n```\n```python\ndef added(a, b):\n    return a\n```", True),
        ("```\n    return a + b\n```", True),
        ("```python\ndef add(a, b):\n    return a + b", True),  # truncated after the code
        ("I would add them.", False),
        ("", False),
        ("    exit(0)", False),
        ("    import os; os._exit(0)", False),
        ("    while True: pass", False),
    ],
)
@pytest.mark.usefixtures("allowed")
def test_completions_are_run_against_the_tests(completion: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcd_core.tasks.humaneval.run_program", lambda text: run_program(text, seconds=2.0))
    assert grade("humaneval", completion, ANSWER) is right


DEF = "def add(a, b):\n    return a + b"
RIGHT_CODE = [
    "    return a + b\n```", "    return a + b\n```\nThis adds both.", "    return a + b\n\nThis adds both.",
    f"{DEF}\n```",
    f"{DEF}\n```\nThat's it!", f"```Python\n{DEF}\n```", f"```PYTHON\n{DEF}\n```", f"```python3\n{DEF}\n```",
    f"``` python\n{DEF}\n```", f"```py\n{DEF}\n```", f"```python title=x\n{DEF}\n```", f"````python\n{DEF}\n````",
    f"```\n{DEF}\n```".replace("\n", "\r\n"), f"```python\n{DEF}\n```".replace("\n", "\r\n"), f"~~~\n{DEF}\n~~~",
    f"~~~python\n{DEF}\n~~~", "1. Code:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    "```python\ndef plus(a, b):\n    return a + b\n```\nthen\n```python\ndef add(a, b):\n    return plus(a, b)\n```",
    "```python\ndef add(a, b):\n    return plus(a, b)\n```\nwith\n```python\ndef plus(a, b):\n    return a + b\n```",
    "```python\nfrom operator import add as plus\n```\n```python\ndef add(a, b):\n    return plus(a, b)\n```",
    f"Here: ```python\n{DEF}\n```", f"```bash\npip install x\n```\n```python\n{DEF}\n```", f"```python\n{DEF}```",
    f"```python\n{DEF}\n```\nOutput:\n```\n3\n```",
]  # fmt: skip
WRONG_CODE = [
    "    return a - b\n```",
    "    return a +\n```",
    "```python\ndef plus(a, b):\n    return a + b\n```",
    "```\n```",
]


@pytest.mark.parametrize("code", [*RIGHT_CODE, *WRONG_CODE])
@pytest.mark.usefixtures("allowed")
def test_code_is_read_from_all_kinds_of_fences(code: str) -> None:
    assert grade("humaneval", code, ANSWER) is (code in RIGHT_CODE)


@pytest.mark.usefixtures("allowed")
def test_the_problem_of_a_row() -> None:
    task = get_task("humaneval")
    problem = task.problem(ROW)
    assert HEAD.strip() in problem.prompt and problem.answer == ANSWER
    assert ROW["test"] not in problem.prompt and "return a + b" not in problem.prompt
    assert task.grade(problem.prompt, problem.response, problem.answer)
    with pytest.raises(UserError, match="entry_point"):
        task.problem({**ROW, "entry_point": "add; boom"})
    with pytest.raises(UserError, match="prompt, test, entry_point"):
        program("", "{}")


# -- limits


@pytest.mark.parametrize(
    "code",
    [
        "open('left-behind', 'w')",
        "import os; os.open('left-behind', os.O_CREAT | os.O_WRONLY)",
        "import os; os.system('true')",
        "import os; os.remove(__import__('sys').argv[0])",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import ctypes",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))",
        "bytearray(3 << 30)",
        "raise KeyboardInterrupt",
        "input()",
    ],
)
def test_what_a_program_cannot_do(code: str) -> None:
    assert run_program("pass")
    caught = f"try:\n    exec({code!r})\nexcept BaseException:\n    raise SystemExit(1)"
    assert not run_program(caught)


def test_a_program_sees_an_empty_directory_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    assert run_program("import os\nassert os.listdir() == [] and 'A_SECRET' not in os.environ")
    assert run_program("import sys\nassert sys.stdin.read() == ''\nprint('noise' * 100000)")


def test_a_program_is_killed_at_the_deadline_and_leaves_no_process(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    started = time.monotonic()
    assert not run_program("import time; time.sleep(60)", seconds=0.5)
    assert time.monotonic() - started < 30
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert os.getcwd() != str(tmp_path)
