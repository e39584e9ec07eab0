"""Collects the answers of a live endpoint to a task's problems, for `rcd evaluate --url`.

The endpoint brings its own tokenizer, chat template and defaults. An endpoint of this project returns the settings in
effect and the number of passes with every answer; any other returns text and token counts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pipelines.client import COMMON, Endpoint, api_key
from pipelines.data.problems import TestProblem, read_problems
from pipelines.evaluation.actor import request_seed
from pipelines.evaluation.answers import AnswerLog
from pipelines.evaluation.results import MethodInfo
from pipelines.recipe.files import merged
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.recipe.settings_files import apply_settings, read_settings
from pipelines.recipe.sources import data_files, source_list
from pipelines.run.commits import ask_commit, hub_names, pinned
from pipelines.run.directory import RunDirectory, StageContext
from pipelines.run.keys import fingerprint, recipe_values
from pipelines.run.progress import Countdown
from rcd_core.errors import UserError
from rcd_core.tasks import check_gradable, get_task

BASELINE = "seqd"
UNKNOWN_BLOCK = 1  # block_length of the recipe when only the endpoint knows it
NO_THRESHOLD = 0.0  # threshold in the rows of an endpoint that has none


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """model, baseline_model: ids that the endpoint serves. concurrency: requests at a time. reference_flops_weight:
    cost of a reference pass in target passes, which an endpoint does not report."""

    url: str
    model: str
    baseline_model: str | None = None
    concurrency: int = 8
    reference_flops_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise UserError(f"--concurrency is {self.concurrency}; it must be at least 1")

    @property
    def models(self) -> list[str]:
        return [name for name in (self.model, self.baseline_model) if name]


@dataclass(frozen=True, kw_only=True)
class EndpointMethod:
    """One way to query the endpoint. info.model: the endpoint's model id. settings: sent with every request, next to
    prompt, seed and threshold."""

    info: MethodInfo
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EndpointAnswers:
    """answers: the rows of answers.jsonl, ungraded. is_rcd: they have passes and the settings in effect."""

    recipe: Recipe
    options: EndpointOptions
    methods: Sequence[EndpointMethod]
    problems: Sequence[TestProblem]
    answers: Sequence[dict[str, Any]]
    is_rcd: bool


def collect_answers(raw: Mapping[str, Any], options: EndpointOptions, console: Console) -> EndpointAnswers:
    """Send every problem to the endpoint, skipping the answers that an earlier call has logged.

    raw: sections of a recipe (name, storage, seed, data, evaluate); the endpoint stands in for tokenizer and models.
    Answers are appended to answers.jsonl in the run directory as they arrive. Raises UserError for a contradiction in
    the settings, a model that is not served, and a run directory with answers to other settings.
    """
    raw = _complete(raw, options.url)
    recipe = parse_recipe(raw, "of rcd evaluate")
    if recipe.evaluate.tasks:
        raise UserError("--set evaluate.tasks goes with checkpoints; with --url, give each task an --output of its own")
    check_gradable(recipe.data.task_of("test"))
    endpoint = Endpoint(options.url, api_key())
    is_rcd = _is_rcd(endpoint, options)
    methods = list(_methods(recipe, raw["evaluate"], options, is_rcd))
    run = RunDirectory(recipe.run_directory)
    commits = {name: ask_commit(name) for name in hub_names([tuple(source_list(recipe.data.test))])}
    context = StageContext(recipe=pinned(recipe, commits), run=run, stage="prepare", key="", inputs=(), console=console)
    problems = read_problems(context)[: recipe.evaluate.num_examples]
    log = AnswerLog(recipe.run_directory, _fingerprint(recipe, options, methods, commits))
    try:
        _Collector(endpoint, recipe, log, options.concurrency, is_rcd, console).run(methods, problems)
    finally:
        log.close()
    return EndpointAnswers(
        recipe=recipe, options=options, methods=methods, problems=problems, answers=log.rows, is_rcd=is_rcd
    )


# -- what to send


def _complete(raw: Mapping[str, Any], url: str) -> dict[str, Any]:
    """A recipe that passes the rules of recipes, with its settings file filled in."""
    settings = raw["evaluate"].get("settings")
    block_length = (read_settings(settings).block_length if settings else None) or UNKNOWN_BLOCK
    stand_ins = {
        "block_length": block_length,
        "data": {"train": None},
        "tokenizer": {"path": url},
        "target": {"start": url, "train": None},
        "reference": {"start": url},
        "baseline": False,
    }
    completed = merged(stand_ins, raw)
    apply_settings(completed)
    return completed


def _is_rcd(endpoint: Endpoint, options: EndpointOptions) -> bool:
    served = endpoint.models()
    for name in options.models:
        if name not in served:
            raise UserError(f"{endpoint.url} serves no model {name!r}; it serves {', '.join(served) or 'none'}")
    return all(served[name] for name in options.models)


def _methods(
    recipe: Recipe, evaluate: Mapping[str, Any], options: EndpointOptions, is_rcd: bool
) -> Iterator[EndpointMethod]:
    """Requests carry only what the recipe sets; the endpoint has defaults for the rest."""
    decode = {k: v for k, v in (evaluate.get("decode") or {}).items() if k not in ("seed", "confidence_threshold")}
    if not is_rcd:
        if unknown := sorted(set(decode) - set(COMMON)):
            raise UserError(
                f"--set decode.{unknown[0]}: {options.url} is not an endpoint of this project and takes "
                f"{', '.join(COMMON)} only"
            )
        for name, model in (("target", options.model), ("baseline", options.baseline_model)):
            if model:
                yield _method(name, model, model, None, decode)
        return
    default_length = None if recipe.block_length == UNKNOWN_BLOCK else recipe.block_length
    lengths = recipe.evaluate.block_lengths or (decode.get("block_length") or default_length,)
    for length in lengths:
        suffix, words = (f"/b{length}", f", block {length}") if len(lengths) > 1 else ("", "")
        common = decode | ({"block_length": length} if length else {})
        baseline = BASELINE + suffix if options.baseline_model else None
        if options.baseline_model:
            yield _method(f"{baseline}", f"SeqD{words}", options.baseline_model, None, common | {"residual": False})
        for start in evaluate.get("starts") or (None,):
            name, title = (f"target/{start}", f"RCD, {start} start") if start else ("target", options.model)
            settings = common | ({"residual": True, "start": start} if start else {})
            yield _method(name + suffix, title + words, options.model, baseline, settings)


def _method(name: str, title: str, model: str, baseline: str | None, settings: dict[str, Any]) -> EndpointMethod:
    info = MethodInfo(
        name=name,
        title=title,
        model=model,
        baseline=baseline,
        start=settings.get("start"),
        block_length=settings.get("block_length") or 0,  # 0: unknown before the first answer
        trained_with=None,
    )
    return EndpointMethod(info=info, settings=settings)


def _fingerprint(
    recipe: Recipe, options: EndpointOptions, methods: Sequence[EndpointMethod], commits: dict[str, str]
) -> dict[str, Any]:
    """Everything that decides the answers, in the form that keys.differences compares."""
    models = {"url": options.url, "model": options.model, "baseline_model": options.baseline_model}
    settings = {f"arm {method.info.name}": method.settings for method in methods}
    files = {"data.test": fingerprint(tuple(data_files(recipe.data.test)))}
    values = recipe_values(recipe, ("data", "evaluate", "seed"))
    values.pop("evaluate.grader", None)  # answers are graded at the end
    return {"schema": 1, "recipe": values | models | settings, "outside": files, "inputs": {}, "hub": commits}


# -- sending


@dataclass(frozen=True)
class _Collector:
    endpoint: Endpoint
    recipe: Recipe
    log: AnswerLog
    concurrency: int
    is_rcd: bool
    console: Console

    def run(self, methods: Sequence[EndpointMethod], problems: Sequence[TestProblem]) -> None:
        """One method and threshold after the other, so that the measured seconds belong to one of them."""
        evaluate, done = self.recipe.evaluate, self.log.done()
        thresholds = sorted(evaluate.thresholds, reverse=True) if self.is_rcd else [NO_THRESHOLD]
        for method in methods:
            for threshold in thresholds:
                missing = [
                    (problem, sample)
                    for problem in problems
                    for sample in range(evaluate.samples)
                    if (method.info.name, threshold, problem.example_id, sample) not in done
                ]
                if missing:
                    at = f" at threshold {threshold:g}" if self.is_rcd else ""
                    self.console.print(f"{method.info.title}{at}: {len(missing)} requests", markup=False)
                    self._send(method, threshold, missing)

    def _send(self, method: EndpointMethod, threshold: float, missing: Sequence[tuple[TestProblem, int]]) -> None:
        concurrency = min(self.concurrency, len(missing))
        pool = ThreadPoolExecutor(concurrency)
        try:
            futures = [pool.submit(self._answer, method, threshold, *item, concurrency) for item in missing]
            countdown = Countdown(self.console, method.info.title, len(missing), "requests")
            for future in as_completed(futures):
                self.log.add(future.result())
                countdown.add()
        finally:  # after an error or Ctrl-C: wait for running requests, send no others
            pool.shutdown(cancel_futures=True)

    def _answer(
        self, method: EndpointMethod, threshold: float, problem: TestProblem, sample: int, concurrency: int
    ) -> dict[str, Any]:
        answer = self.endpoint.answer(
            method.info.model,
            problem.prompt,
            method.settings | ({"confidence_threshold": threshold} if self.is_rcd else {}),
            infill=get_task(self.recipe.data.task_of("test")).infill,
            ours=self.is_rcd,
            seed=request_seed(self.recipe.seed, problem.example_id, sample),
        )
        return {
            "arm": method.info.name,
            "threshold": threshold,
            "example_id": problem.example_id,
            "sample": sample,
            "completion": answer.text,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "forwards": answer.forwards,
            "settings": answer.settings,
            "reference_failures": answer.reference_failures,
            "seconds": answer.seconds / concurrency,  # concurrent requests share the wall-clock seconds
            "fingerprint": answer.fingerprint,
        }
