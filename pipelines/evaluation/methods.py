"""The methods of an evaluation: every model of the run in every way that the recipe decodes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from pipelines.evaluation.actor import Method
from pipelines.evaluation.results import MethodInfo
from pipelines.run.directory import StageContext

BASELINE = "seqd"


def make_methods(ctx: StageContext) -> Iterator[Method]:
    """Every model in every way it is decoded; the baseline comes first for each block length."""
    evaluate = ctx.recipe.evaluate
    lengths = evaluate.block_lengths or (evaluate.decode.block_length or ctx.recipe.block_length,)
    for length in lengths:
        suffix, words = (f"/b{length}", f", block {length}") if len(lengths) > 1 else ("", "")
        for method in _methods_of_length(ctx, length):
            info = method.info
            baseline = info.baseline and info.baseline + suffix
            info = replace(info, name=info.name + suffix, title=info.title + words, baseline=baseline)
            yield replace(method, info=info)


def _methods_of_length(ctx: StageContext, block_length: int) -> Iterator[Method]:
    recipe, decode = ctx.recipe, ctx.recipe.evaluate.decode
    # A fixed seed: an unset one would be drawn at random.
    decode = replace(decode, block_length=block_length, seed=recipe.seed if decode.seed is None else decode.seed)
    plain = replace(decode, residual=False, residual_source="self", start=None)
    if recipe.baseline:
        yield _method(ctx, BASELINE, "SeqD", "baseline", plain)
    for name in recipe.baselines:
        yield _method(ctx, f"{BASELINE}-{name}", f"SeqD {name}", f"baseline-{name}", plain)
    for stage in ("target", *(f"target-{name}" for name in recipe.variants)):
        variant = stage.removeprefix("target").replace("-", " ")
        trained = recipe.residual(stage)
        if trained is not None and not trained.feeds_back:
            yield _method(ctx, stage, f"No residual{variant}", stage, plain)
            continue
        loopholing = trained is not None and trained.source == "loopholing"
        name = f"RCD{variant}"
        if loopholing:
            name = f"Loopholing{variant.removeprefix(' loopholing')}"
        for start in dict.fromkeys(recipe.evaluate.starts):
            if loopholing and start not in ("zero", "self"):
                continue
            settings = replace(decode, residual=True, start=start)
            yield _method(ctx, f"{stage}/{start}", f"{name}, {start} start", stage, settings)
    for name, extra in recipe.evaluate.arms.items():
        seed = decode.seed if extra.decode.seed is None else extra.decode.seed
        settings = replace(extra.decode, block_length=block_length, seed=seed)
        yield _method(ctx, name, extra.title or name.replace("_", " "), extra.model, settings)


def _method(ctx: StageContext, name: str, title: str, stage: str, settings: Any) -> Method:
    trained = ctx.recipe.residual(stage)
    uses_reference = settings.residual and "reference" in (settings.start, settings.residual_source)
    return Method(
        info=MethodInfo(
            name=name,
            title=title,
            model=stage,
            baseline=BASELINE if ctx.recipe.baseline and name != BASELINE else None,
            start=settings.start,
            block_length=settings.block_length,
            trained_with=asdict(trained) if trained else None,
        ),
        checkpoint=ctx.checkpoint(stage),
        reference=ctx.checkpoint("reference") if uses_reference else None,
        settings=settings,
    )


def uses_t_res(method: Method) -> bool:
    """Whether the method depends on a T_res that the recipe does not give."""
    settings = method.settings
    return settings.residual and settings.residual_source == "self" and settings.residual_temperature is None


def with_t_res(ctx: StageContext, methods: Iterable[Method]) -> Iterator[Method]:
    """The methods with the T_res of this run where the recipe gives none."""
    for method in methods:
        t_res = ctx.residual_temperature(method.info.model) if uses_t_res(method) else None
        yield replace(method, settings=replace(method.settings, residual_temperature=t_res)) if t_res else method
