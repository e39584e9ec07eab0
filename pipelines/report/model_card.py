"""The model card of an exported checkpoint: README.md as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pipelines.report import text
from pipelines.report.markdown import table
from pipelines.report.summary import evaluations
from pipelines.report.text import Results
from pipelines.report.verdict import verdict
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.hub import cached_snapshot, is_hub_id, split_hub_id

PAPER = "https://arxiv.org/abs/2601.22954"
_METHODS = {
    "signals": "residuals are a frozen reference model's predictions, stored before the training",
    "online": "residuals are a frozen reference model's predictions, made during the training",
    "self": "residuals are the model's own predictions on noisier versions of each row",
    "loopholing": "each pass also gets the hidden states of the pass before ([Loopholing](https://arxiv.org/abs/2510.19304))",
    "none": "without residuals",
}
_TRAINING = ("steps", "epochs", "batch_size", "learning_rate", "schedule", "optimizer", "loss_weight", "dtype", "seed")


def model_card(
    name: str, stage: str, recipe: Mapping[str, Any], rcd: Mapping[str, Any], results: Results | None
) -> str:
    """recipe: the run's, as nested mappings. rcd: the settings stored in the checkpoint. results: of the evaluation, if
    the run has one of this model."""
    return "\n\n".join(_parts(name, stage, recipe, rcd, results)) + "\n"


def _parts(
    name: str, stage: str, recipe: Mapping[str, Any], rcd: Mapping[str, Any], results: Results | None
) -> Iterator[str]:
    base = _base(recipe, stage)
    licence = licence_of(base) if base else None
    facts: dict[str, Any] = {"library_name": "rcd-ray", "pipeline_tag": "text-generation"}
    facts["tags"] = ["diffusion-language-model", *(["residual-context-diffusion"] if rcd.get("source") else [])]
    if licence:
        facts["license"] = licence
    if base and is_hub_id(base):
        facts["base_model"] = split_hub_id(base)[0]
    yield f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---\n\n# {name}"
    source = rcd.get("source", "none")
    kind = (
        f"trained with [Residual Context Diffusion]({PAPER}): " if rcd.get("source") not in (None, "loopholing") else ""
    )
    yield f"A masked-diffusion language model, {kind}{_METHODS.get(source, source)}."
    yield "## Licence\n\n" + _licence_text(base, licence)
    yield "## Decoding\n\n" + _decoding(rcd)
    yield "## Data\n\n" + _data(recipe)
    yield "## Training\n\n" + table((["setting", "value"], list(_settings(recipe, stage))))
    if results is not None:
        yield "## What was measured"
        for one in evaluations(results):
            yield f"{verdict(one)}\n\n{text.measured(one)} {text.grader(one)}"
            yield "Accuracy in % @ tokens per pass, by confidence threshold:\n\n" + table(text.curve_table(one))
            yield text.costs(one) + " " + text.scope(one)
    else:
        yield "## What was measured\n\nNothing: the run has no evaluation of this model."


def licence_of(checkpoint: str) -> str | None:
    """The licence that a checkpoint's own model card names; None if it has none, or is not at hand. Asks no hub."""
    directory = checkpoint
    if "://" not in checkpoint and is_hub_id(checkpoint) and not storage.is_directory(checkpoint):
        found = cached_snapshot(*split_hub_id(checkpoint))
        if found is None:
            return None
        directory = str(found)
    try:
        card = storage.read_bytes(storage.join(directory, "README.md")).decode(errors="replace")
    except (OSError, UserError):
        return None
    parts = card.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        facts = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return licence if isinstance(licence, str) else None


def _base(recipe: Mapping[str, Any], stage: str) -> str | None:
    """The checkpoint from outside that the stage's model comes from; None for one with new weights."""
    own = recipe.get(stage.split("-")[0]) or {}
    start = own.get("start") if isinstance(own, dict) else None
    if start is None:
        start = (recipe.get("target") or {}).get("start")
    if start is None:
        start = (recipe.get("base") or {}).get("start")
    return start if isinstance(start, str) else None


def _licence_text(base: str | None, licence: str | None) -> str:
    shown = base if base is None or is_hub_id(base) else storage.basename(base.rstrip("/"))
    if base is None:
        return (
            "The weights were trained from scratch: their owner chooses the licence. That of the data applies as well."
        )
    if licence is None:
        return (
            f"The base is `{shown}`. Its licence was not found in its files: look it up before you publish this model. "
            "That of the data applies as well."
        )
    return f"The base is `{shown}`, whose licence is {licence}. That of the data applies as well."


def _decoding(rcd: Mapping[str, Any]) -> str:
    if not rcd.get("source"):
        return "`rcd generate --model_dir DIR --prompt TEXT` decodes it block by block."
    names = {"block_length": "block length", "start": "start", "residual_temperature": "T_res", "alpha": "alpha"}
    listed = ", ".join(f"{label} {rcd[name]}" for name, label in names.items() if rcd.get(name) is not None)
    return (
        f"`config.json` holds the settings that it was trained for ({listed}). "
        "`rcd generate --model_dir DIR --residual --prompt TEXT` uses them; `--no-residual` decodes it plainly."
    )


def _data(recipe: Mapping[str, Any]) -> str:
    data = recipe.get("data") or {}
    train = data.get("train")
    sources = [train] if isinstance(train, str) else list(train or [])
    return f"Task `{data.get('task')}`; training examples from {', '.join(f'`{s}`' for s in sources) or 'nowhere'}."


def _settings(recipe: Mapping[str, Any], stage: str) -> Iterator[list[str]]:
    """Rows of the training's settings. A variant or baseline differs from the target in what the recipe says of it."""
    kind, _, name = stage.partition("-")
    target = recipe.get("target") or {}
    own = recipe.get(kind) or {} if kind in ("base", "reference") else target
    train = dict(own.get("train") or {})
    residual = dict(target.get("residual") or {}) if kind in ("target", "round") else {}
    changed = {"target": "variants", "baseline": "baselines"}.get(kind)
    if name and changed:
        (residual if kind == "target" else train).update((recipe.get(changed) or {}).get(name) or {})
    yield ["recipe", str(recipe.get("name"))]
    for key in _TRAINING:
        if train.get(key) is not None:
            yield [key, str(train[key])]
    for key, value in residual.items():
        if value is not None:
            yield [f"residual {key}", str(value)]
