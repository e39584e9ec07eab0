"""`rcd signals plan`: what a cache of reference signals needs, and when it pays."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from pipelines.cli.plan import Rows, device_time, rows_of, shape_of
from pipelines.cli.plan_flags import SignalsPlanFlags
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.signals.costs import PASSES, Volume, column_bytes, costs, volume
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig


def plan_signals(flags: SignalsPlanFlags) -> int:
    for name, valid, range_ in (
        ("peak_tflops", 0 < flags.peak_tflops < math.inf, "above 0"),
        ("mfu", 0 < flags.mfu <= 1, "in (0, 1]"),
        ("storage_hours", 0 <= flags.storage_hours < math.inf, "at least 0"),
    ):
        if not valid:
            raise UserError(f"--{name} is {getattr(flags, name)}; it must be {range_}")
    recipe = load_recipe(flags.recipe, flags.set)
    if recipe.reference is None:
        raise UserError(f"recipe {recipe.name} has no reference, so there are no signals to plan; add the section")
    rows = rows_of(recipe, flags)
    base = recipe.base.start if recipe.base else None
    reference, target = recipe.reference.start or base, recipe.target.start or base
    assert reference is not None and target is not None  # rules of the recipe
    models = (("reference", reference, flags.reference_params), ("target", target, flags.target_params))
    shapes = {k: shape_of(f"{k}.start", start, recipe, None) for k, start, given in models if not given}
    size = amounts(recipe, rows, shapes["reference"].vocab_size if "reference" in shapes else None)
    num_reference, num_target = (given or shapes[key].parameters for key, _, given in models)
    families = [
        *(shape.family for shape in shapes.values()),
        *(s.family for _, s, _ in models if isinstance(s, ModelConfig)),
    ]
    passes = PASSES[families[0] if families else "sdar"]
    speed = flags.peak_tflops * 1e12 * flags.mfu
    cost = costs(size, passes, num_reference, num_target, speed, flags.storage_hours)
    exact = "counted from the prepared examples" if size.exact else "at most, by the recipe's limits"
    per_second = f"({flags.peak_tflops:g} TFLOP/s x {flags.mfu:g})"
    num_targets = sum(r.source == "signals" for r in recipe.residuals().values())
    lines = [
        f"rows {size.rows:,} of {size.examples:,} examples x {recipe.noise.draws} draws; tokens {size.tokens:,}; "
        f"masked tokens {size.masked:,} ({exact})",
        *_byte_lines(size, recipe.signals.top_k, recipe.signals.keep_mass),
        f"reference: 2 x {num_reference:.3g} parameters x {passes} x {size.tokens:,} tokens / {per_second} "
        f"= {device_time(cost.reference_hours)} on one device",
        f"online, for every target: 2 x {num_reference:.3g} parameters x {passes} x {size.trained_tokens:,} tokens "
        f"/ {per_second} = {device_time(cost.online_hours)}, {cost.online_hours / cost.target_hours:.1%} of its "
        f"training (6 x {num_target:.3g} parameters, the same tokens: {device_time(cost.target_hours)})",
        f"break-even: (cached {device_time(cost.reference_hours)} + storage {device_time(flags.storage_hours)}) / "
        f"online {device_time(cost.online_hours)} = {cost.break_even:.2f} targets; this recipe trains {num_targets} "
        "from signals",
    ]
    console = Console(soft_wrap=True)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return 0


def amounts(recipe: Recipe, rows: Rows, vocab_size: int | None) -> Volume:
    """Until the stage prepare has counted them: rows of the mean length, in a vocabulary of this size."""
    data = recipe.data.model_copy(update={"num_train": rows.examples, "max_length": round(rows.mean_tokens)})
    changes: dict[str, Any] = {"data": data}
    if vocab_size is not None:
        changes["tokenizer"] = recipe.tokenizer.model_copy(update={"path": None, "vocab_size": vocab_size})
    return volume(recipe.model_copy(update=changes))


def _byte_lines(size: Volume, top_k: int, keep_mass: float | None) -> list[str]:
    columns = column_bytes(size, top_k)
    total = sum(columns.values())
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in columns.items())
    most = "at most, as k is adaptive, " if keep_mass is not None else ""
    per_token = total / max(1, size.masked)
    return [f"bytes, predicted: {most}{total / 1e6:,.1f} MB, {per_token:.1f} per masked token; in MB: {parts}"]
