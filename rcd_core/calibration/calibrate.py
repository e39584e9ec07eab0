"""Calibration of T_res: a target's self-loop beside the reference signals it was trained on, on the same examples.

    found = calibrate(target, reference, examples, encoder, DecodeSettings())
    found["residual_temperature"], found["trials"]

Target side: alpha of the predictions that become residuals while it decodes the problems, T_res in the loop. Reference
side: alpha of the reference's predictions on the same partly decoded inputs (match "decoding") or on the examples under
the noise of training (match "training"). The distance, the search and why are calibrate.py's. Everything is a pure
function of models, examples and settings.

Shapes: N masked positions, L tokens, V vocabulary.
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
    nearest,
    search_temperature,
)
from rcd_core.calibration.training_alphas import Example, training_alphas
from rcd_core.decode_settings import CONSTANT_RULES, DecodeSettings
from rcd_core.decoding.decoder import Decoder
from rcd_core.decoding.observer import Observed
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.request import resolve_settings
from rcd_core.errors import UserError
from rcd_core.evaluation.outcomes import wilson_interval
from rcd_core.families.base import DiffusionModel
from rcd_core.families.files import CALIBRATION_SCHEMA
from rcd_core.noise import NoiseSettings
from rcd_core.signals import DenseSignals, Signals
from rcd_core.text.encoding import Encoder
from rcd_core.training.settings import SignalRule

HISTOGRAM_BINS = 25
_BATCH = 256  # requests decoded together
_TILE_BYTES = 64 << 20  # fp32 logits held at once
AGREEMENT_PROBLEMS = 128  # each pass over them asks the reference too
MEASURE = "1-Wasserstein distance of alpha within tenths of the masking ratio, mean over what decoding at T_res 1 uses"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """All problems decoded at one T_res. distance: of the match in use, one of the two; None: nothing to compare with.
    accuracy None: not to be graded."""

    residual_temperature: float
    distance: float | None
    distance_decoding: float | None
    distance_training: float | None
    num_problems: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    tokens_per_forward: float

    def at(self, distance: float, decoding: float, training: float) -> Trial:
        return replace(self, distance=distance, distance_decoding=decoding, distance_training=training)


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
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """What calibration.json holds of a target; `stored(...)` is the part that goes with the checkpoint.

    reference None: the target was trained on no reference's signals, so there is nothing to match and T_res is 1; of
    the report remains what the target alone can tell. noise, signal_rule: those of the training. decode: as in use, its
    confidence_threshold above all; residual_temperature is what is searched for.
    """
    _check(target, reference, decode)
    settings = replace(decode, residual=True, seed=decode.seed or 0, residual_temperature=1.0, trace=False)
    settings = resolve_settings(settings, target, reference is not None)
    rule = signal_rule or SignalRule()
    loop = _Loop(target, reference, examples, encoder, settings, rule, grade)
    own: dict[float, Alphas] = {}
    real: dict[float, Alphas] = {}
    trials: dict[float, Trial] = {}
    trained = None
    why_not = "the target was trained without a reference" if reference is None else None
    if settings.alpha in CONSTANT_RULES:
        why_not = f"alpha is {settings.alpha!r}, which no temperature changes"
    if reference is not None:
        trained = training_alphas(reference, target, examples, settings, noise or NoiseSettings(), rule)

    def distance(temperature: float) -> float:
        if 1.0 not in own and temperature != 1.0:
            distance(1.0)  # its passes weigh the bins
        if temperature not in own:
            own[temperature], real[temperature], trial = loop.run(temperature)
            if trained is not None:
                sides = {"decoding": real[temperature], "training": trained}
                found = {m: alpha_distance(side, own[temperature], own[1.0].counts) for m, side in sides.items()}
                trial = trial.at(found[match], found["decoding"], found["training"])
            trials[temperature] = trial
            say(_said(trials[temperature]))
        return trials[temperature].distance or 0.0

    chosen = 1.0
    if why_not is None:
        chosen = nearest(search_temperature(distance))
    else:
        distance(1.0)
    say(f"T_res {chosen:g}" + (f": {why_not}, nothing to match" if why_not else ""))
    return {
        "schema_version": CALIBRATION_SCHEMA,
        "residual_temperature": chosen,
        "distance": trials[chosen].distance,
        "distance_uncalibrated": trials[1.0].distance,
        "measure": MEASURE,
        "match": match,
        "nothing_to_match": why_not,
        "task": encoder.task.name,
        "num_problems": len(examples),
        "decode": {k: v for k, v in asdict(settings).items() if k != "residual_temperature"},
        "trials": [asdict(trials[t]) for t in sorted(trials)],
        "alphas": alpha_report(_sides(trained, real, own, chosen), own[1.0].counts),
        **diagnose(target, reference, examples, replace(settings, residual_temperature=chosen), encoder),
    }


def stored(found: dict[str, Any]) -> dict[str, Any]:
    """The content of rcd_calibration.json."""
    names = ("schema_version", "residual_temperature", "distance", "distance_uncalibrated", "measure", "match")
    decode = {k: found["decode"][k] for k in ("alpha", "alpha_scale", "confidence_threshold", "start", "block_length")}
    more = {k: found[k] for k in ("nothing_to_match", "task", "num_problems")}
    return {**{k: found[k] for k in names}, **more, **decode}


def diagnose(
    model: DiffusionModel,
    reference: DiffusionModel | None,
    examples: Sequence[Example],
    settings: DecodeSettings,
    encoder: Encoder,
) -> dict[str, Any]:
    """Of any model: `discarded`, the paper's Fig. 2; with residuals `staleness` and, with a reference, `agreement`."""
    discarded = Discarded(model)
    decode_all(Decoder(model, reference, observer=discarded), examples, settings, encoder)
    found: dict[str, Any] = {"discarded": discarded.report()}
    if settings.residual:
        agreement = Agreement(model, reference)
        decoder = Decoder(model, reference, max_batch=agreement.max_batch, observer=agreement)
        decode_all(decoder, examples[:AGREEMENT_PROBLEMS], settings, encoder)
        found |= agreement.report()
    return found


def decode_all(decoder: Decoder, examples: Sequence[Example], settings: DecodeSettings, encoder: Encoder) -> list[Any]:
    """The Generations of the problems, in order."""
    run = decoder.infill if encoder.task.infill else decoder.generate
    return run([example.given.prompt_ids for example in examples], settings)


class _Loop:
    """Decodes the problems at a T_res and keeps alpha of every prediction that becomes a residual; beside it, where
    there is a reference, the reference's alpha on the same input."""

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
        self.decoder = Decoder(target, reference, max_batch=_BATCH, observer=self._note)
        self._temperature = 1.0
        self._seen: list[tuple[Tensor, Tensor, NDArray[np.float64]]] = []

    def _note(self, seen: Observed) -> None:
        left = ~seen.committed
        if not left.any():
            return
        hidden = seen.hidden[torch.from_numpy(left).to(seen.hidden.device)]
        tiles = torch.split(hidden, max(1, _TILE_BYTES // (4 * self.target.vocab_size)))
        own = torch.cat([self._alpha(DenseSignals(self.target.head(h).float(), self._temperature)) for h in tiles])
        real = own
        if self.reference is not None:
            asked = seen.reference_requests(left, top_k=1, alpha_temperature=self.rule.alpha_temperature)
            real = torch.cat([self._alpha(signals) for signals in self.reference.signals(asked)])
        self._seen.append((own, real, seen.masked_share[left]))

    def _alpha(self, signals: Signals) -> Tensor:
        rule, scale = position_rule(self.settings), self.settings.alpha_scale
        return signals.alpha(self.target.vocab_size, rule, scale, learned=self.target.learned_alpha).cpu()

    def run(self, temperature: float) -> tuple[Alphas, Alphas, Trial]:
        """(the target's, the reference's, what came out)."""
        self._seen.clear()
        self._temperature = temperature
        settings = replace(self.settings, residual_temperature=temperature)
        outputs = decode_all(self.decoder, self.examples, settings, self.encoder)
        own, real = (torch.cat([s[i] for s in self._seen]).numpy() for i in (0, 1))  # type: ignore[misc]
        shares = np.concatenate([s[2] for s in self._seen])
        tokens = sum(len(o.token_ids) + (o.finish_reason == "stop") for o in outputs)
        rate = tokens / sum(o.num_forwards.denoise for o in outputs)
        accuracy, low, high = None, None, None
        if self.grade:
            correct = sum(self._right(e, o) for e, o in zip(self.examples, outputs, strict=True))
            accuracy, (low, high) = correct / len(outputs), wilson_interval(correct, len(outputs))
        trial = Trial(temperature, None, None, None, len(outputs), accuracy, low, high, rate)
        return Alphas(own, shares), Alphas(real, shares), trial

    def _right(self, example: Example, output: Any) -> bool:
        tokenizer, given = self.encoder.tokenizer, example.given
        if self.encoder.task.infill:
            completion = str(tokenizer.decode(output.canvas_ids))
        else:
            completion = str(tokenizer.decode(output.token_ids, skip_special_tokens=True))
        return self.encoder.task.grade(given.prompt, completion, given.answer)


# -- words and checks


def _sides(
    trained: Alphas | None, real: Mapping[float, Alphas], own: Mapping[float, Alphas], chosen: float
) -> dict[str, Alphas]:
    """before, after: the target's own at T_res = 1 and at the chosen one. reference: on the inputs that decoding at the
    chosen one reaches. training: the reference's under training's noise."""
    sides = {"before": own[1.0], "after": own[chosen]}
    return {"reference": real[chosen], "training": trained, **sides} if trained is not None else sides


def alpha_report(sides: Mapping[str, Alphas], counts_wanted: NDArray[np.int64]) -> dict[str, Any]:
    """Histograms of alpha, and its mean by masking ratio, of each side; all weighted to the masking ratios of
    counts_wanted (NUM_SHARES,)."""
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    weights = counts_wanted / max(1, counts_wanted.sum())
    histograms, means, counts = {}, {}, {}
    for name, alphas in sides.items():
        shares = np.zeros(HISTOGRAM_BINS)
        used = np.where(alphas.counts > 0, weights, 0.0)
        for i in np.flatnonzero(used).tolist():
            inside = alphas.inside(i)
            shares += used[i] / used.sum() * np.histogram(inside, edges)[0] / len(inside)
        histograms[name] = shares.round(6).tolist()
        counts[name] = alphas.counts.tolist()
        inside_means = [alphas.inside(i).mean() if n else None for i, n in enumerate(alphas.counts)]
        means[name] = [None if m is None else round(float(m), 6) for m in inside_means]
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
        raise UserError("decode.residual_source is 'reference', which has no self-loop to calibrate; use 'self'")
    for name in ("family", "vocab_size", "mask_token_id") if reference is not None else ():
        own, other = getattr(target, name), getattr(reference, name)
        if own != other:
            raise UserError(f"the reference's {name} is {other!r}, the target's {own!r}; give the one of its training")


def _said(trial: Trial) -> str:
    parts = [f"T_res {trial.residual_temperature:<7g}"]
    if trial.distance is not None:
        parts.append(f"distance {trial.distance:.4f}")
    if trial.accuracy is not None:
        parts.append(f"accuracy {100 * trial.accuracy:.1f} %")
    return ", ".join([*parts, f"{trial.tokens_per_forward:.2f} tokens per forward"])
