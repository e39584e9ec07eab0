"""Decoding with several live blocks against golden traces: of D2F's own code for LLaDA and for its scheduler alone, and
of an independent implementation for SDAR and for residuals, in float64.

Models are in fp64 (test_golden_decoding.py says why). The authors' code makes only whole blocks, so each case asks for
as many tokens as it made.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rcd_core import Decoder, DecodeSettings, UserError
from rcd_core.decoding.live_blocks import LiveBlocksSequence
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.sampler import choose_commits
from rcd_core.decoding.sequence import MaskedPositions
from tests.rcd_core.decoding.test_golden_decoding import AUTHORS, PRINTED, check_steps
from tests.rcd_core.golden_models import GOLDEN, load_fp64


def cases(path: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / path).read_text())["cases"]  # type: ignore[no-any-return]


SCHEDULER, SDAR = cases("d2f/d2f_scheduler.json"), cases("d2f/d2f_sdar_ours.json")
LLADA = [c for c in cases("d2f/d2f_llada.json") if c["passes"]]
EMPTY = [c for c in cases("d2f/d2f_llada.json") if not c["passes"]]
RCD = cases("d2f/d2f_rcd_llada.json") + cases("d2f/d2f_rcd_sdar.json")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: load_fp64(f"{family}_tiny") for family in ("llada", "sdar")}


def settings(case: dict[str, Any], family: str, **changes: Any) -> DecodeSettings:
    b = case["block"]
    return DecodeSettings(
        block_length=b,
        max_new_tokens=case["max_new"] // b * b if family == "llada" else case["max_new"],
        confidence_threshold=case["tau_conf"],
        max_live_blocks=16,
        block_add_threshold=case["tau_add"],
        decoded_token_threshold=case["tau_act"],
        stop_token_ids=(case["eos_id"],),
        compat_passes=True,
        trace=True,
        **changes,
    )


@pytest.mark.parametrize("case", SCHEDULER, ids=lambda c: str(c["id"]))
def test_scheduler(models: dict[str, Any], case: dict[str, Any]) -> None:
    """Confidences and tokens are given; blocks, their states, passes, what is stored and what is committed follow."""
    s = make_sequence(
        models["llada"], [1] * case["prompt_len"], settings(case, "llada"), infill=False, has_reference=False
    )
    assert isinstance(s, LiveBlocksSequence)
    for want in case["passes"]:
        kind, chunks = s.next_pass(2048)
        assert kind == "denoise"
        assert [chunks[0].start, chunks[-1].end - chunks[0].start] == want["slice"]
        assert s.stored == want["cache"]
        live = [[b.index + 1, "A", int(b.activated), len(b.masked_positions)] for b in s.live]
        assert live == [b for b in want["blocks"] if b[1] == "A"]
        s.pass_done(kind, chunks[-1].end)
        assert s.stored == want["cache"] + want["store_len"]
        masked = MaskedPositions.of(list(s.live))
        assert masked.positions.tolist() == want["masked"]
        commit = choose_commits(masked, np.array(want["conf"]), np.zeros(len(want["conf"])))
        assert masked.positions[commit].tolist() == sorted(want["committed"])
        tokens = np.array(want["argmax"])
        for block, part in zip(masked.blocks, masked.slices(), strict=True):
            positions, chosen = masked.positions[part], commit[part]
            s.apply_commits(block, positions[chosen], tokens[part][chosen], positions[~chosen], None)
    assert s.finished
    assert s.output().canvas_ids[case["prompt_len"] :] == case["final_ids"]


def check(model: Any, case: dict[str, Any], s: DecodeSettings, tolerance: float) -> Any:
    out = Decoder(model).generate([case["prompt"]], s)[0]
    assert out.canvas_ids[len(case["prompt"]) :] == case["final_ids"]
    assert out.num_forwards.total == out.num_forwards.denoise == case["nfe"]
    check_steps(out.steps, case["passes"], tolerance)
    return out


@pytest.mark.parametrize("case", LLADA, ids=lambda c: f"{c['id']}-{c['tag']}")
def test_llada(models: dict[str, Any], case: dict[str, Any]) -> None:
    check(models["llada"], case, settings(case, "llada"), AUTHORS)


@pytest.mark.parametrize("case", SDAR, ids=lambda c: f"{c['id']}-{c['tag']}")
def test_sdar(models: dict[str, Any], case: dict[str, Any]) -> None:
    check(models["sdar"], case, settings(case, "sdar"), PRINTED)


@pytest.mark.parametrize("case", RCD, ids=lambda c: f"{c['family']}{c['id']}")
def test_rcd(models: dict[str, Any], case: dict[str, Any]) -> None:
    s = settings(
        case,
        case["family"],
        residual=True,
        start="zero",
        residual_temperature=case["T_res"],
        delta_temperature="residual" if case["delta_from"] == "T_res" else "one",
    )
    out = check(models[case["family"]], case, s, PRINTED)
    for step, want in zip(out.steps, case["passes"], strict=True):
        torch.testing.assert_close(
            torch.tensor(step.alpha, dtype=torch.float64),
            torch.tensor(want["alpha_in"], dtype=torch.float64),
            atol=PRINTED,
            rtol=0,
        )


def test_an_empty_answer_of_the_authors_code(models: dict[str, Any]) -> None:
    """Its code adds no block above a threshold of 1, which is refused, and none that is not whole, which is cut."""
    below, above = EMPTY
    with pytest.raises(UserError, match="block_add_threshold is 1.5"):
        settings(above, "llada")
    s = replace(settings({**below, "max_new": below["block"]}, "llada"), max_new_tokens=below["max_new"])
    assert len(Decoder(models["llada"]).generate([below["prompt"]], s)[0].token_ids) == below["max_new"]
