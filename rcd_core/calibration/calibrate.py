"""Calibration of T_res, and diagnostics of decoding, on held-out examples.

    report = calibrate(target, reference, examples, encoder, DecodeSettings())
    report["residual_temperature"], report["trials"]

Compared are alpha of the target's predictions that become residuals while it decodes at T_res, and alpha of the
reference's predictions, on the same partly decoded inputs (match "decoding") or under training noise ("training").
distance.py explains distance and search. Results are pure functions of models, examples and settings.

Shapes: N masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.alpha import position_rule
from rcd_core.calibration.diagnostics import Agreement, Discarded
from rcd_core.calibration.distance import (
    NUM_SHARES,
    Alphas,
    Match,
    alpha_distance,
    best_temperature,
    search_temperature,
)
from rcd_core.calibration.training_alphas import Example, training_alphas
from rcd_core.decode_settings import CONSTANT_RULES, DecodeSettings
from rcd_core.decoding.decoder import Decoder
from rcd_core.decoding.observer import Observed
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.request import resolve_settings
from rcd_core.dense_signals import DenseSignals
from rcd_core.errors import UserError
from rcd_core.evaluation.outcomes import wilson_interval
from rcd_core.families.base import DiffusionModel
from rcd_core.families.files import CALIBRATION_SCHEMA
from rcd_core.noise import NoiseSettings
from rcd_core.signals import Signals
from rcd_core.text.encoding import Encoder
from rcd_core.training.settings import SignalRule

HISTOGRAM_BINS = 25
_BATCH = 256  # requests decoded together
_TILE_BYTES = 64 << 20  # fp32 logits in memory at once
AGREEMENT_PROBLEMS = 128  # fewer than for T_res: every pass also runs the reference
MEASURE = "1-Wasserstein distance of alpha within tenths of the masking ratio, mean over what decoding at T_res 1 uses"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """All problems decoded at one T_res. distance: distance_decoding or distance_training, by `match`; None without a
    reference. accuracy: None if not graded."""

    residual_temperature: float
    distance: float | None
    distance_decoding: float | None
    distance_training: float | None
    num_problems: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    tokens_per_forward: float


def calibrate(
    target: DiffusionModel,
    reference: DiffusionModel | None,
    examples: Sequence[Example],
    encoder: Encoder,
    decode: DecodeSettings,
    *,
    noise: NoiseSettings | None = None,
    signal_rule: SignalRule | None = None,
    match: Match = "decoding",
    grade: bool = True,
    log: Log = lambda _: None,
) -> dict[str, Any]:
    """The content of calibration.json for a target. `stored_calibration` extracts the part stored with the checkpoint.

    reference None: the target was trained without a reference, so T_res is 1 and the report has no distances. noise,
    signal_rule: those of the training. decode: as used later, above all its confidence_threshold; its
    residual_temperature is ignored. Raises UserError if the models do not fit, or for too few residuals.
    """
    _check(target, reference, decode)
    settings = replace(decode, residual=True, seed=decode.seed or 0, residual_temperature=1.0, trace=False)
    settings = resolve_settings(settings, target, reference is not None)
    rule = signal_rule or SignalRule()
    decoding = _Decoding(target, reference, examples, encoder, settings, rule, grade)
    own: dict[float, Alphas] = {}  # by T_res: alpha of the target
    on_decoding: dict[float, Alphas] = {}  # by T_res: alpha of the reference on the same inputs
    trials: dict[float, Trial] = {}
    on_training = None
    nothing_to_match = "the target was trained without a reference" if reference is None else None
    if settings.alpha in CONSTANT_RULES:
        nothing_to_match = f"alpha is {settings.alpha!r}, which no temperature changes"
    if reference is not None:
        on_training = training_alphas(reference, target, examples, settings, noise or NoiseSettings(), rule)

    def distance(temperature: float) -> float:
        if 1.0 not in own and temperature != 1.0:
            distance(1.0)  # its passes weight the bins
        if temperature not in own:
            own[temperature], on_decoding[temperature], trial = decoding.run(temperature)
            if on_training is not None:
                d, t = (
                    alpha_distance(alphas, own[temperature], own[1.0].counts)
                    for alphas in (on_decoding[temperature], on_training)
                )
                used = d if match == "decoding" else t
                trial = replace(trial, distance=used, distance_decoding=d, distance_training=t)
            trials[temperature] = trial
            log(_trial_line(trial))
        return trials[temperature].distance or 0.0

    chosen = 1.0
    if nothing_to_match is None:
        chosen = best_temperature(search_temperature(distance))
    else:
        distance(1.0)
    log(f"T_res {chosen:g}" + (f": {nothing_to_match}, nothing to match" if nothing_to_match else ""))
    sides = {"before": own[1.0], "after": own[chosen]}  # the target's
    if on_training is not None:
        sides = {"reference": on_decoding[chosen], "training": on_training, **sides}
    return {
        "schema_version": CALIBRATION_SCHEMA,
        "residual_temperature": chosen,
        "distance": trials[chosen].distance,
        "distance_uncalibrated": trials[1.0].distance,
        "measure": MEASURE,
        "match": match,
        "nothing_to_match": nothing_to_match,
        "task": encoder.task.name,
        "num_problems": len(examples),
        "decode": {k: v for k, v in asdict(settings).items() if k != "residual_temperature"},
        "trials": [asdict(trials[t]) for t in sorted(trials)],
        "alphas": alpha_report(sides, own[1.0].counts),
        **diagnose(target, reference, examples, replace(settings, residual_temperature=chosen), encoder),
    }


def stored_calibration(report: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint's rcd_calibration.json, from the report of `calibrate`."""
    names = ("schema_version", "residual_temperature", "distance", "distance_uncalibrated", "measure", "match")
    decode = ("alpha", "alpha_scale", "confidence_threshold", "start", "block_length")
    return {k: report[k] for k in (*names, "nothing_to_match", "task", "num_problems")} | {
        k: report["decode"][k] for k in decode
    }


def diagnose(
    model: DiffusionModel,
    reference: DiffusionModel | None,
    examples: Sequence[Example],
    settings: DecodeSettings,
    encoder: Encoder,
) -> dict[str, Any]:
    """Of any model `discarded` (the paper's Fig. 2); with residuals `staleness` and, with a reference, `agreement`."""
    discarded = Discarded(model)
    decode_all(Decoder(model, reference, observer=discarded), examples, settings, encoder)
    report: dict[str, Any] = {"discarded": discarded.report()}
    if settings.residual:
        agreement = Agreement(model, reference)
        decoder = Decoder(model, reference, max_batch=agreement.max_batch, observer=agreement)
        decode_all(decoder, examples[:AGREEMENT_PROBLEMS], settings, encoder)
        report |= agreement.report()
    return report


def decode_all(decoder: Decoder, examples: Sequence[Example], settings: DecodeSettings, encoder: Encoder) -> list[Any]:
    """Decode the problems -> their Generations, in order."""
    run = decoder.infill if encoder.task.infill else decoder.generate
    return run([example.prompt.prompt_ids for example in examples], settings)


class _Decoding:
    """Decodes the problems at a T_res and records alpha of every prediction that becomes a residual, and alpha of the
    reference on the same input (without a reference: the target's again)."""

    def __init__(
        self,
        target: DiffusionModel,
        reference: DiffusionModel | None,
        examples: Sequence[Example],
        encoder: Encoder,
        settings: DecodeSettings,
        rule: SignalRule,
        grade: bool,
    ) -> None:
        self.target, self.examples, self.encoder, self.settings = target, examples, encoder, settings
        self.rule, self.grade = rule, grade
        self.reference = LocalReference(reference, cache_slots=_BATCH) if reference is not None else None
        self.decoder = Decoder(target, reference, max_batch=_BATCH, observer=self._record)
        self._temperature = 1.0
        self._records: list[tuple[Tensor, Tensor, NDArray[np.float64]]] = []

    def _record(self, step: Observed) -> None:
        discarded = step.discarded
        if not discarded.any():
            return
        hidden = step.hidden[torch.from_numpy(discarded).to(step.hidden.device)]
        tiles = torch.split(hidden, max(1, _TILE_BYTES // (4 * self.target.vocab_size)))
        own = torch.cat([self._alpha(DenseSignals(self.target.head(h).float(), self._temperature)) for h in tiles])
        reference = own
        if self.reference is not None:
            options = {"top_k": 1, "alpha_temperature": self.rule.alpha_temperature}
            requests = step.reference_requests(discarded, **options)
            reference = torch.cat([self._alpha(signals) for signals in self.reference.signals(requests)])
        self._records.append((own, reference, step.masked_share[discarded]))

    def _alpha(self, signals: Signals) -> Tensor:
        rule, scale = position_rule(self.settings), self.settings.alpha_scale
        return signals.alpha(self.target.vocab_size, rule, scale, learned=self.target.learned_alpha).cpu()

    def run(self, temperature: float) -> tuple[Alphas, Alphas, Trial]:
        """(alpha of the target, alpha of the reference, trial without distances)."""
        self._records.clear()
        self._temperature = temperature
        settings = replace(self.settings, residual_temperature=temperature)
        outputs = decode_all(self.decoder, self.examples, settings, self.encoder)
        own, reference, shares = (list(column) for column in zip(*self._records, strict=True))
        masked_share = np.concatenate(shares)
        tokens = sum(len(o.token_ids) + (o.finish_reason == "stop") for o in outputs)
        rate = tokens / sum(o.num_forwards.denoise for o in outputs)
        accuracy, low, high = None, None, None
        if self.grade:
            correct = sum(self._is_correct(e, o) for e, o in zip(self.examples, outputs, strict=True))
            accuracy, (low, high) = correct / len(outputs), wilson_interval(correct, len(outputs))
        trial = Trial(temperature, None, None, None, len(outputs), accuracy, low, high, rate)
        return Alphas(torch.cat(own).numpy(), masked_share), Alphas(torch.cat(reference).numpy(), masked_share), trial

    def _is_correct(self, example: Example, output: Any) -> bool:
        tokenizer, prompt = self.encoder.tokenizer, example.prompt
        if self.encoder.task.infill:
            completion = str(tokenizer.decode(output.canvas_ids))
        else:
            completion = str(tokenizer.decode(output.token_ids, skip_special_tokens=True))
        return self.encoder.task.grade(prompt.prompt, completion, prompt.answer)


def alpha_report(sides: Mapping[str, Alphas], bin_counts: NDArray[np.int64]) -> dict[str, Any]:
    """Histograms of alpha of each side, and its mean by masking ratio, with the bins weighted by bin_counts
    (NUM_SHARES,)."""
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    weights = bin_counts / max(1, bin_counts.sum())
    histograms, means, counts = {}, {}, {}
    for name, alphas in sides.items():
        shares = np.zeros(HISTOGRAM_BINS)
        used = np.where(alphas.counts > 0, weights, 0.0)
        for i in np.flatnonzero(used).tolist():
            values = alphas.of_bin(i)
            shares += used[i] / used.sum() * np.histogram(values, edges)[0] / len(values)
        histograms[name] = shares.round(6).tolist()
        counts[name] = alphas.counts.tolist()
        bin_means = [alphas.of_bin(i).mean() if n else None for i, n in enumerate(alphas.counts)]
        means[name] = [None if m is None else round(float(m), 6) for m in bin_means]
    shares_at = np.linspace(0.0, 1.0, NUM_SHARES + 1).round(6).tolist()
    return {
        "edges": edges.round(6).tolist(),
        "histograms": histograms,
        "masked_share_edges": shares_at,
        "mean_by_masked_share": means,
        "positions_by_masked_share": counts,
    }


def _check(target: DiffusionModel, reference: DiffusionModel | None, decode: DecodeSettings) -> None:
    if decode.residual_source == "reference":
        raise UserError("decode.residual_source is 'reference', which T_res does not affect; use 'self'")
    for name in ("family", "vocab_size", "mask_token_id") if reference is not None else ():
        own, other = getattr(target, name), getattr(reference, name)
        if own != other:
            raise UserError(
                f"the reference's {name} is {other!r}, the target's {own!r}; use the reference of its training"
            )


def _trial_line(trial: Trial) -> str:
    parts = [f"T_res {trial.residual_temperature:<7g}"]
    if trial.distance is not None:
        parts.append(f"distance {trial.distance:.4f}")
    if trial.accuracy is not None:
        parts.append(f"accuracy {100 * trial.accuracy:.1f} %")
    return ", ".join([*parts, f"{trial.tokens_per_forward:.2f} tokens per forward"])
