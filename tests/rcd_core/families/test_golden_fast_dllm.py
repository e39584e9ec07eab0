"""Fast-dLLM v2 against the authors' code (vectors in tests/golden): shifted logits, sub-blocks, their block cache.

Models are in fp64. Left out, as faults of the authors' code: prompts of exactly one block, which it loses (we compare
them with a pass over the whole prompt), and batches with the block cache, whose rows depend on each other there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rcd_core import Decoder, DecodeSettings, TrainingBatch, load_model, training_loss
from rcd_core.families.base import DiffusionModel
from rcd_core.training.objective import IGNORED, masked_hidden
from tests.rcd_core.families.overfit import overfit
from tests.rcd_core.families.test_golden_models import check_gradients
from tests.rcd_core.golden_models import GOLDEN, load_fp64

AUTHORS = 5e-5  # their code ran in fp32
PRINTED = 6e-6 + AUTHORS  # five decimals
FOLDER = GOLDEN / "fastdllm_v2"
VECTORS = json.loads((FOLDER / "fastdllm_v2_vectors.json").read_text())
CASES = [c for c in VECTORS["generate"] if "prompt" not in c.get("note", "") and "shortest" not in c.get("note", "")]
CASES = [c for c in CASES if len(c["prompts"]) == 1 or not c["use_block_cache"]]


@cache
def model() -> DiffusionModel:
    return load_fp64("fastdllm_v2/fastdllm_v2_tiny")


@cache
def vectors() -> dict[str, torch.Tensor]:
    stored = load_file(FOLDER / "fastdllm_v2_vectors.safetensors")
    return {k: v.double() if v.is_floating_point() else v for k, v in stored.items()}


@pytest.mark.parametrize("block_length", [8, 32])
def test_forward(block_length: int) -> None:
    v = vectors()
    raw = v[f"fwd_b{block_length}_logits"]
    shifted = torch.cat([raw[:, :1], raw[:, :-1]], 1)
    found = model().logits(v[f"fwd_b{block_length}_ids"], block_length)
    torch.testing.assert_close(found, shifted, atol=AUTHORS, rtol=0)


def settings(case: dict[str, Any], longest: int, **changes: Any) -> DecodeSettings:
    """So many new tokens that every prompt's canvas ends with the authors' last block."""
    b = case["block_size"]
    return DecodeSettings(
        block_length=b,
        sub_block_length=case["small_block_size"],
        max_new_tokens=longest,
        confidence_threshold=case["threshold"],
        stop_token_ids=(case["stop"],),
        cache="dual" if case["use_block_cache"] else "block",
        trace=True,
        **changes,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['function']}")
def test_decoding(case: dict[str, Any]) -> None:
    b = case["block_size"]
    for row, prompt in enumerate(case["prompts"]):
        final = case["final_ids"][row]
        stopped = case["stop"] in final[len(prompt) :]
        end = len(final) if stopped else len(final) // b * b  # the last commit pass appends a token of the next block
        new = -(-len(final) // b) * b - len(prompt) if stopped else end - len(prompt)
        out = Decoder(model()).generate([prompt], settings(case, new))[0]
        end = final.index(case["stop"], len(prompt)) if stopped else end  # batches are padded behind it
        assert prompt + out.token_ids == final[:end]
        if len(case["prompts"]) == 1:
            check_passes(case, out, stopped)


def check_passes(case: dict[str, Any], out: Any, stopped: bool) -> None:
    passes = case["passes"]
    assert out.num_forwards.total == len(passes) - (not stopped)
    steps = iter(out.steps)
    for one in passes if stopped else passes[:-1]:
        if one["kind"] == "prefill" and len(case["prompts"][0]) % case["block_size"]:
            continue
        step = next(steps)
        if "last_row_argmax" in one:
            assert step.committed == step.masked and step.argmax == one["last_row_argmax"]
            continue
        want = one["rows"][0]
        assert step.masked == want["masked"]
        assert step.argmax == want["argmax"]
        assert sorted(step.committed) == sorted(want["committed"])
        found = torch.tensor(step.confidence, dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(want["conf"], dtype=torch.float64), atol=PRINTED, rtol=0)
    assert next(steps, None) is None


@pytest.mark.parametrize("case", VECTORS["train"], ids=lambda c: c["name"])
def test_training(case: dict[str, Any]) -> None:
    """Both complementary views. The authors predict a block's first token from the last noisy row of the block before,
    which does not see the new block; we do so from the clean row, as in decoding."""
    m, v, name = load_tiny(torch.float64), vectors(), case["name"]
    noisy, clean = v[f"{name}_concat_ids"].chunk(2, 1)
    masked = v[f"{name}_view_labels"] != IGNORED
    masked[:, 0] = False  # which no row predicts
    labels = torch.where(masked, v[f"{name}_view_labels"], IGNORED)
    every = TrainingBatch(clean, labels, noisy, torch.ones_like(masked), torch.ones(masked.shape), case["block_size"])
    packed = every.with_packed().packed
    assert packed is not None
    packed = replace(packed, before=(torch.arange(packed.source.shape[1]) - 1).clamp(min=0).expand_as(packed.source))
    batch = replace(every, masked=masked, packed=packed)
    with torch.no_grad():
        rows = m.head(masked_hidden(m, batch, None))
    raw = v[f"{name}_logits"]
    torch.testing.assert_close(rows, torch.cat([raw[:, :1], raw[:, :-1]], 1)[masked], atol=AUTHORS, rtol=0)
    loss = training_loss(m, batch, weight="uniform")
    assert loss.item() == pytest.approx(case["loss_mean"], rel=1e-5)
    loss.backward()
    check_gradients(m, case["grad_norms"])


def load_tiny(dtype: torch.dtype | None = None) -> DiffusionModel:
    if dtype is not None:
        return load_fp64("fastdllm_v2/fastdllm_v2_tiny").requires_grad_(True)
    return load_model(FOLDER / "fastdllm_v2_tiny")


def test_training_rows_are_those_of_decoding() -> None:
    """Each masked position of packed samples, against a pass over the clean blocks before its own."""
    m, b, mask = model(), 8, VECTORS["ids"]["mask"]
    generator = torch.Generator().manual_seed(1)
    lengths = [21, 16, 30]
    ids = [torch.randint(0, 240, (length,), generator=generator) for length in lengths]
    masked = [torch.rand(length, generator=generator) < 0.5 for length in lengths]
    for one in masked:
        one[[8, 0]] = True  # the start of a block, and of the sample
    width = sum(lengths) + 3  # and some padding
    flat, flags = (torch.zeros(1, width).to(t) for t in (torch.long, torch.bool))
    samples, positions = torch.full((1, width), -1), torch.zeros(1, width).long()
    at = 0
    for number, (tokens, chosen) in enumerate(zip(ids, masked, strict=True)):
        part = (0, slice(at, at + len(tokens)))
        flat[part], flags[part], samples[part], positions[part] = tokens, chosen, number, torch.arange(len(tokens))
        at += len(tokens)
    noisy = torch.where(flags, mask, flat)
    batch = TrainingBatch(flat, flat, noisy, flags, torch.ones(1, width), b, samples, positions)
    want = []
    with torch.no_grad():
        found = m.head(masked_hidden(m, batch, None))
        for tokens, chosen in zip(ids, masked, strict=True):
            for position in chosen.nonzero()[:, 0].tolist():
                start = position // b * b
                block = torch.where(chosen, mask, tokens)[start : start + b]
                want.append(m.logits(torch.cat([tokens[:start], block])[None], b)[0, position])
    torch.testing.assert_close(found, torch.stack(want), atol=1e-9, rtol=0)


def test_exported_and_loaded_again(tmp_path: Path) -> None:
    first, source = load_tiny(), FOLDER / "fastdllm_v2_tiny"
    first.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path, source))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(first.logits(torch.arange(20)[None]), again.logits(torch.arange(20)[None]))
    assert first.info == again.info and type(again) is type(first)
    written, official = (json.loads((d / "config.json").read_text()) for d in (tmp_path, source))
    for name in official.keys() - {"bos_token_id", "transformers_version", "hidden_act", "rope_scaling"}:
        assert written[name] == official[name], name


def test_overfits_a_batch_with_residual_inputs() -> None:
    assert overfit(load_tiny(), 240, 60) < 0.1
