"""Grading inside a Ray actor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psutil

from rcd_core.tasks import grade, math_grader


class Grader:
    def grade(self, completions: list[str], answer: str) -> tuple[list[bool], int]:
        with ThreadPoolExecutor(2) as pool:
            verdicts = list(pool.map(lambda completion: grade("math500", completion, answer), completions))
        worker = math_grader._GRADER._worker
        return verdicts, worker.pid if worker else 0


def test_an_actor_grades_in_threads_and_its_grading_process_ends_with_it(ray_cluster: str) -> None:
    import ray

    grader = ray.remote(num_cpus=1)(Grader).remote()
    # Expressions, because plain numbers are compared without the grading process.
    verdicts, pid = ray.get(grader.grade.remote([r"\boxed{2(x+1)}", r"\boxed{2x+1}", r"\boxed{x+x+2}"], "2x+2"))
    assert verdicts == [True, False, True]
    process = psutil.Process(pid)
    ray.kill(grader)
    process.wait(30)
