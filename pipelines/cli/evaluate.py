"""`rcd evaluate`: from checkpoints, or a served model, to a table, plots and a page.

rcd evaluate --target RCD --baseline SEQD --task gsm8k --test /data/gsm8k_test.jsonl --output /results/gsm8k
rcd evaluate --url http://127.0.0.1:8000/v1 --model rcd-demo --task gsm8k --test /data/gsm8k_test.jsonl --output DIR

With checkpoints it is a run of its own, whose models are taken as they are: the stages prepare and evaluate with their
keys, their actors and their report. So the same command goes on where it stopped, and a directory that holds results of
other settings is refused with the difference named.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from pipelines.cli.terminal import refuse_in_one_line
from pipelines.evaluation.decode_flags import add_flag
from pipelines.recipe.files import apply_overrides
from pipelines.recipe.settings_files import read_settings, settings_names
from rcd_core.errors import UserError
from rcd_core.io import storage

STAGES = ("prepare", "reference", "target", "baseline", "evaluate")
RESIDUAL_OFF = {
    "residual_off": {"model": "target", "title": "RCD model, residual off", "decode": {"residual": False}},
}
MAX_PROMPT = 32768  # tokens, where a checkpoint has room for more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rcd evaluate --target CKPT [--baseline CKPT] --task TASK --test FILE --output DIR [flags]"
    parser.allow_abbrev = False
    refuse_in_one_line(parser, "rcd evaluate")
    models = parser.add_argument_group("checkpoints", "Directories, URIs or hub ids, taken as they are.")
    add_flag(models, "--target", metavar="CKPT", help="an RCD model; left out, the baseline is evaluated alone")
    add_flag(models, "--baseline", metavar="CKPT", help="SeqD: the same start and training without residuals")
    add_flag(
        models, "--residual_off", action="store_true", help="also the target without feeding back; that is not SeqD"
    )
    add_flag(models, "--reference", metavar="CKPT", help="for start=reference, which is then evaluated as well")
    served = parser.add_argument_group("a live endpoint instead", "RCD_API_KEY or OPENAI_API_KEY is sent, if set.")
    add_flag(served, "--url", help="OpenAI-compatible, for example http://127.0.0.1:8000/v1")
    add_flag(served, "--model", metavar="ID", help="the model to ask for")
    add_flag(served, "--baseline_model", metavar="ID", help="another model of the endpoint, to compare with")
    add_flag(served, "--concurrency", type=int, default=8, metavar="N", help="requests at a time; default: 8")
    add_flag(served, "--reference_flops_weight", type=float, default=1.0, metavar="X",
             help="cost of a reference pass in target passes, which no endpoint tells; default: 1")  # fmt: skip
    what = parser.add_argument_group("what to solve, and how")
    add_flag(what, "--task", help="gsm8k, math500, aime24, sudoku, qa, ...; a wrong name lists all")
    add_flag(what, "--test", action="append", metavar="FILE", help=".jsonl, .parquet, hf://..., synthetic; repeatable")
    add_flag(what, "--output", metavar="DIR", help="directory or URI of the results; the same command goes on there")
    add_flag(what, "--settings", metavar="NAME", help="a shipped settings file, as paper-sdar-b64")
    add_flag(what, "--list_settings", action="store_true", help="show the shipped settings files and end")
    add_flag(what, "--thresholds", nargs="+", type=float, metavar="P", help="confidence thresholds to sweep")
    add_flag(what, "--starts", nargs="+", metavar="START", help="how a block's first residual is made: zero, reference")
    add_flag(what, "--block_lengths", nargs="+", type=int, metavar="N", help="default: the checkpoint's")
    add_flag(what, "--samples", type=int, metavar="K", help="answers per problem, for a temperature above 0")
    add_flag(what, "--num_examples", type=int, metavar="N", help="the first so many problems; default: all")
    add_flag(what, "--seed", type=int, default=0)
    add_flag(what, "--set", action="append", default=[], metavar="KEY=VALUE",
             help="any key of a recipe; decode.x is short for evaluate.decode.x")  # fmt: skip
    ray = parser.add_argument_group("where", "Checkpoints only. Without an address: a local Ray, ended afterwards.")
    add_flag(ray, "--address", help="of a Ray cluster; default: RAY_ADDRESS")
    add_flag(ray, "--actors", type=int, metavar="N", help="decoding processes; default: one per GPU, else one")
    add_flag(ray, "--redo", action="append", default=[], metavar="STAGE", help="make a stage again: prepare, evaluate")
    add_flag(ray, "--dry_run", action="store_true", help="print the recipe that this is, and what would be done")
    add_flag(ray, "--verbose", action="store_true", help="Ray's own logs and progress bars")


def run(options: argparse.Namespace) -> int:
    if options.list_settings:
        return _list_settings()
    wanted = ("task", "test", "output", *(("model",) if options.url else ()))
    if absent := ", ".join(f"--{name}" for name in wanted if not getattr(options, name)):
        raise UserError(f"{absent} is not given; see rcd evaluate --help")
    if options.url:
        return _evaluate_endpoint(options)
    if options.model or options.baseline_model:
        raise UserError("--model and --baseline_model name models of an endpoint; give its --url")
    return _evaluate_checkpoints(options)


def _list_settings() -> int:
    for name in settings_names():
        settings = read_settings(name)
        print(f"{name}\n  {settings.source}")
        for line in settings.unpublished:
            print(f"  not published: {line}")
        decode = ", ".join(f"{key} {value}" for key, value in settings.evaluate.get("decode", {}).items())
        print(f"  block_length {settings.block_length}, {decode}, thresholds {settings.evaluate.get('thresholds')}\n")
    return 0


def _evaluate_endpoint(options: argparse.Namespace) -> int:
    from rich.console import Console

    from pipelines.evaluation.endpoint import EndpointOptions, collect_answers
    from pipelines.report.endpoint import write_report

    for name in ("target", "baseline", "reference", "address", "actors", "redo"):
        if getattr(options, name):
            raise UserError(f"--{name} goes with checkpoints, not with --url; models of an endpoint are --model ID")
    raw: dict[str, Any] = {
        **output_of(options),
        "seed": options.seed,
        "data": {
            "task": options.task,
            "test": [place(name) if name != "synthetic" else name for name in options.test],
            "num_test": options.num_examples,
        },
        "evaluate": given(options, options.starts),
    }
    apply_overrides(raw, overrides(options.set))
    endpoint = EndpointOptions(
        url=options.url,
        model=options.model,
        baseline_model=options.baseline_model,
        concurrency=options.concurrency,
        reference_flops_weight=options.reference_flops_weight,
    )
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # a log file has no width
    console = Console(highlight=False, width=width)
    write_report(collect_answers(raw, endpoint, console), _command(options), console)
    return 0


def _command(options: argparse.Namespace) -> str:
    """The command that reproduces the results of an endpoint, without the flags that do not affect them."""
    words = ["rcd", "evaluate"]
    for name in ("url", "model", "baseline_model", "task", "settings", "samples", "num_examples", "seed"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    for name in ("thresholds", "starts", "block_lengths"):
        if values := getattr(options, name):
            words += [f"--{name}", *map(str, values)]
    for name in ("test", "set"):
        for value in getattr(options, name):
            words += [f"--{name}", value]
    return shlex.join([*words, "--output", options.output])


def _evaluate_checkpoints(options: argparse.Namespace) -> int:
    from pipelines.ray_cluster.connection import temporary_cluster
    from pipelines.recipe.load import parse_recipe
    from pipelines.run.driver import run_recipe

    recipe = parse_recipe(recipe_of(options), "of rcd evaluate")
    if options.dry_run:
        return run_recipe(recipe, STAGES, redo=options.redo, dry_run=True)
    with temporary_cluster(options.address, options.verbose):
        if not any(text.startswith("resources") for text in options.set):
            resources = recipe.resources.model_copy(update=_resources(options))
            recipe = recipe.model_copy(update={"resources": resources})
        return run_recipe(recipe, STAGES, redo=options.redo, verbose=options.verbose)


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """The command line as a recipe that trains nothing."""
    from rcd_core.families.loading import describe_checkpoint

    target = options.target or options.baseline
    if not target:
        raise UserError("neither --target nor --baseline is given; name a checkpoint, or the --url of an endpoint")
    settings = read_settings(options.settings) if options.settings else None
    info, positions = describe_checkpoint(place(target))
    if settings and settings.block_length not in (None, info.block_length):
        print(f"note: {settings.name} has blocks of {settings.block_length} tokens, {target} says {info.block_length}",
              file=sys.stderr)  # fmt: skip
    starts = options.starts
    if starts is None and settings is None:
        starts = ["zero", "reference"] if options.reference else ["zero"]
    plain = {} if options.target else {"residual": {"source": "none"}}
    raw = {
        **output_of(options),
        "seed": options.seed,
        "block_length": (settings and settings.block_length) or info.block_length,
        "data": {
            "task": options.task,
            "train": None,
            "test": [place(name) if name != "synthetic" else name for name in options.test],
            "num_test": options.num_examples,
            "max_length": min(positions, MAX_PROMPT),
        },
        "tokenizer": {"path": place(target)},
        "target": {"start": place(target), "train": None, **plain},
        "baseline": place(options.baseline) if options.target and options.baseline else False,
        "reference": {"start": place(options.reference)} if options.reference else None,
        "evaluate": given(options, starts) | ({"arms": RESIDUAL_OFF} if options.residual_off else {}),
        "deploy": {"start": "zero"},  # not a stage of this run
    }
    apply_overrides(raw, overrides(options.set))
    return raw


def given(options: argparse.Namespace, starts: Sequence[str] | None) -> dict[str, Any]:
    """The keys of a recipe's `evaluate` that the command line gives."""
    named = {name: getattr(options, name) for name in ("settings", "thresholds", "block_lengths", "samples")}
    return {name: value for name, value in {**named, "starts": starts}.items() if value is not None}


def output_of(options: argparse.Namespace) -> dict[str, str]:
    """--output as the storage and the name of a run."""
    path = options.output if storage.is_uri(options.output) else os.path.abspath(os.path.expanduser(options.output))
    parent, _, name = path.rstrip("/").rpartition("/")
    return {"storage": parent or "/", "name": name}


def overrides(texts: Sequence[str]) -> list[str]:
    return [f"evaluate.{text}" if text.startswith("decode.") else text for text in texts]


def place(name: str) -> str:
    """A path as every process of a cluster understands it; URIs and hub ids stay as they are."""
    expanded = os.path.expanduser(name)
    return os.path.abspath(expanded) if os.path.exists(expanded) else name


def _resources(options: argparse.Namespace) -> dict[str, Any]:
    """Actors that fit the cluster. They have no part in what comes out."""
    import ray

    from pipelines.ray_cluster.connection import connect

    connect(options.verbose)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    actors = options.actors or max(1, sum(gpus))
    # One CPU stays free for what hands out the work.
    threads = max(1, min((sum(cpus) - 1) // actors, max(cpus)))
    return {
        "evaluate_actors": actors,
        "cpus_per_worker": threads,
        "gpus_per_worker": min(1.0, sum(gpus) / actors),
    }
