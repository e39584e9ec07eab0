"""DecodeSettings as command line flags: one per field, so a new setting is a new flag, and the authors' other names.

`--a_b` is how help and messages spell a flag; `--a-b` is understood as well.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError

FIELDS = {f.name: f for f in fields(DecodeSettings)}
# What the authors' scripts call them (semantics.md 1.5, 1.6).
ALIASES = {
    "policy": ("--remasking_strategy",),
    "entropy_bound": ("--eb_threshold",),
    "max_new_tokens": ("--gen_length",),
    "stop_token_ids": ("--stopping_criteria_idx",),
}
_HELP = {
    "block_length": "tokens decoded together",
    "denoising_steps": "passes a block is planned for",
    "max_new_tokens": "new tokens at most, fewer where the model has no room for that many",
    "policy": "which tokens a pass commits",
    "confidence_threshold": "low_confidence_dynamic commits every token above it",
    "entropy_bound": "nats, for entropy_bounded; SDAR's script has 0.35",
    "temperature": "0 takes the most probable token",
    "top_k": "0 is off",
    "filtered_confidence": "confidence after top-k and top-p, as SDAR's generate.py has it",
    "stop_token_ids": "none after the flag: never stop",
    "residual": "RCD's residuals; default: on for an RCD checkpoint and with --ref_model_dir",
    "start": "first residual of a block; with --ref_model_dir: reference",
    "residual_temperature": "T_res",
    "alpha_scale": "nats, for calibrated_entropy, uniform and learned",
    "residual_top_k": "sparse residuals of so many tokens",
    "compat_passes": "exactly the passes the authors' code makes",
    "trace": "each pass in the output of --json",
}
# Remedies that read otherwise on the command line.
_REMEDIES = {"load one": "give --ref_model_dir", "use infill": "use --infill"}


class _Switch(argparse.Action):
    """`--x` is True, `--no-x` False."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


def add_flag(target: Any, *names: str, **kwargs: Any) -> None:
    """Add an argument to a parser or group under its names and, unseen in help and errors, their dashed spelling."""
    spelled = [f"--{name.lstrip('-').replace('_', '-')}" for name in names]
    action = target.add_argument(*dict.fromkeys((*names, *spelled)), **kwargs)
    action.option_strings = list(names)


def add_decode_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of DecodeSettings; those not given leave no trace in the namespace."""
    about = "The fields of DecodeSettings, which says more about each. No default named: the checkpoint's, or off."
    group = parser.add_argument_group("decoding", about)
    hints = get_type_hints(DecodeSettings)
    for name, field in FIELDS.items():
        form = _form(hints[name])
        names = [f"--{name}", *ALIASES.get(name, ())]
        if form.get("action") is _Switch:
            names.append(f"--no-{name}")
        text = [", ".join(form.get("choices", ())), _HELP.get(name, "")]
        if field.default is not None and name != "residual":
            text.append(f"default: {field.default}")
        add_flag(group, *names, dest=name, default=argparse.SUPPRESS, help="; ".join(filter(None, text)), **form)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, by field name; unchecked, which DecodeSettings does."""
    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    if given.get("top_k") == 0:  # the scripts' way of saying that all are kept
        given["top_k"] = None
    if "stop_token_ids" in given:
        given["stop_token_ids"] = tuple(given["stop_token_ids"])
    return given


@contextmanager
def errors_as_flags(remedies: Mapping[str, str] = _REMEDIES) -> Iterator[None]:
    """UserErrors about settings, which are named as in Python, leave as UserErrors that name the flags. remedies: what
    else to replace."""
    try:
        yield
    except UserError as error:
        raise UserError(_as_flags(str(error), remedies)) from error


def _as_flags(message: str, remedies: Mapping[str, str]) -> str:
    """`start is 'x'; set cache='none'` -> `--start is 'x'; set --cache none`; names of several words anywhere."""
    names = "|".join(sorted(FIELDS, key=len, reverse=True))
    message = re.sub(rf"(?<![\w'-])({names})='?([\w.]+)'?", r"--\1 \2", message)
    message = re.sub(rf"^({names})\b", r"--\1", message)
    for remedy, flag in remedies.items():
        message = message.replace(remedy, flag)
    several = "|".join(name for name in FIELDS if "_" in name)
    return re.sub(rf"(?<![\w'-])({several})(?![\w'-])", r"--\1", message)


def _form(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    kinds = get_args(hint)
    kind = next(k for k in kinds if k is not NoneType) if NoneType in kinds else hint
    if kind is bool:
        return {"action": _Switch, "nargs": 0}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "metavar": "NAME"}
    if get_origin(kind) is tuple:
        return {"nargs": "*", "type": int, "metavar": "ID"}
    return {"type": kind, "metavar": "N" if kind is int else "X"}
