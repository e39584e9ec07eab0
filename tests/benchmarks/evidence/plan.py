"""Reads first.yaml and second.yaml strictly: experiments as fixed before they were run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.training.settings import ResidualSettings, TrainSettings
from tests.benchmarks.evidence.feedback import KINDS


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method of the second stage. residual None: masked SFT (SeqD). steps_factor: multiplies the second stage's
    steps. starts: sources of a block's first residual when decoding. rounds: with source "signals", equal parts of the
    second stage; the base makes the signals of the first part, the target those of each further one. on_policy: share
    of the rows that are masked as decoding would leave them. feedback: another way to feed predictions back, see
    feedback.py."""

    name: str
    title: str
    residual: ResidualSettings | None = None
    steps_factor: float = 1.0
    starts: tuple[str, ...] = ()
    rounds: int = 1
    on_policy: float = 0.0
    feedback: str | None = None

    @property
    def asks_reference(self) -> bool:
        return self.residual is not None and self.residual.source == "online"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task with its models. references: name -> (sizes, training). replicates: (base, second-stage seed) in running
    order; all methods of one before the next."""

    name: str
    task: str
    block_length: int
    max_length: int
    vocab_size: int
    num_train: int
    num_test: int
    draws: int
    max_new_tokens: int
    thresholds: tuple[float, ...]
    target: ModelConfig
    base_train: TrainSettings
    references: dict[str, tuple[ModelConfig, TrainSettings]]
    second_train: TrainSettings
    replicates: tuple[tuple[int, int], ...]
    arms: tuple[str, ...] = field(default=())
    later: tuple[str, ...] = field(default=())  # those that the first replicate leaves for further ones


@dataclass(frozen=True)
class Plan:
    arms: dict[str, Arm]
    experiments: dict[str, Experiment]


def load_plan(path: Path) -> Plan:
    """Raises UserError for an unknown key or method."""
    raw = yaml.safe_load(path.read_text())
    arms = {name: _arm(name, values) for name, values in raw["arms"].items()}
    experiments = {name: _experiment(name, raw["experiments"], arms) for name in raw["experiments"]}
    return Plan(arms, experiments)


def _arm(name: str, values: dict[str, Any]) -> Arm:
    values = dict(values)
    if residual := values.get("residual"):
        values["residual"] = ResidualSettings(**residual)
    values["starts"] = tuple(values.get("starts", ()))
    if (feedback := values.get("feedback")) not in (None, *KINDS):
        raise UserError(f"arms.{name}.feedback is {feedback!r}; there are {', '.join(KINDS)}")
    return Arm(name=name, **_known(Arm, name, values))


def _experiment(name: str, everything: dict[str, Any], arms: dict[str, Arm]) -> Experiment:
    values = dict(everything[name])
    while base := values.pop("like", None):
        values = {**everything[base], **values}
    values["target"] = ModelConfig(family="sdar", **values["target"])
    for key in ("base_train", "second_train"):
        values[key] = TrainSettings(**values[key])
    values["references"] = {
        which: (ModelConfig(family="sdar", **part["model"]), TrainSettings(**part["train"]))
        for which, part in values["references"].items()
    }
    values["replicates"] = tuple(tuple(pair) for pair in values["replicates"])
    for key in ("thresholds", "arms"):
        values[key] = tuple(values.get(key, arms))
    values["later"] = tuple(values.get("later", values["arms"]))
    if unknown := (set(values["arms"]) | set(values["later"])) - set(arms):
        raise UserError(f"experiments.{name}.arms names {', '.join(sorted(unknown))}; there are {', '.join(arms)}")
    return Experiment(name=name, **_known(Experiment, name, values))


def _known(kind: type, name: str, values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(kind)}
    if unknown := set(values) - known:
        raise UserError(f"{name}: unknown key {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return values
