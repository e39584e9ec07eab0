"""Dream against the authors' code, and Fast-dLLM's on it (vectors in tests/golden): shifted logits, algorithms, caches.

Models are in fp64. Left out, as faults of the authors' code or of another purpose: masks inside a prompt, rows with
unequal numbers of masks, `fastdllm_none`, which counts slots beyond the masks, and one step a block, which leaves
masks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rcd_core import Decoder, DecodeSettings, TrainingBatch, UserError, load_model
from rcd_core.decoding import sampler
from rcd_core.families.base import DiffusionModel
from rcd_core.training.objective import masked_hidden
from tests.rcd_core.families.overfit import overfit
from tests.rcd_core.golden_models import GOLDEN, load_fp64

AUTHORS = 5e-5  # their code ran in fp32
PRINTED = 6e-6 + AUTHORS  # five decimals
CASES = json.loads((GOLDEN / "dream" / "dream_vectors.json").read_text())["generate"]
PLAIN = [c for c in CASES if c["code"] == "dream" and c["id"] not in (16, 17, 18, 19)]
CACHED = [c for c in CASES if c["code"] == "fastdllm_block" and "note" not in c]
RANKS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


@cache
def model() -> DiffusionModel:
    return load_fp64("dream/dream_tiny")


@cache
def vectors() -> dict[str, torch.Tensor]:
    stored = load_file(GOLDEN / "dream" / "dream_vectors.safetensors")
    return {k: v.double() if v.is_floating_point() else v for k, v in stored.items()}


def test_forward() -> None:
    v = vectors()
    torch.testing.assert_close(model().logits(v["fwd_ids"]), v["fwd_logits_shifted"], atol=AUTHORS, rtol=0)
    # Training reads single rows, of one sample and of packed ones.
    ids = v["fwd_ids"]
    masked = torch.zeros(ids.shape, dtype=torch.bool)
    masked[:, ::3] = True
    batch = TrainingBatch(ids, ids, ids, masked, torch.ones(ids.shape), 4)
    with torch.no_grad():
        rows = model().head(masked_hidden(model(), batch, None))
        torch.testing.assert_close(rows, v["fwd_logits_shifted"][masked], atol=AUTHORS, rtol=0)
        half = ids.shape[1] // 2
        samples = (torch.arange(ids.shape[1]) >= half).long().expand_as(ids)
        positions = torch.arange(ids.shape[1]).expand_as(ids) - samples * half
        packed = TrainingBatch(ids, ids, ids, masked, torch.ones(ids.shape), 4, samples, positions)
        rows = model().head(masked_hidden(model(), packed, None))
        alone = torch.cat([model().logits(part) for part in (ids[:, :half], ids[:, half:])], 1)
    torch.testing.assert_close(rows, alone[masked], atol=1e-9, rtol=0)


def settings(case: dict[str, Any], **changes: Any) -> DecodeSettings:
    dynamic = case["alg"] == "confidence_threshold"
    return DecodeSettings(
        max_new_tokens=case["max_new_tokens"],
        policy="low_confidence_dynamic" if dynamic else "low_confidence_static",
        confidence_threshold=case.get("threshold") or 0.9,
        rank_by=RANKS.get(case["alg"], "confidence"),
        top_k=case["top_k"],
        top_p=case["top_p"],
        filtered_confidence=case["top_k"] is not None or case["top_p"] is not None,
        stop_token_ids=(),
        trace=True,
        **{"block_length": case["max_new_tokens"], "denoising_steps": case["steps_arg"], **changes},
    )


def check(case: dict[str, Any], row: int, out: Any, pads: int) -> None:
    """out: of the prompt without its padding. The authors go on when nothing is masked any more."""
    assert out.canvas_ids == case["final_ids"][row][pads:]
    expected = [(s["rows"][row], s) for s in case["steps"]]
    expected = [(r, s) for r, s in expected if r["masked"]]
    assert len(out.steps) == len(expected)
    for found, (want, step) in zip(out.steps, expected, strict=True):
        assert found.masked == [i - pads for i in want["masked"]]
        assert found.argmax == want["argmax"]
        assert sorted(found.committed) == sorted(i - pads for i in want["committed"])
        first_of_block = case["code"] == "fastdllm_block" and step["kind"] == "full"
        measure = {"entropy": [-e for e in found.entropy], "topk_margin": None}.get(case["alg"], found.confidence)
        if measure is not None and not first_of_block:
            want_conf = torch.tensor(want["conf"], dtype=torch.float64)
            got = torch.tensor(measure, dtype=torch.float64)
            torch.testing.assert_close(got, want_conf, atol=PRINTED, rtol=0)


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: f"{c['id']}-{c['alg']}")
def test_whole_canvas(case: dict[str, Any]) -> None:
    """A batch of rows, each without its padding and with its own number of masks."""
    pads = case.get("left_pads", [0])
    prompts = [prompt[n:] for prompt, n in zip(case["prompts"], pads, strict=True)]
    outs = Decoder(model()).generate(prompts, settings(case))
    for row, (out, n) in enumerate(zip(outs, pads, strict=True)):
        check(case, row, out, n)


@pytest.mark.parametrize("case", [c for c in CASES if c["alg"] == "origin"], ids=lambda c: c["id"])
def test_each_mask_by_chance(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The algorithm `origin`, with the authors' random numbers, which belong to the masked positions row by row."""
    draws = iter([u for step in case["uniform_draws_per_step"] for u in step])
    monkeypatch.setattr(sampler, "_keyed_uniforms", lambda masked, _: np.array([next(draws) for _ in masked.positions]))
    outs = Decoder(model()).generate(case["prompts"], replace(settings(case), policy="independent"))
    for row, out in enumerate(outs):
        check(case, row, out, 0)


@pytest.mark.parametrize("case", CACHED, ids=lambda c: f"{c['id']}-{c['cache']}-{c['alg']}")
def test_fast_dllm_caches(case: dict[str, Any]) -> None:
    """A block's first pass commits its first token, which slices cannot predict, and nothing else."""
    length = case["block_length"]
    steps = None if case["alg"] == "confidence_threshold" else case["steps_arg"] * length // case["max_new_tokens"]
    changed = settings(case, block_length=length, denoising_steps=steps, cache=case["cache"])
    out = Decoder(model()).generate(case["prompts"], changed)[0]
    assert out.num_forwards.denoise == case["n_calls"]
    check(case, 0, out, 0)


def test_residuals_come_from_the_row_that_predicts() -> None:
    """The state of position i after a pass is that of the prediction at i: shifted, as the tokens are."""
    decoder = Decoder(model())
    plain = DecodeSettings(max_new_tokens=8, block_length=8, policy="sequential", denoising_steps=8, schedule="even")
    rcd = DecodeSettings(**{**vars(plain), "residual": True, "start": "zero", "alpha": "one", "trace": True})
    out = decoder.generate([[3, 1, 4]], rcd)[0]
    ids = torch.tensor([[3, 1, 4, *[model().mask_token_id] * 8]])
    with torch.no_grad():
        p = torch.softmax(model().logits(ids)[0, 4:], -1)  # positions 4 to 10 after the first pass
        embeds = model().embedding(ids)
        embeds[0, 3] = model().embedding.weight[out.canvas_ids[3]]
        embeds[0, 4:] = p @ model().embedding.weight
        positions = torch.arange(11)[None]
        logits = model().head(model().hidden(embeds, positions))[0, 3:10]
    assert out.steps[1].argmax == logits.argmax(-1).tolist()


def test_a_batch_decodes_as_each_request_alone() -> None:
    prompts = [[11, 12, 13, 14, 15], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
    for cache_mode in ("none", "prefix", "dual"):
        s = DecodeSettings(
            block_length=4, max_new_tokens=12, confidence_threshold=0.3, residual=True, start="self", cache=cache_mode
        )
        together = Decoder(model()).generate(prompts, s)
        for prompt, out in zip(prompts, together, strict=True):
            assert Decoder(model()).generate([prompt], s)[0].token_ids == out.token_ids


def test_exported_and_loaded_again(tmp_path: Path) -> None:
    first = load_model(GOLDEN / "dream" / "dream_tiny")
    first.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path, GOLDEN / "dream" / "dream_tiny"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    ids = torch.arange(20)[None]
    assert torch.equal(first.logits(ids), again.logits(ids)) and first.info == again.info
    written, official = (json.loads((d / "config.json").read_text()) for d in (tmp_path, GOLDEN / "dream/dream_tiny"))
    ignored = {"bos_token_id", "transformers_version"}
    assert {k: written.get(k) for k in official.keys() - ignored} == {k: official[k] for k in official.keys() - ignored}


def test_overfits_a_batch_with_residual_inputs() -> None:
    assert overfit(load_model(GOLDEN / "dream" / "dream_tiny"), 240, 60) < 0.1


def test_windows_and_absent_biases_are_refused(tmp_path: Path) -> None:
    source = GOLDEN / "dream" / "dream_tiny"
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    for changes, field in (
        ({"attention_bias": False}, "attention_bias"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=field):
            load_model(tmp_path)
