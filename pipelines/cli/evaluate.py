"""`rcd evaluate`: evaluates checkpoints or a served model. Writes a table, plots and a page.

Checkpoints are evaluated by a run that trains nothing: the stages prepare and evaluate with their keys, actors and
report. The same command therefore resumes, and raises if the directory holds results of other settings.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.cli.flags import EvaluateFlags
from pipelines.cli.terminal import absolute_path, writable_directory
from pipelines.client import check_url
from pipelines.evaluation.endpoint import EndpointOptions, collect_answers
from pipelines.ray_cluster.connection import connect, temporary_cluster
from pipelines.ray_cluster.resources import can_grow
from pipelines.recipe.files import apply_overrides
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.recipe.settings_files import read_settings, settings_names
from pipelines.recipe.sources import SYNTHETIC
from pipelines.report.endpoint import write_report
from pipelines.run.driver import run_recipe
from pipelines.run.messages import make_console
from rcd_core.errors import UserError
from rcd_core.families.loading import describe_checkpoint
from rcd_core.io import storage
from rcd_core.tasks import get_task

STAGES = ("prepare", "prepare-*", "reference", "target", "baseline", "evaluate")
RESIDUAL_OFF = {
    "residual_off": {"model": "target", "title": "RCD model, residual off", "decode": {"residual": False}},
}
MAX_PROMPT = 32768  # tokens, if the checkpoint has more positions


def evaluate(flags: EvaluateFlags) -> int:
    if flags.list_settings:
        return _list_settings()
    required = ("task", "test", "output", *(("model",) if flags.url else ()))
    if missing := ", ".join(f"--{name}" for name in required if not getattr(flags, name)):
        raise UserError(f"{missing} is not given; see rcd evaluate --help")
    if flags.num_examples is not None and flags.num_examples < 1:
        raise UserError(f"--num_examples is {flags.num_examples}; it must be at least 1")
    if flags.url:
        check_url(flags.url)
    writable_directory("--output", flags.output or "")
    for name in flags.test:
        _require_there(name)
    if "synthetic" in flags.test and flags.num_examples is None:
        raise UserError("--test synthetic has no end; give --num_examples")
    if flags.url:
        return _evaluate_endpoint(flags.url, flags.model or "", flags)
    if flags.model or flags.baseline_model:
        raise UserError("--model and --baseline_model name models of an endpoint; give its --url")
    return _evaluate_checkpoints(flags)


def _require_there(name: str) -> None:
    """Of --test. What is on the hub or in a bucket is looked for with the recipe's other files."""
    if name == "synthetic" or storage.is_uri(name) or os.path.exists(os.path.expanduser(name)):
        return
    here = "" if os.path.isabs(name) else f" in {os.getcwd()}"
    raise UserError(f"--test: {name} does not exist{here}; give a file, a URI, hf://owner/name, or synthetic")


def _list_settings() -> int:
    for name in settings_names():
        settings = read_settings(name)
        print(f"{name}\n  {settings.source}")
        for line in settings.unpublished:
            print(f"  not published: {line}")
        decode = ", ".join(f"{key} {value}" for key, value in settings.evaluate.get("decode", {}).items())
        print(f"  block_length {settings.block_length}, {decode}, thresholds {settings.evaluate.get('thresholds')}\n")
    return 0


def _evaluate_endpoint(url: str, model: str, flags: EvaluateFlags) -> int:
    checkpoints_only = ("target", "baseline", "reference", "residual_off", "deterministic", "also", "address", "actors")
    for name in (*checkpoints_only, "gpus", "redo", "dry_run"):
        if getattr(flags, name):
            raise UserError(f"--{name} goes with checkpoints, not with --url; models of an endpoint are --model ID")
    if not 0 <= flags.reference_flops_weight < math.inf:
        raise UserError(f"--reference_flops_weight is {flags.reference_flops_weight:g}; it must be at least 0")
    raw: dict[str, Any] = {
        **output_of(flags),
        "seed": flags.seed,
        "data": {
            "task": flags.task,
            "test": [portable_path(name) for name in flags.test],
            "num_test": flags.num_examples,
        },
        "evaluate": given(flags, flags.starts),
    }
    apply_overrides(raw, overrides(flags.set))
    endpoint = EndpointOptions(
        url=url,
        model=model,
        baseline_model=flags.baseline_model,
        concurrency=flags.concurrency,
        reference_flops_weight=flags.reference_flops_weight,
    )
    console = make_console()
    write_report(collect_answers(raw, endpoint, console), _command(flags), console)
    return 0


def _command(flags: EvaluateFlags) -> str:
    """The command that reproduces the results of an endpoint, without the flags that do not affect them."""
    words = ["rcd", "evaluate"]
    for name in ("url", "model", "baseline_model", "task", "settings", "samples", "num_examples", "grader", "seed"):
        if (value := getattr(flags, name)) is not None:
            words += [f"--{name}", str(value)]
    if flags.reference_flops_weight != 1.0:
        words += ["--reference_flops_weight", f"{flags.reference_flops_weight:g}"]
    for name in ("thresholds", "starts", "block_lengths"):
        if values := getattr(flags, name):
            words += [f"--{name}", *map(str, values)]
    for name in ("test", "set"):
        for value in getattr(flags, name):
            words += [f"--{name}", value]
    return shlex.join([*words, "--output", flags.output or ""])


def _evaluate_checkpoints(flags: EvaluateFlags) -> int:
    recipe = parse_recipe(recipe_of(flags), "of rcd evaluate")
    require_positions(recipe, flags.target or flags.baseline or "")
    if flags.dry_run:
        return run_recipe(recipe, STAGES, keep="give another --output", redo=flags.redo, dry_run=True)
    with temporary_cluster(flags.address, flags.verbose):
        changes = {} if any(text.startswith("resources") for text in flags.set) else _resources(flags)
        recipe = recipe.model_copy(update={"resources": recipe.resources.model_copy(update=changes)})
        return run_recipe(recipe, STAGES, keep="give another --output", redo=flags.redo, verbose=flags.verbose)


def recipe_of(flags: EvaluateFlags) -> dict[str, Any]:
    """A recipe that trains nothing."""
    tasks = further_tasks(flags)
    target = flags.target or flags.baseline
    if not target:
        raise UserError("neither --target nor --baseline is given; name a checkpoint, or the --url of an endpoint")
    settings = read_settings(flags.settings) if flags.settings else None
    info, positions = describe_checkpoint(portable_path(target))
    if settings and settings.block_length not in (None, info.block_length):
        print(f"note: {settings.name} has blocks of {settings.block_length} tokens, {target} has {info.block_length}",
              file=sys.stderr)  # fmt: skip
    if flags.target and not info.rcd.get("source"):
        untrained = f"note: config.json of {target} does not say that it was trained with residuals (rcd.source)"
        print(f"{untrained}; --baseline evaluates a plain model", file=sys.stderr)
    starts = flags.starts
    if starts is None and settings is None:
        starts = ("zero", "reference") if flags.reference else ("zero",)
    plain = {} if flags.target else {"residual": {"source": "none"}}
    raw = {
        **output_of(flags),
        "seed": flags.seed,
        "block_length": (settings and settings.block_length) or info.block_length,
        "data": {
            "task": flags.task,
            "train": None,
            "test": [portable_path(name) for name in flags.test],
            "num_test": flags.num_examples,
            "max_length": min(positions, MAX_PROMPT),
        },
        "tokenizer": {"path": portable_path(target)},
        "target": {"start": portable_path(target), "train": None, **plain},
        "baseline": portable_path(flags.baseline) if flags.target and flags.baseline else False,
        "reference": {"start": portable_path(flags.reference)} if flags.reference else None,
        "deterministic": flags.deterministic,
        "verify_weights": not flags.no_verify,
        "evaluate": given(flags, starts)
        | ({"arms": RESIDUAL_OFF} if flags.residual_off else {})
        | ({"tasks": tasks} if tasks else {}),
        "deploy": {"start": "zero"},  # not a stage of this run
    }
    apply_overrides(raw, overrides(flags.set))
    return raw


def require_positions(recipe: Recipe, target: str) -> None:
    """Raise UserError for answers that leave no room for a prompt."""
    decode = recipe.evaluate.decode
    _, positions = describe_checkpoint(portable_path(target))
    if not get_task(recipe.data.task_of("test")).infill and decode.max_new_tokens >= positions:
        source = f" (of {recipe.evaluate.settings})" if recipe.evaluate.settings else ""
        raise UserError(
            f"evaluate.decode.max_new_tokens is {decode.max_new_tokens}{source}, but {target} has {positions} "
            f"positions for prompt and answer together; lower it: --set decode.max_new_tokens={positions // 2}"
        )


def given(flags: EvaluateFlags, starts: Sequence[str] | None) -> dict[str, Any]:
    """The keys of a recipe's section `evaluate` that flags set."""
    keys = {name: getattr(flags, name) for name in ("settings", "thresholds", "block_lengths", "samples", "grader")}
    values = {**keys, "starts": starts}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


def further_tasks(flags: EvaluateFlags) -> dict[str, Any]:
    """--also as entries of evaluate.tasks; one task may have several files."""
    tasks: dict[str, Any] = {}
    for text in flags.also:
        name, equals, file = text.partition("=")
        if not equals or not file:
            raise UserError(f"--also is {text!r}; write TASK=FILE, for example math500=/data/math500.jsonl")
        tasks.setdefault(name, {"test": [], "num_test": flags.num_examples})["test"].append(portable_path(file))
    return tasks


def output_of(flags: EvaluateFlags) -> dict[str, str]:
    """--output as storage and name of a run."""
    parent, _, name = absolute_path(flags.output or "").rstrip("/").rpartition("/")
    return {"storage": parent or "/", "name": name}


def overrides(texts: Sequence[str]) -> list[str]:
    return [f"evaluate.{text}" if text.startswith("decode.") else text for text in texts]


def portable_path(name: str) -> str:
    """An absolute path, which is valid in every process of a cluster. URIs, hub ids and `synthetic` are unchanged."""
    if name == SYNTHETIC:
        return name
    expanded = os.path.expanduser(name)
    return os.path.abspath(expanded) if os.path.exists(expanded) else name


def _resources(flags: EvaluateFlags) -> dict[str, Any]:
    """What to ask of the cluster. It does not affect the results."""
    import ray  # reads environment variables that connect sets

    connect(flags.verbose)
    alone = not os.environ.get("RAY_ADDRESS")  # a cluster of this machine, which no other will join
    return resources_of(flags, [node for node in ray.nodes() if node["Alive"]], alone)


def resources_of(flags: EvaluateFlags, nodes: Sequence[Mapping[str, Any]], alone: bool = False) -> dict[str, Any]:
    """nodes: of ray.nodes(). A cluster that adds nodes on demand may have no GPU yet: one is asked for. alone: no node
    can join; UserError for more GPUs than there are."""
    cpus, gpus = ([int(node["Resources"].get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    if alone and (flags.gpus or 0) > max(gpus):
        raise UserError(f"--gpus is {flags.gpus:g}, this machine has {max(gpus)}; --gpus 0 decodes on CPUs")
    actors = flags.actors or max(1, int(sum(gpus) / (flags.gpus or 1)))
    each = flags.gpus
    if each is None:
        each = min(1.0, sum(gpus) / actors)
        if not each and can_grow(nodes):
            each = 1.0
            print("note: no node has a GPU yet, so one is asked for; --gpus 0 decodes on CPUs", file=sys.stderr)
    # On CPUs, one stays free for the scheduling actor.
    threads = 1 if each else max(1, min((sum(cpus) - 1) // actors, max(cpus)))
    return {"evaluate_actors": actors, "cpus_per_worker": threads, "gpus_per_worker": each}
