"""`rcd signals`: look at the reference signals of a run, or plan them before any work is done.

rcd signals inspect ~/rcd-runs/demo/signals --reference .../reference/model --target .../target/model
rcd signals plan --recipe demo
"""

from __future__ import annotations

import argparse
import os

from rich.console import Console
from rich.table import Table

from pipelines.recipe.load import load_recipe
from pipelines.signals.costs import PASSES, Volume, column_bytes, costs, parameters, volume
from pipelines.signals.inspect import (
    Sizes,
    kept_histogram,
    measure_fidelity,
    measure_sizes,
    picture,
    read_manifest,
    report_lines,
)
from rcd_core.calibration.distance import entropy_quantile
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.io import storage

HELP = "look at reference signals, or plan them"
QUANTILES = (0.1, 0.5, 0.9, 0.99, 0.999)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="signals_command", required=True)
    inspect = commands.add_parser("inspect", help="what is in a directory of signals, and how faithful it is")
    inspect.add_argument("directory", metavar="DIR", help="<run>/signals of a finished stage; a directory or URI")
    inspect.add_argument("--reference", metavar="CKPT", help="measure fidelity: the checkpoint the signals are of")
    inspect.add_argument("--target", metavar="CKPT", help="measure fidelity: a checkpoint trained on them")
    inspect.add_argument("--sample", type=int, default=4096, metavar="N", help="masked positions to measure on")
    inspect.add_argument("--output", metavar="FILE", help="the PNG; by default DIR.png, beside the directory")
    plan = commands.add_parser("plan", help="rows, bytes, device hours and break-even, before any work")
    plan.add_argument("--recipe", required=True, metavar="R", help="a shipped recipe's name or a YAML file")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    plan.add_argument(
        "--peak-tflops", type=float, default=989.0, metavar="T", help="of the device: 989, H100 bf16 dense"
    )
    plan.add_argument("--mfu", type=float, default=0.4, metavar="F", help="share of the peak that is reached")
    plan.add_argument("--reference-params", type=float, metavar="N", help="where the checkpoint is not on this machine")
    plan.add_argument("--target-params", type=float, metavar="N", help="where the checkpoint is not on this machine")
    plan.add_argument(
        "--storage-hours", type=float, default=0.0, metavar="H", help="what keeping the cache costs, in device hours"
    )


def run(options: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    if options.signals_command == "inspect":
        inspect_signals(options, console)
    else:
        plan_signals(options, console)
    return 0


# -- inspect


def inspect_signals(options: argparse.Namespace, console: Console) -> None:
    directory = os.path.expanduser(options.directory).rstrip("/")
    if (options.reference is None) != (options.target is None):
        raise UserError("fidelity needs both --reference and --target; give both or neither")
    if options.sample < 1:
        raise UserError(f"--sample is {options.sample}; it must be at least 1 masked position")
    manifest = read_manifest(directory)
    sizes = measure_sizes(directory, manifest["shards"], int(manifest["masked_tokens"]))
    tokens = int(manifest["tokens"])
    console.print(
        f"{len(manifest['shards'])} shards, {sizes.rows:,} rows, {tokens:,} tokens, {sizes.masked:,} of them masked "
        f"({sizes.masked / max(1, tokens):.1%}); {manifest['family']}, V = {manifest['vocab_size']:,}",
        highlight=False,
    )
    for reason, count in manifest["bad_rows"].items():
        console.print(f"bad rows: {count} x {reason}", markup=False)
    console.print(_size_table(sizes))
    kept = kept_histogram(directory, manifest["shards"], sizes)
    console.print(_kept_line(kept), highlight=False)
    histogram = manifest["entropy_histogram"]
    found = ", ".join(f"{q:g}: {entropy_quantile(histogram, q):.3f}" for q in QUANTILES) if sizes.masked else "none"
    console.print(f"entropy, nats, by quantile: {found}", highlight=False)
    report = None
    if options.reference is not None:
        report, rule = measure_fidelity(directory, manifest, options.reference, options.target, options.sample)
        scale = "" if rule.alpha_scale is None else f", h = {rule.alpha_scale:.3f}"
        console.print(
            f"fidelity, alpha {rule.alpha}{scale}:", *report_lines(report), sep="\n", markup=False, highlight=False
        )
    output = os.path.expanduser(options.output) if options.output else directory + ".png"
    storage.write_bytes(output if storage.is_uri(output) else os.path.abspath(output), picture(histogram, report))
    console.print(f"picture: {output}", markup=False, highlight=False)


def _size_table(sizes: Sizes) -> Table:
    table = Table("column", "MB", "bytes per masked token")
    for name, size in sorted(sizes.columns.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{size / 1e6:.3f}", f"{size / max(1, sizes.masked):.2f}")
    total = sum(sizes.columns.values())
    table.add_section()
    table.add_row("all", f"{total / 1e6:.3f}", f"{total / max(1, sizes.masked):.2f}")
    table.add_row("per kept entry", "", f"{sizes.per_kept_entry:.2f}")
    table.add_row("without the entries", "", f"{sizes.rest_per_token:.2f}")
    return table


def _kept_line(kept: dict[int, int]) -> str:
    if len(kept) == 1:
        return f"k: {next(iter(kept))} at every position"
    total, mean = sum(kept.values()), sum(k * n for k, n in kept.items()) / sum(kept.values())
    shares, below = [], 0
    for k, count in kept.items():
        below += count
        shares.append((below / total, k))
    quantiles = ", ".join(f"{q:g}: {next(k for share, k in shares if share >= q)}" for q in (0.1, 0.5, 0.9, 1.0))
    return f"k, by quantile: {quantiles}; mean {mean:.2f}"


# -- plan


def plan_signals(options: argparse.Namespace, console: Console) -> None:
    for name in ("peak_tflops", "mfu"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be above 0")
    recipe = load_recipe(options.recipe, options.set)
    if recipe.reference is None:
        raise UserError(f"recipe {recipe.name} has no reference, so there are no signals to plan; add the section")
    found = volume(recipe)
    reference = recipe.reference.start
    target = recipe.target.start or (recipe.base.start if recipe.base else reference)
    families = [start.family for start in (reference, target) if isinstance(start, ModelConfig)]
    passes = PASSES[families[0] if families else "sdar"]
    num_reference = options.reference_params or parameters(reference, found.vocab_size, "--reference-params")
    num_target = options.target_params or parameters(target, found.vocab_size, "--target-params")
    speed = options.peak_tflops * 1e12 * options.mfu
    cost = costs(found, passes, num_reference, num_target, speed, options.storage_hours)
    exact = "counted from the prepared examples" if found.exact else "at most, by the recipe's limits"
    per_second = f"({options.peak_tflops:g} TFLOP/s x {options.mfu:g})"
    num_targets = sum(r.source == "signals" for r in recipe.residuals().values())
    say = [
        f"rows {found.rows:,} of {found.examples:,} examples x {recipe.noise.draws} draws; tokens {found.tokens:,}; "
        f"masked tokens {found.masked:,} ({exact})",
        *_byte_lines(found, recipe.signals.top_k, recipe.signals.keep_mass),
        f"reference: 2 x {num_reference:.3g} parameters x {passes} x {found.tokens:,} tokens / {per_second} "
        f"= {cost.reference_hours:.3g} device hours",
        f"online, for every target: 2 x {num_reference:.3g} parameters x {passes} x {found.trained_tokens:,} tokens "
        f"/ {per_second} = {cost.online_hours:.3g} device hours, {cost.online_hours / cost.target_hours:.1%} of its "
        f"training (6 x {num_target:.3g} parameters, the same tokens: {cost.target_hours:.3g})",
        f"break-even: (cached {cost.reference_hours:.3g} + storage {options.storage_hours:g}) / online "
        f"{cost.online_hours:.3g} = {cost.break_even:.2f} targets; this recipe trains {num_targets} from signals",
    ]
    for line in say:
        console.print(line, markup=False, highlight=False)


def _byte_lines(found: Volume, top_k: int, keep_mass: float | None) -> list[str]:
    columns = column_bytes(found, top_k)
    total = sum(columns.values())
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in columns.items())
    most = "at most, as k is adaptive, " if keep_mass is not None else ""
    per_token = total / max(1, found.masked)
    return [f"bytes, predicted: {most}{total / 1e6:,.1f} MB, {per_token:.1f} per masked token; in MB: {parts}"]
