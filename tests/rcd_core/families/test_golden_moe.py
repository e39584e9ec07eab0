"""Mixtures of experts against the authors' code (vectors in tests/golden): forward passes, decoding traces, training.

Models are in fp64, but for the routers, whose classes compute in fp32.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcd_core import Decoder, DecodeSettings, TrainingBatch, load_model, training_loss
from rcd_core.families.base import DiffusionModel
from tests.rcd_core.decoding.test_golden_decoding import AUTHORS, check_steps, llada_settings, sdar_settings
from tests.rcd_core.families.overfit import overfit
from tests.rcd_core.families.test_golden_models import check_gradients, sample_numbers
from tests.rcd_core.golden_models import GOLDEN, load_fp64

CHECKPOINTS = {name: f"{name}/{name}_tiny" for name in ("sdar_moe", "llada2", "llada_moe")}
CHECKPOINTS["llada_moe_options"] = "llada_moe/llada_moe_tiny_options"


def vectors(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    stem = GOLDEN / name / f"{name}_vectors"
    stored = load_file(f"{stem}.safetensors")
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in stored.items()}
    return json.loads(Path(f"{stem}.json").read_text()), doubles


@cache
def model(name: str) -> DiffusionModel:
    return load_fp64(CHECKPOINTS[name])


SDAR, _ = vectors("sdar_moe")
LLADA2, _ = vectors("llada2")
LLADA, _ = vectors("llada_moe")


def test_forward() -> None:
    for name, lengths in (("sdar_moe", (4, 8)), ("llada2", (8, 16, 32))):
        _, v = vectors(name)
        for block_length in lengths:
            want = v.get(f"fwd_logits_b{block_length}", v.get(f"fwd_b{block_length}_logits"))
            torch.testing.assert_close(model(name).logits(v["fwd_ids"], block_length), want, atol=AUTHORS, rtol=0)
    _, v = vectors("llada_moe")
    torch.testing.assert_close(model("llada_moe").logits(v["fwd_ids"]), v["fwd_logits"], atol=AUTHORS, rtol=0)
    torch.testing.assert_close(model("llada_moe_options").logits(v["opt_ids"]), v["opt_logits"], atol=AUTHORS, rtol=0)
    visible = v["pad_attention_mask"].bool()
    padded = model("llada_moe").logits(v["pad_ids"], attention_mask=v["pad_attention_mask"])
    torch.testing.assert_close(padded[visible], v["pad_logits"][visible], atol=AUTHORS, rtol=0)


def test_router_of_llada2() -> None:
    """Groups are dropped whole, the bias decides the choice but not the weights, and weights are renormalised."""
    _, v = vectors("llada2")
    gate = model("llada2").backbone.model.layers[-1].mlp.gate
    cases = {"router": "router_in", "router2": "router2_in", "router3": "router2_in"}
    for case, rows in cases.items():
        if case == "router3":
            gate.weight.data = v["router3_gate_weight"]
            gate.e_score_correction_bias.data = v["router3_expert_bias"]
        _, weights, chosen = gate(v[rows])
        order = chosen.argsort(-1)
        wanted = v[f"{case}_topk_idx"].argsort(-1)
        assert torch.equal(chosen.gather(1, order), v[f"{case}_topk_idx"].long().gather(1, wanted))
        want = v[f"{case}_topk_weight"].gather(1, wanted)
        torch.testing.assert_close(weights.gather(1, order).double(), want, atol=5e-6, rtol=0)
    model.cache_clear()


@pytest.mark.parametrize("case", SDAR["generate"], ids=lambda c: f"{c['id']}-{c['strategy']}")
def test_sdar_moe_decodes(case: dict[str, Any]) -> None:
    out = Decoder(model("sdar_moe")).generate([case["prompt"]], sdar_settings({"eb_threshold": None, **case}))[0]
    assert out.canvas_ids == case["final_ids"][: len(out.canvas_ids)]
    counts = (out.num_forwards.prefill, out.num_forwards.denoise, out.num_forwards.store)
    assert counts == (case["n_prefill"], case["n_denoise"], case["n_store"])
    check_steps(out.steps, [s for s in case["steps"] if s["kind"] == "denoise"], AUTHORS)


@pytest.mark.parametrize("case", [c for c in LLADA2["generate_2_0"] if c["steps_per_block"]], ids=lambda c: c["id"])
def test_llada2_decodes(case: dict[str, Any]) -> None:
    """Cases with an id of EOS as the model's own generate(), which ends after a block that holds it."""
    eos = case.get("eos_id")
    settings = DecodeSettings(
        block_length=case["block_length"],
        denoising_steps=min(case["steps_per_block"], case["block_length"]),
        max_new_tokens=case["gen_length"],
        confidence_threshold=case["threshold"],
        stop_token_ids=() if eos is None else (eos,),
        trace=True,
    )
    out = Decoder(model("llada2")).generate([case["prompt"]], settings)[0]
    if eos is not None:
        assert [*out.token_ids, eos] == case["hf_generate_ids"]
        assert out.num_forwards.denoise == case["hf_generate_n_forward"]
        return
    assert out.canvas_ids == case["final_ids"]
    assert out.num_forwards.denoise == case["n_forward"]
    check_steps(out.steps, [{"masked": s["pos"], **s} for s in case["steps"]], AUTHORS)


@pytest.mark.parametrize("case", LLADA2["generate_2_1"], ids=lambda c: c["id"])
def test_llada21_edits(case: dict[str, Any]) -> None:
    """LLaDA2.1's sampler: tokens filled and replaced in every pass."""
    eos, b = case.get("eos_id"), case["block_length"]
    settings = DecodeSettings(
        block_length=b,
        denoising_steps=b // case["num_to_transfer"],
        max_new_tokens=case["gen_length"],
        confidence_threshold=case["threshold"],
        editing_threshold=case["editing_threshold"],
        max_post_steps=case["max_post_steps"],
        stop_token_ids=() if eos is None else (eos,),
        trace=True,
    )
    out = Decoder(model("llada2")).generate([case["prompt"]], settings)[0]
    found = [*out.token_ids, eos] if eos is not None else out.token_ids
    assert found == case["hf_generate_ids"]
    if eos is not None and not case["eos_early_stop"]:
        return
    assert out.num_forwards.denoise == case["n_forward"]
    assert out.canvas_ids == case["final_ids"][: len(out.canvas_ids)]
    check_steps(
        out.steps, [s | {"masked": s["pos"], "committed": s["committed"] + s["edited"]} for s in case["steps"]], AUTHORS
    )
    assert [sorted(step.edited) for step in out.steps] == [sorted(s["edited"]) for s in case["steps"]]


@pytest.mark.parametrize("case", LLADA["generate"], ids=lambda c: f"{c['id']}-{c['method']}")
def test_llada_moe_decodes(case: dict[str, Any]) -> None:
    out = Decoder(model("llada_moe")).generate([case["prompt"]], llada_settings({"threshold": None, **case}))[0]
    assert out.canvas_ids == case["final_ids"]
    assert out.num_forwards.denoise == case["nfe"]
    check_steps(out.steps, [s for s in case["steps"] if s["masked"]], AUTHORS)


@pytest.mark.parametrize("case", SDAR["train"], ids=lambda c: c["name"])
def test_sdar_moe_trains(case: dict[str, Any]) -> None:
    (_, v), name = vectors("sdar_moe"), case["name"]
    masked = v[f"{name}_masked_half"].bool()
    ids, positions = v[f"{name}_input_ids"], v[f"{name}_position_ids"]
    p_mask = torch.ones(ids.shape, dtype=torch.float64)
    p_mask[masked] = v[f"{name}_p_mask_at_masked"].reshape(-1)
    trained = load_fp64(CHECKPOINTS["sdar_moe"]).train()
    noisy = ids.masked_fill(masked, trained.mask_token_id)
    samples = sample_numbers(positions, case)
    batch = TrainingBatch(ids, v[f"{name}_labels"], noisy, masked, p_mask, case["block_length"], samples, positions)
    loss = training_loss(trained, batch)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    whole = {n: norm for n, norm in case["grad_norms"].items() if ".experts." not in n}
    check_gradients(trained, whole)
    gradient = trained.backbone.model.layers[0].mlp.experts.gate_up_proj.grad
    for expert, half in ((5, 0), (5, 1), (11, 0)):
        part = ("gate", "up")[half]
        want = case["grad_norms"][f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"] or 0.0
        rows = gradient.shape[1] // 2
        got = gradient[expert, half * rows : (half + 1) * rows].norm().item()
        assert got == pytest.approx(want, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_batch_decodes_as_each_request_alone(name: str) -> None:
    """Residuals included, in fp64."""
    prompts = [[11, 12, 13, 14, 15], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
    settings = DecodeSettings(block_length=4, max_new_tokens=12, confidence_threshold=0.6, residual=True, start="self")
    together = Decoder(model(name)).generate(prompts, settings)
    for prompt, out in zip(prompts, together, strict=True):
        assert Decoder(model(name)).generate([prompt], settings)[0].token_ids == out.token_ids


def test_the_engine_computes_the_options_too() -> None:
    """Confidences of the first pass over a canvas, which the engine's own layers make, against the model's logits."""
    options = model("llada_moe_options")
    canvas = [11, 12, 13, *[options.mask_token_id] * 6, 14]
    settings = DecodeSettings(block_length=len(canvas), denoising_steps=3, trace=True)
    first = Decoder(options).infill([canvas], settings)[0].steps[0]
    p = torch.softmax(options.logits(torch.tensor([canvas]))[0], -1)[3:9]
    p[:, options.mask_token_id] = 0.0
    assert first.argmax == p.argmax(-1).tolist()
    assert first.confidence == pytest.approx(p.amax(-1).tolist(), rel=1e-6)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_exported_and_loaded_again(name: str, tmp_path: Path) -> None:
    """In the authors' names, and bit for bit."""
    first = load_model(GOLDEN / CHECKPOINTS[name])
    first.save_pretrained(tmp_path / "one")
    again = load_model(tmp_path / "one")
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "one", GOLDEN / CHECKPOINTS[name]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    ids = torch.arange(20)[None]
    assert torch.equal(first.logits(ids, 4), again.logits(ids, 4))
    assert first.info == again.info


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_overfits_a_batch_with_residual_inputs(name: str) -> None:
    """Signals of the model itself before the training, and every weight moves but those of experts that nothing met."""
    trained = load_model(GOLDEN / CHECKPOINTS[name])
    assert overfit(trained, trained.vocab_size - 14, 30) < 0.1


@pytest.mark.parametrize("fused", [False, True])
def test_experts_may_be_stored_together(fused: bool, tmp_path: Path) -> None:
    """dFactory's (E, F, D) for each of gate, up and down, or gate and up in one, as transformers has them."""
    source = GOLDEN / CHECKPOINTS["llada2"]
    weights = load_file(source / "model.safetensors")
    for layer in (1, 2):
        prefix, parts = f"model.layers.{layer}.mlp.experts", {}
        for part in ("gate", "up", "down"):
            parts[part] = torch.stack([weights.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(16)])
        if fused:
            parts["gate_up"] = torch.cat([parts.pop("gate"), parts.pop("up")], 1)
        weights |= {f"{prefix}.{part}_proj": tensor for part, tensor in parts.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(tmp_path).logits(ids, 4), load_model(source).logits(ids, 4))
