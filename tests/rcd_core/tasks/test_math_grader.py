"""Mathematical answers: which are equal, and the lifetime of the grading process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rcd_core.errors import UserError
from rcd_core.tasks import grade, math_grader
from rcd_core.tasks.answers import final_text, last_box
from rcd_core.tasks.math_grader import same_math
from tests.rcd_core.tasks.math_pairs import DIFFERENT, SAME


@pytest.mark.parametrize(("answer", "expected"), SAME)
def test_equal_answers(answer: str, expected: str) -> None:
    assert same_math(answer, expected)


@pytest.mark.parametrize(("answer", "expected"), DIFFERENT)
def test_different_answers(answer: str, expected: str) -> None:
    assert not same_math(answer, expected)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (r"\boxed{3}", True),
        (r"first \boxed{4}, then \boxed{3}", True),
        (r"first \boxed{3}, then \boxed{4}", False),
        (r"\boxed{3} and \boxed{4", False),  # the last box is truncated
        (r"\fbox{3}", True),
        (r"\boxed{\frac{6}{2}}", True),
        (r"\boxed{{3}}", True),
        (r"\boxed{\boxed{3}}", True),
        (r"$\boxed{x = 3}$.", True),
        (r"\boxed{3 \text{ apples}}", True),
        (r"\boxed{}", False),
        (r"boxed{3}", False),
        ("the answer is 3", False),
        ("", False),
    ],
)
def test_the_last_box_is_graded(completion: str, right: bool) -> None:
    assert grade("math500", completion, "3") is right


def test_final_answers_in_boxes_and_after_markers() -> None:
    assert last_box(r"\boxed{a{b}\}c") == r"a{b}\ ".strip()
    assert final_text(r"#### 1 \boxed{ 2 }") == "2"
    assert final_text("so\n#### 1\nas I said") == "1"
    assert final_text("  plain ") == "plain"


# -- the process


def worker() -> psutil.Process:
    """The current worker, started if there is none."""
    assert same_math("x+x", "2x")
    assert math_grader._GRADER._worker is not None
    return psutil.Process(math_grader._GRADER._worker.pid)


def test_plain_answers_start_no_process() -> None:
    math_grader._GRADER.close()
    assert same_math("1,000", "1000.0") and same_math(r"\sqrt 2", r"\sqrt2") and not same_math("1", "2")
    assert math_grader._GRADER._worker is None


def test_one_process_is_used_again() -> None:
    assert worker().pid == worker().pid


def test_a_timeout_ends_the_worker_and_the_next_answer_gets_a_new_one() -> None:
    before = worker()
    assert not same_math("100000000!", "1", seconds=0.5)
    assert not before.is_running()
    assert same_math("y+y", "2y")
    assert worker().pid != before.pid


def test_an_answer_survives_a_killed_worker() -> None:
    before = worker()
    before.kill()
    assert same_math("z+z", "2z")
    assert worker().pid != before.pid


def test_answers_are_graded_from_many_threads() -> None:
    pairs = [(f"{i}+x", f"x+{i + i % 2}") for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda pair: same_math(*pair), pairs))
    assert verdicts == [i % 2 == 0 for i in range(40)]
    assert threading.current_thread() is threading.main_thread()


def test_deep_nesting_is_a_wrong_answer() -> None:
    assert not same_math("x^{" * 300 + "}" * 300, "1", seconds=1)


def grading_process(code: str = "") -> tuple[subprocess.Popen[str], psutil.Process]:
    """(a process that grades, runs `code` and waits for the end of its input, its worker)."""
    program = (
        f"from rcd_core.tasks import math_grader as g\nassert g.same_math('x+x', '2x')\n{code}\n"
        "print(g._GRADER._worker.pid, flush=True)\nimport sys; sys.stdin.read()"
    )
    root = Path(__file__).resolve().parents[3]
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True, cwd=root)
    assert parent.stdout
    return parent, psutil.Process(int(parent.stdout.readline()))


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_worker_outlives_its_parent(end: str) -> None:
    parent, child = grading_process()
    if end == "kill":
        parent.kill()
    assert parent.stdin
    parent.stdin.close()
    assert parent.wait(20) == (0 if end == "exit" else -signal.SIGKILL)
    child.wait(20)


def test_a_fork_gets_a_worker_of_its_own() -> None:
    code = (
        "import os\nfirst = g._GRADER._worker.pid\n"
        "child = os.fork()\n"
        "if not child:\n    os._exit(0 if g.same_math('y+y', '2y') and g._GRADER._worker.pid != first else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\nassert g.same_math('z+z', '2z') and g._GRADER._worker.pid == first"
    )
    parent, child = grading_process(code)
    assert parent.stdin
    parent.stdin.close()
    assert parent.wait(20) == 0
    child.wait(20)


def test_a_missing_math_verify_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    math_grader._GRADER.close()
    with pytest.raises(UserError, match="pip install math-verify"):
        same_math("x+x", "2x")
    assert math_grader._GRADER._worker is None


def test_ctrl_c_does_not_end_the_worker() -> None:
    process = worker()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert worker().pid == process.pid
