"""`rcd evaluate --url`: the problems of a task sent to a live endpoint, and the same report as of checkpoints.

The endpoint brings its own tokenizer, chat template and defaults; what was in effect comes back with every answer. An
endpoint that is not this project's tells no passes: its report has accuracy and tokens per second, and says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pipelines.cli.evaluate import given, output_of, overrides, place
from pipelines.client import COMMON, Endpoint, api_key
from pipelines.data.problems import TestProblem, read_problems
from pipelines.evaluation.actor import request_seed
from pipelines.evaluation.answer_log import AnswerLog
from pipelines.evaluation.results import ArmInfo
from pipelines.recipe.files import apply_overrides
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.recipe.rules import data_files
from pipelines.recipe.settings_files import apply_settings, read_settings
from pipelines.report.endpoint import write_report
from pipelines.run.directory import RunDirectory, StageContext
from pipelines.run.keys import fingerprint, recipe_values
from rcd_core.errors import UserError
from rcd_core.tasks import check_gradable, get_task

BASELINE = "seqd"
UNKNOWN_BLOCK = 1  # in the recipe; the endpoint's own counts
NO_THRESHOLD = 0.0  # of an endpoint that knows none


@dataclass(frozen=True, kw_only=True)
class HttpArm:
    """One way to ask. info.model: the endpoint's id; settings: what the body says beside prompt, seed, threshold."""

    info: ArmInfo
    settings: dict[str, Any]


def evaluate_endpoint(options: argparse.Namespace) -> int:
    """Ask, grade, compare, write. Returns the exit code."""
    _check(options)
    raw = _raw_recipe(options)
    recipe = parse_recipe(raw, "of rcd evaluate")
    check_gradable(recipe.data.task_of("test"))
    endpoint = Endpoint(options.url, api_key())
    ours = _is_ours(endpoint, options)
    arms = list(_arms(recipe, raw["evaluate"], options, ours))
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # a log has no width of its own
    console, run = Console(highlight=False, width=wide), RunDirectory(recipe.run_directory)
    context = StageContext(recipe=recipe, run=run, stage="prepare", key="", inputs=(), console=console)
    problems = read_problems(context)[: recipe.evaluate.num_examples]
    log = AnswerLog(recipe.run_directory, _material(recipe, options, arms))
    try:
        _Asking(endpoint, recipe, log, options.concurrency, ours, console).all(arms, problems)
    finally:
        log.close()
    write_report(recipe, options, [(arm.info, arm.settings) for arm in arms], problems, log.rows, ours, console)
    return 0


# -- what is asked


def _check(options: argparse.Namespace) -> None:
    wrong = [
        name for name in ("target", "baseline", "reference", "address", "actors", "redo") if getattr(options, name)
    ]
    if wrong:
        raise UserError(f"--{wrong[0]} goes with checkpoints, not with --url; models of an endpoint are --model ID")
    if options.concurrency < 1:
        raise UserError(f"--concurrency is {options.concurrency}; it must be at least 1")


def _raw_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """A recipe for the sake of its rules, complete with its settings file: the endpoint stands for all checkpoints."""
    settings = read_settings(options.settings) if options.settings else None
    raw: dict[str, Any] = {
        **output_of(options),
        "seed": options.seed,
        "block_length": (settings and settings.block_length) or UNKNOWN_BLOCK,
        "data": {
            "task": options.task,
            "train": None,
            "test": [place(name) if name != "synthetic" else name for name in options.test],
            "num_test": options.num_examples,
        },
        "tokenizer": {"path": options.url},
        "target": {"start": options.url, "train": None},
        "reference": {"start": options.url},
        "baseline": False,
        "evaluate": given(options, options.starts),
    }
    apply_overrides(raw, overrides(options.set))
    apply_settings(raw)
    return raw


def _is_ours(endpoint: Endpoint, options: argparse.Namespace) -> bool:
    models = endpoint.models()
    wanted = [name for name in (options.model, options.baseline_model) if name]
    for name in wanted:
        if name not in models:
            raise UserError(f"{endpoint.url} serves no model {name!r}; it serves {', '.join(models) or 'none'}")
    return all(models[name] for name in wanted)


def _arms(recipe: Recipe, evaluate: dict[str, Any], options: argparse.Namespace, ours: bool) -> Iterator[HttpArm]:
    """Only what was given is said to the endpoint, which has defaults for the rest."""
    decode = {k: v for k, v in (evaluate.get("decode") or {}).items() if k not in ("seed", "confidence_threshold")}
    if not ours:
        if unknown := sorted(set(decode) - set(COMMON)):
            known = ", ".join(COMMON)
            raise UserError(f"--url: {options.url} is not this project's and takes {known} only, not {unknown[0]}")
        for name, model in (("target", options.model), ("baseline", options.baseline_model)):
            if model:
                yield _arm(name, model, model, None, decode)
        return
    of_file = None if recipe.block_length == UNKNOWN_BLOCK else recipe.block_length
    lengths = recipe.evaluate.block_lengths or (decode.get("block_length") or of_file,)
    for length in lengths:
        ending, words = (f"/b{length}", f", block {length}") if len(lengths) > 1 else ("", "")
        common = decode | ({"block_length": length} if length else {})
        base = BASELINE + ending if options.baseline_model else None
        if base:
            yield _arm(base, f"SeqD{words}", options.baseline_model, None, common | {"residual": False})
        for start in evaluate.get("starts") or (None,):
            name, title = (f"target/{start}", f"RCD, {start} start") if start else ("target", options.model)
            settings = common | ({"residual": True, "start": start} if start else {})
            yield _arm(name + ending, title + words, options.model, base, settings)


def _arm(name: str, title: str, model: str, baseline: str | None, settings: dict[str, Any]) -> HttpArm:
    info = ArmInfo(
        name=name,
        title=title,
        model=model,
        baseline=baseline,
        start=settings.get("start"),
        block_length=settings.get("block_length") or 0,  # 0: not known before the first answer
        trained_with=None,
    )
    return HttpArm(info=info, settings=settings)


def _material(recipe: Recipe, options: argparse.Namespace, arms: Sequence[HttpArm]) -> dict[str, Any]:
    """All that decides the answers, as keys.differences compares it."""
    models = {"url": options.url, "model": options.model, "baseline_model": options.baseline_model}
    asked = {f"arm {arm.info.name}": arm.settings for arm in arms}
    files = {"data.test": fingerprint(tuple(data_files(recipe.data.test)))}
    recipe_part = recipe_values(recipe, ("data", "evaluate", "seed")) | models | asked
    return {"schema": 1, "recipe": recipe_part, "outside": files, "inputs": {}}


# -- asking


@dataclass(frozen=True)
class _Asking:
    endpoint: Endpoint
    recipe: Recipe
    log: AnswerLog
    concurrency: int
    ours: bool
    console: Console

    def all(self, arms: Sequence[HttpArm], problems: Sequence[TestProblem]) -> None:
        """Arm by arm and threshold by threshold, so that the seconds of each are its own; what the log has is left."""
        evaluate, done = self.recipe.evaluate, self.log.done()
        thresholds = sorted(evaluate.thresholds, reverse=True) if self.ours else [NO_THRESHOLD]
        for arm in arms:
            for threshold in thresholds:
                missing = [
                    (problem, sample)
                    for problem in problems
                    for sample in range(evaluate.samples)
                    if (arm.info.name, threshold, problem.example_id, sample) not in done
                ]
                if missing:
                    at = f" at threshold {threshold:g}" if self.ours else ""
                    self.console.print(f"{arm.info.title}{at}: {len(missing)} answers to get", markup=False)
                    self._some(arm, threshold, missing)

    def _some(self, arm: HttpArm, threshold: float, missing: Sequence[tuple[TestProblem, int]]) -> None:
        together = min(self.concurrency, len(missing))
        pool = ThreadPoolExecutor(together)
        try:
            futures = [pool.submit(self._one, arm, threshold, *this, together) for this in missing]
            for future in as_completed(futures):
                self.log.add(future.result())
        finally:  # an error or Ctrl-C waits for the requests under way, and sends no others
            pool.shutdown(cancel_futures=True)

    def _one(self, arm: HttpArm, threshold: float, problem: TestProblem, sample: int, together: int) -> dict[str, Any]:
        answer = self.endpoint.answer(
            arm.info.model,
            problem.prompt,
            arm.settings | ({"confidence_threshold": threshold} if self.ours else {}),
            infill=get_task(self.recipe.data.task_of("test")).infill,
            ours=self.ours,
            seed=request_seed(self.recipe.seed, problem.example_id, sample),
        )
        return {
            "arm": arm.info.name,
            "threshold": threshold,
            "example_id": problem.example_id,
            "sample": sample,
            "completion": answer.text,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "forwards": answer.forwards,
            "settings": answer.settings,
            "reference_failures": answer.reference_failures,
            "seconds": answer.seconds / together,  # so many are under way at a time, and share the wall's seconds
            "fingerprint": answer.fingerprint,
        }
