"""Measures of what plain decoding throws away."""

from __future__ import annotations

import pytest
import torch

from rcd_core import Decoder, DecodeSettings
from rcd_core.calibration.information import ThrownAway
from tests.rcd_core.decoding.test_decoding import FAMILIES, model

PROMPTS = [[5, 6, 7], [9] * 6, [17, 3]]
PLAIN = DecodeSettings(block_length=8, max_new_tokens=16, policy="low_confidence_static", stop_token_ids=(), seed=0)
CERTAIN = 0.4  # about the median confidence of these random models


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_agree_with_a_plain_sum_over_all_passes(family: str) -> None:
    """Every pass is run again on its own input, and each measure is summed up in the words of its definition."""
    target = model(family)
    thrown_away = ThrownAway(target, CERTAIN)
    traced = DecodeSettings(**{**vars(PLAIN), "trace": True})
    outputs = Decoder(target, observer=thrown_away).generate(PROMPTS, traced)
    thrown_away.finish()
    found = thrown_away.report()

    entropies, log_p, masses, finals = [], [], [], []
    rises: dict[tuple[int, int], list[float]] = {}  # (prompt, position) -> [resolved, chosen]
    pairs, tokens = 0, 0
    for number, (prompt, out) in enumerate(zip(PROMPTS, outputs, strict=True)):
        canvas = torch.tensor(out.canvas_ids)
        unknown = [p for step in out.steps for p in step.masked]
        state = canvas.clone()
        state[sorted(set(unknown))] = target.mask_token_id
        before: dict[int, torch.Tensor] = {}
        certain = False
        for step in out.steps:
            seen = state[: step_end(step, len(prompt), family, len(canvas))]
            with torch.no_grad():
                logits = target.logits(seen[None], 8)[0].double()
            logits[:, target.mask_token_id] = -torch.inf
            logp = torch.log_softmax(logits, -1)
            for p in step.masked:
                if p in before:
                    rise = float(logp[p][canvas[p]] - before[p][canvas[p]])
                    pairs += certain
                    rises.setdefault((number, p), [0.0, 0.0])[0 if certain else 1] += rise
            certain = all(logp[p][canvas[p]].exp() >= CERTAIN for p in step.committed)
            before = {p: logp[p] for p in step.masked if p not in step.committed}
            for p, row in before.items():
                probabilities = row.exp()
                entropies.append(-(probabilities * row.clamp(min=-1e4)).sum())
                log_p.append(row[canvas[p]])
                masses.append(probabilities)
                finals.append(canvas[p])
            for p in step.committed:
                state[p] = canvas[p]
            tokens += len(step.committed)
    h, lp, final = torch.stack(entropies), torch.stack(log_p), torch.stack(finals)
    information = lp - torch.stack(masses).mean(0).log()[final]
    assert found["predictions"] == len(h) > 50
    assert found["discarded"] == pytest.approx(len(h) / tokens)
    close = {"rel": 1e-4, "abs": 1e-5}  # the engine runs in fp32
    assert found["entropy"] == pytest.approx(float(h.mean()), **close)
    assert found["surprise"] == pytest.approx(-float(lp.mean()), **close)
    assert found["information"] == pytest.approx(float(information.mean()), **close)
    assert found["information_per_token"] == pytest.approx(float(information.sum()) / tokens, **close)
    resolved, chosen = (sum(column) / tokens for column in zip(*rises.values(), strict=True))
    assert 20 < pairs < len(h) and found["resolved"] == pytest.approx(resolved, **close)
    assert found["chosen"] == pytest.approx(chosen, **close)
    both = sum(min(pair) for pair in rises.values()) / tokens
    assert found["both"] == pytest.approx(both, **close) and both < min(resolved, chosen)


def step_end(step: object, prompt: int, family: str, length: int) -> int:
    """What a pass sees: of LLaDA the whole canvas, of SDAR everything up to the end of the block."""
    first = min(step.masked)  # type: ignore[attr-defined]
    return length if family == "llada" else (first // 8 + 1) * 8


def test_nothing_is_reported_where_nothing_is_discarded() -> None:
    thrown_away = ThrownAway(model("sdar"))
    at_once = DecodeSettings(**{**vars(PLAIN), "policy": "low_confidence_dynamic", "confidence_threshold": 0.0})
    Decoder(model("sdar"), observer=thrown_away).generate(PROMPTS, at_once)
    thrown_away.finish()
    assert thrown_away.report() == {}
