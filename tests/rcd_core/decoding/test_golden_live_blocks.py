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
from safetensors.torch import load_file

from rcd_core import Decoder, DecodeSettings, UserError
from rcd_core.decoding.live_blocks import LiveBlocksSequence
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.sampler import choose_commits
from tests.rcd_core.decoding.test_golden_decoding import AUTHORS, PRINTED, check_steps
from tests.rcd_core.golden_models import GOLDEN, load_fp64

STRATEGIES: dict[str, Any] = {"default": "confidence", "neg_entropy": "entropy", "margin_confidence": "margin"}
TENSORS = GOLDEN.parents[2] / "shared" / "golden"


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "d2f" / f"{name}.json").read_text())["cases"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: load_fp64(f"{family}_tiny") for family in ("llada", "sdar")}


def settings(case: dict[str, Any], family: str) -> DecodeSettings:
    b = case["block"]
    s = DecodeSettings(
        block_length=b,
        max_new_tokens=case["max_new"] // b * b if family == "llada" else case["max_new"],
        confidence_threshold=case["tau_conf"],
        max_live_blocks=16,
        block_add_threshold=case["tau_add"],
        decoded_token_threshold=case["tau_act"],
        rank_by=STRATEGIES[case.get("strategy", "default")],
        stop_token_ids=(case["eos_id"],),
        compat_passes=True,
        trace=True,
    )
    if "T_res" not in case:
        return s
    delta: Any = "residual" if case["delta_from"] == "T_res" else "one"
    return replace(s, residual=True, start="zero", residual_temperature=case["T_res"], delta_temperature=delta)


@pytest.mark.parametrize("case", cases("d2f_scheduler"), ids=lambda c: str(c["id"]))
def test_scheduler(models: dict[str, Any], case: dict[str, Any]) -> None:
    """Confidences and tokens are given; blocks, their states, passes, what is stored and what is committed follow."""
    prompt = [1] * case["prompt_len"]
    s = make_sequence(models["llada"], prompt, settings(case, "llada"), infill=False, has_reference=False)
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
        masked, unused = MaskedPositions.of(list(s.live)), np.zeros(len(want["masked"]))
        assert masked.positions.tolist() == want["masked"]
        commit = choose_commits(masked, np.array(want["conf"]), unused, unused)
        assert masked.positions[commit].tolist() == sorted(want["committed"])
        tokens = np.array(want["argmax"])
        for block, part in zip(masked.blocks, masked.slices(), strict=True):
            positions, chosen = masked.positions[part], commit[part]
            s.apply_commits(block, positions[chosen], tokens[part][chosen], positions[~chosen], None)
    assert s.finished
    assert s.output().canvas_ids[case["prompt_len"] :] == case["final_ids"]


TRACES = [
    ("d2f_llada", "llada", AUTHORS),
    ("d2f_sdar_ours", "sdar", PRINTED),
    ("d2f_rcd_llada", "llada", PRINTED),
    ("d2f_rcd_sdar", "sdar", PRINTED),
]


@pytest.mark.parametrize(("name", "family", "tolerance"), TRACES)
def test_traces(models: dict[str, Any], name: str, family: str, tolerance: float) -> None:
    """All cases of a file share their passes. It is compared what each pass sees masked, predicts, commits and feeds
    back."""
    several = [case for case in cases(name) if case["passes"]]
    decoder = Decoder(models[family], max_batch=24)
    outs = decoder.generate([c["prompt"] for c in several], [settings(c, family) for c in several])
    for case, out in zip(several, outs, strict=True):
        assert out.canvas_ids[len(case["prompt"]) :] == case["final_ids"], case["id"]
        assert out.num_forwards.total == out.num_forwards.denoise == case["nfe"], case["id"]
        check_steps(out.steps, case["passes"], tolerance)
        for step, want in zip(out.steps, case["passes"], strict=True):
            np.testing.assert_allclose(step.alpha, want.get("alpha_in", [0] * len(step.alpha)), atol=PRINTED, rtol=0)


@pytest.mark.parametrize(("name", "family"), [trace[:2] for trace in TRACES])
def test_logits(models: dict[str, Any], name: str, family: str) -> None:
    """Of the masked positions, in the passes for which they are stored."""
    residual = "rcd" in name
    path = TENSORS / ("d2f_rcd/d2f_rcd_tensors.safetensors" if residual else "d2f_decode/d2f_tensors.safetensors")
    if not path.exists():
        pytest.skip(f"no {path.relative_to(GOLDEN.parents[2])} beside the repository")
    tensors, found = load_file(path), []
    decoder = Decoder(models[family], observer=lambda step: found.append(models[family].head(step.hidden)))
    for case in cases(name):
        prefix = f"{family}_case{case['id']}_pass"
        keys = [key for key in tensors if key.startswith(prefix) and "logits" in key]
        if keys:
            found.clear()
            decoder.generate([case["prompt"]], settings(case, family))
        for key in keys:
            n = int(key.removeprefix(prefix).split("_")[0])
            rows = torch.tensor(case["passes"][n]["masked"]) - case["passes"][n]["slice"][0]
            expected = tensors[key] if residual else tensors[key][rows]
            torch.testing.assert_close(found[n], expected.double(), atol=1e-4, rtol=0)


def test_an_empty_answer_of_the_authors_code(models: dict[str, Any]) -> None:
    """Its code adds no block above a threshold of 1, which is refused, and none that is not whole, which is cut."""
    below, above = (case for case in cases("d2f_llada") if not case["passes"])
    with pytest.raises(UserError, match="block_add_threshold is 1.5"):
        settings(above, "llada")
    s = replace(settings(below, "sdar"), max_new_tokens=below["max_new"])
    assert len(Decoder(models["llada"]).generate([below["prompt"]], s)[0].token_ids) == below["max_new"]
