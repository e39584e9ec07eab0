"""Rules that involve several keys of a recipe. They read no files; see inputs.py for those."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.recipe.model import Recipe
from pipelines.recipe.sources import ABSOLUTE, SYNTHETIC, checkpoint_problems, checkpoints, source_list, source_problems
from pipelines.recipe.worker_rules import trainings, worker_problems
from rcd_core.decode_settings import CONFIDENCE_RULES, DecodeSettings
from rcd_core.families.config import ModelConfig
from rcd_core.io import storage
from rcd_core.tasks import TASKS

DEPLOYMENTS = ("Target", "Baseline", "Reference", "Ingress")  # names of Serve deployments in stage deploy


def problems(recipe: Recipe) -> Iterator[str]:
    """Yield one message per contradiction between keys and per relative path: key, value, remedy."""
    data, target, reference = recipe.data, recipe.target, recipe.reference
    multiple = data.pad_multiple or recipe.block_length
    if not storage.is_absolute(recipe.storage):
        yield f"storage is {recipe.storage!r}, a relative path; {ABSOLUTE}"
    for key, task in (("task", data.task), ("test_task", data.test_task)):
        if task is not None and task not in TASKS:
            yield f"data.{key} is {task!r}; known tasks: {', '.join(sorted(TASKS))}"
    if data.task_of("test") == "humaneval" and not recipe.evaluate.run_code:
        yield _runs_code("data.task" if data.test_task is None else "data.test_task")
    for key, weights in (("evaluate", recipe.evaluate.weights), ("deploy", recipe.deploy.weights)):
        if weights != "full" and recipe.resources.tensor_parallel > 1:
            yield f"{key}.weights is {weights!r} but resources.tensor_parallel is above 1; set one to its default"
    if recipe.noise.layout != "single":
        name = f"noise.layout is {recipe.noise.layout}"
        if recipe.noise.block_length != recipe.block_length:
            yield (
                f"{name} and noise.block_length {recipe.noise.block_length}; give it the value of "
                f"block_length, {recipe.block_length}"
            )
        if recipe.convert and recipe.convert.block_warmup:
            yield f"{name} but base.convert.block_warmup changes the blocks; set one to its default"
    if data.dialect is not None and data.fields:
        yield f"data.dialect is {data.dialect!r} but data.fields names columns of the task; remove one of them"
    if data.dialect is not None and data.task in TASKS and TASKS[data.task].infill:
        yield f"data.dialect is {data.dialect!r} but task {data.task!r} has no conversations; set it to null"
    if data.train is not None:
        yield from source_problems("train", data.train, data.num_train)
    yield from source_problems("test", data.test, data.num_test)
    if multiple % recipe.block_length:
        yield f"data.pad_multiple is {multiple}; it must be a multiple of block_length {recipe.block_length}"
    if data.max_length < multiple:
        yield f"data.max_length is {data.max_length}; it must hold at least {multiple} tokens, the padding multiple"
    if data.min_length is not None and data.min_length > data.max_length:
        yield f"data.min_length is {data.min_length}, above data.max_length {data.max_length}; no example would be left"
    new = recipe.base.start if recipe.base else None
    if isinstance(new, ModelConfig) and new.max_positions < data.max_length:
        yield f"data.max_length is {data.max_length}, above base.start.max_positions {new.max_positions}; change one"
    for key, start in checkpoints(recipe).items():
        yield from checkpoint_problems(key, start)
        if recipe.tokenizer_source is None:
            yield f"tokenizer.path is null but {key} is a checkpoint; set it to that checkpoint's tokenizer"
    if target.start is None and recipe.base is None:
        yield "target.start and base are both null; give target.start a checkpoint, or a base to train"
    if target.start is not None and recipe.base is not None:
        yield "base is given but target.start does not use it; set one of them to null"
    yield from _training_problems(recipe)
    if reference is None:
        for key in reference_keys(recipe):
            yield f"{key} needs the reference but reference is null; give one, or change {key}"
    elif reference.start is None and recipe.base is None:
        yield "reference.start and base are both null; give reference.start a checkpoint, or a base to train"
    elif reference.train is None and isinstance(reference.start, ModelConfig):
        yield "reference.train is null but reference.start is no checkpoint; give a training or a checkpoint"
    for key, residual in recipe.residuals().items():
        no_signals = residual.source in ("online", "self", "self_same")
        if residual.source == "loopholing":
            yield from _loopholing_problems(recipe, key)
        if no_signals and residual.alpha == "calibrated_entropy" and residual.alpha_scale is None:
            yield (
                f"{key}.alpha_scale is null, and source {residual.source!r} has no signals to measure it on; "
                "give a number of nats"
            )
    yield from _signal_problems(recipe)
    yield from worker_problems(recipe)
    yield from _calibrate_problems(recipe)
    yield from _evaluate_problems(recipe)
    yield from _arm_problems(recipe)
    yield from _task_problems(recipe)
    yield from _deploy_problems(recipe)


def _loopholing_problems(recipe: Recipe, key: str) -> Iterator[str]:
    """Starts that a model without distributions has not. key: its residual settings."""
    if not {"zero", "self"} & {*recipe.evaluate.starts}:
        yield f"{key}.source is 'loopholing', which starts from zero or self, but evaluate.starts has neither; add zero"
    if recipe.noise.layout != "single":
        yield f"{key}.source is 'loopholing' but noise.layout is {recipe.noise.layout}; set one to its default"
    if key == "target.residual" and recipe.deploy.start in ("reference", "dirichlet"):
        yield f"{key}.source is 'loopholing' but deploy.start is {recipe.deploy.start!r}; set it to zero or self"
    if key == "target.residual" and recipe.calibrate is not None:
        yield f"{key}.source is 'loopholing', which has no T_res, but calibrate is given; set it to null"


def _signal_problems(recipe: Recipe) -> Iterator[str]:
    """Rules for alpha that need a probability which stored signals do not have (rcd_core.signals)."""
    signals, vocab_size = recipe.signals, recipe.tokenizer.vocab_size
    for key, residual in recipe.residuals().items():
        if residual.source in ("signals", "online") and residual.top_k and residual.top_k > signals.top_k:
            yield f"{key}.top_k is {residual.top_k}, more than signals.top_k of {signals.top_k}; change one"
    all_ids = signals.keep_mass is None and recipe.tokenizer.path is None and signals.top_k >= vocab_size
    if signals.alpha_temperature == signals.delta_temperature or all_ids:
        return
    for key, residual in recipe.residuals().items():
        if residual.source == "signals" and residual.alpha in CONFIDENCE_RULES:
            yield (
                f"{key}.alpha is {residual.alpha!r}, which needs the largest probability at signals.alpha_temperature "
                f"{signals.alpha_temperature:g}, but signals are stored at signals.delta_temperature "
                f"{signals.delta_temperature:g}; make the two equal, or use source 'online' or a rule of the entropy"
            )


def _training_problems(recipe: Recipe) -> Iterator[str]:
    """Checkpoints that are used unchanged, and keys that then make no sense."""
    target = recipe.target
    if target.train is None:
        if not isinstance(target.start, str):
            yield "target.train is null but target.start is no checkpoint; give a training or a checkpoint"
        if recipe.baseline is True:
            yield "target.train is null but baseline is true, which trains like the target; give a checkpoint or false"
        for name in recipe.baselines:
            yield f"target.train is null but baselines.{name} would be trained like the target; remove it"
        for name in recipe.variants:
            yield f"target.train is null but variants.{name} is a target to train; remove it, or give a training"
    if target.rounds > 1 and (target.train is None or target.residual.source != "signals"):
        yield f"target.rounds is {target.rounds} but the target is not trained on source 'signals'; set it to 1"
    if target.rounds > 1 and target.train and 0 < target.train.steps < target.rounds:
        yield f"target.rounds is {target.rounds} but target.train.steps is {target.train.steps}; lower it"
    if recipe.data.train is None:
        for key in trainings(recipe):
            yield f"data.train is null but {key} is not; give training examples"
        if recipe.tokenizer_source is None:
            yield "data.train and tokenizer.path are both null; give a tokenizer"
    for key, stage in (("base", recipe.base), ("reference", recipe.reference)):
        if stage and stage.train and stage.train.distill:
            yield f"{key}.train.distill is true but {key} is trained before there is a reference; set it to false"
        if stage and stage.train and stage.train.lora and isinstance(stage.start, ModelConfig):
            yield f"{key}.train.lora is given but {key}.start is a new model, whose weights it would freeze; remove it"
    for key, residual in recipe.residuals().items() if target.train and target.train.distill else ():
        if residual.source == "on_policy":
            yield f"target.train.distill is true but {key}.source is 'on_policy', whose masks are others; set one"
    if recipe.base and recipe.base.convert:
        if not isinstance(recipe.base.start, str):
            yield "base.convert is given but base.start is no checkpoint; give an autoregressive one, or remove convert"
        if recipe.base.convert.attention == "canvas" and (share := recipe.base.convert.block_warmup):
            yield (
                f"base.convert.block_warmup is {share:g} but base.convert.attention is canvas, which has no blocks; "
                "set one of them to its default"
            )


def _calibrate_problems(recipe: Recipe) -> Iterator[str]:
    calibrate = recipe.calibrate
    if calibrate is None:
        return
    if recipe.target.train is None:
        yield "calibrate is given but target.train is null; use `rcd calibrate` for an existing checkpoint"
    elif SYNTHETIC not in source_list(recipe.data.train) and not recipe.data.num_validation:
        yield "calibrate needs held-out training examples but data.num_validation is 0; raise it"
    if calibrate.decode.residual_temperature is not None:
        yield "calibrate.decode.residual_temperature is given, but calibrate chooses it; set it to null"
    if calibrate.decode.residual_source != "self":
        yield "calibrate.decode.residual_source is 'reference'; calibrate needs 'self'"
    for key, residual in recipe.residuals().items():
        if calibrate.decode.start == "reference" and residual.source in ("self", "self_same"):
            yield f"calibrate.decode.start is 'reference' but {key}.source is {residual.source!r}; use another start"


def _evaluate_problems(recipe: Recipe) -> Iterator[str]:
    evaluate = recipe.evaluate
    decode, lengths = evaluate.decode, evaluate.block_lengths
    if decode.policy != "low_confidence_dynamic" and len(evaluate.thresholds) > 1:
        yield (
            f"evaluate.decode.policy is {decode.policy!r}, which ignores thresholds; give evaluate.thresholds one value"
        )
    if evaluate.samples > 1 and not decode.temperature:
        yield (
            f"evaluate.samples is {evaluate.samples} but evaluate.decode.temperature is 0, so all samples "
            "would be equal; raise the temperature, or set samples to 1"
        )
    for key, values in (("thresholds", evaluate.thresholds), ("block_lengths", lengths or ())):
        if len(set(values)) < len(values):
            yield f"evaluate.{key} is {list(values)}, which contains a value twice; give each once"
    if decode.start is not None or decode.residual:
        name = "residual" if decode.start is None else "start"
        yield (
            f"evaluate.decode.{name} is {getattr(decode, name)!r}, but the methods decide that; give evaluate.starts, "
            "or a method of its own in evaluate.arms"
        )
    if decode.confidence_threshold not in (*evaluate.thresholds, DecodeSettings().confidence_threshold):
        yield (
            f"evaluate.decode.confidence_threshold is {decode.confidence_threshold:g}, but evaluate.thresholds are "
            "swept; give it there"
        )
    if lengths and decode.block_length:
        yield "evaluate.block_lengths and evaluate.decode.block_length are both given; remove one"
    if lengths and decode.denoising_steps and decode.denoising_steps > min(lengths):
        yield (
            f"evaluate.decode.denoising_steps is {decode.denoising_steps}, more than the smallest of "
            f"evaluate.block_lengths {list(lengths)}; set it to null for one step per token"
        )


def _runs_code(key: str) -> str:
    return (
        f"{key} is 'humaneval', which runs code that a model wrote, but evaluate.run_code is false; set it to true "
        "where that is safe"
    )


def _task_problems(recipe: Recipe) -> Iterator[str]:
    """Each of evaluate.tasks, by the rules of the test examples and of the section evaluate."""
    for name, task in recipe.evaluate.tasks.items():
        key = f"evaluate.tasks.{name}"
        if (task.task or name) not in TASKS:
            known = ", ".join(sorted(TASKS))
            yield f"{key}.task is {task.task or name!r}; known tasks: {known}"
            continue
        if (task.task or name) == "humaneval" and not recipe.evaluate.run_code:
            yield _runs_code(f"{key}.task")
        for message in source_problems("test", task.test, task.num_test):
            yield message.replace("data.num_test", f"{key}.num_test").replace("data.test", f"{key}.test")
        own = [message.replace("evaluate.", f"{key}.") for message in _evaluate_problems(recipe.for_task(name))]
        shared = [message.replace("evaluate.", f"{key}.") for message in _evaluate_problems(recipe)]
        yield from (message for message in own if message not in shared)


def _arm_problems(recipe: Recipe) -> Iterator[str]:
    """evaluate.arms against the models of the recipe and their training."""
    models = ["target", *(f"target-{name}" for name in recipe.variants)]
    models += ["base"] if recipe.base else []
    models += ["baseline"] if recipe.baseline else []
    models += [f"baseline-{name}" for name in recipe.baselines]
    for name, arm in recipe.evaluate.arms.items():
        key, residual = f"evaluate.arms.{name}", recipe.residual(arm.model)
        if arm.model not in models:
            yield f"{key}.model is {arm.model!r}; the models of this recipe are {', '.join(models)}"
            continue
        if name == "seqd":
            yield f"{key} has the name of the baseline's method; choose another name"
        if arm.decode.block_length != recipe.evaluate.decode.block_length:
            yield (
                f"{key}.decode.block_length is {arm.decode.block_length}, but methods are compared at equal "
                "block lengths; use evaluate.block_lengths"
            )
        if not arm.decode.residual:
            continue
        if residual is not None and residual.source == "loopholing":
            for field, value in (("alpha", arm.decode.alpha), ("residual_top_k", arm.decode.residual_top_k)):
                if value is not None:
                    yield f"{key}.decode.{field} is {value!r}, but {arm.model} has source 'loopholing'; set it to null"
            if "reference" in (arm.decode.start, arm.decode.residual_source) or arm.decode.start == "dirichlet":
                yield f"{key}.decode.start needs distributions and {arm.model} has source 'loopholing'; set it to zero"
        trained = residual is not None and residual.feeds_back
        if arm.decode.alpha == "calibrated_entropy" and arm.decode.alpha_scale is None and not trained:
            yield f"{key}.decode.alpha_scale is null and {arm.model} has none; give a number of nats"
        if arm.decode.alpha == "learned" and not (residual and residual.learns_alpha):
            yield f"{key}.decode.alpha is 'learned', which {arm.model} was not trained with; choose another rule"


def _deploy_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.deploy.baseline and not recipe.baseline:
        yield "deploy.baseline is true but baseline is false; there is no baseline to deploy"
    first = recipe.deploy.model_id
    names = {first: "the target", f"{first}-baseline": "the baseline"} | dict.fromkeys(DEPLOYMENTS, "a deployment")
    for model_id, model in recipe.deploy.models.items():
        if model_id in names:
            yield f"deploy.models.{model_id}: {names[model_id]} has this name; choose another id"
        yield from checkpoint_problems(f"deploy.models.{model_id}.checkpoint", model.checkpoint)
    if recipe.deploy.max_replicas < recipe.deploy.min_replicas:
        low, high = recipe.deploy.min_replicas, recipe.deploy.max_replicas
        yield f"deploy.max_replicas is {high} but deploy.min_replicas is {low}; it must be at least as large"


def reference_keys(recipe: Recipe) -> dict[str, str]:
    """Recipe key that needs the reference -> the stage that uses it."""
    stages = {"signals": "signals", "online": "target"}
    keys = {f"{k}.source": stages[r.source] for k, r in recipe.residuals().items() if r.source in stages}
    keys |= {f"{key}.distill": "target" for key, train in trainings(recipe).items() if train.distill}
    if "reference" in recipe.evaluate.starts:
        keys["evaluate.starts"] = "evaluate"
    if recipe.evaluate.decode.residual_source == "reference":
        keys["evaluate.decode.residual_source"] = "evaluate"
    for name, arm in recipe.evaluate.arms.items():
        if needs_reference(arm.decode):
            keys[f"evaluate.arms.{name}.decode"] = "evaluate"
    for model_id, model in recipe.deploy.models.items():
        if needs_reference(model.decode):
            keys[f"deploy.models.{model_id}.decode"] = "deploy"
    if recipe.target.residual.feeds_back:
        if recipe.deploy.start == "reference":
            keys["deploy.start"] = "deploy"
        if recipe.deploy.decode.residual_source == "reference":
            keys["deploy.decode.residual_source"] = "deploy"
    return keys


def needs_reference(decode: DecodeSettings) -> bool:
    """Whether requests with these settings use the reference."""
    return decode.residual and "reference" in (decode.start, decode.residual_source)
