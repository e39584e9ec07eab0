"""Logits, losses and gradients of the authors' code, and the RCD equations in float64 (vectors in tests/golden).

Models are in fp64, so that the numbers are the same on every CPU.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rcd_core import TrainingBatch, training_loss
from rcd_core.alpha import entropy_weight
from rcd_core.dense_signals import DenseSignals
from rcd_core.residual import inject_residual, soft_embedding
from rcd_core.signals import ReferenceSignals
from rcd_core.training.objective import masked_hidden, reference_signals
from rcd_core.training.settings import SignalRule
from tests.rcd_core.golden_models import GOLDEN, load_fp64

SDAR, LLADA, RCD = (GOLDEN / f"{n}_vectors.json" for n in ("sdar", "llada", "rcd/rcd"))
SDAR_TRAIN = json.loads(SDAR.read_text())["train"]
LLADA_TRAIN = json.loads(LLADA.read_text())["train"]
RCD_LOSS = json.loads(RCD.read_text())["loss"]

STORED = 2e-7  # relative: inputs of the float64 implementation are stored in fp32
AUTHORS = 5e-5  # their code ran in fp32: its logits are up to 4.4e-5 away from those in fp64 (rcd_vectors.json)


@pytest.fixture(scope="module")
def vectors() -> dict[str, dict[str, torch.Tensor]]:
    """Every stored tensor, those of floats in fp64."""
    paths = {"sdar": "sdar_vectors", "llada": "llada_vectors", "rcd": "rcd/rcd_vectors"}
    files = {name: load_file(GOLDEN / f"{path}.safetensors") for name, path in paths.items()}
    return {
        name: {k: v.double() if v.is_floating_point() else v for k, v in stored.items()}
        for name, stored in files.items()
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward(vectors: dict[str, Any], attention: str) -> None:
    sdar, llada = (load_fp64(f"{n}_tiny", attention) for n in ("sdar", "llada"))
    for block_length in (4, 8):
        want = vectors["sdar"][f"fwd_logits_b{block_length}"]
        torch.testing.assert_close(sdar.logits(vectors["sdar"]["fwd_ids"], block_length), want, atol=AUTHORS, rtol=0)
    v = vectors["llada"]
    torch.testing.assert_close(llada.logits(v["fwd_ids"]), v["fwd_logits"], atol=AUTHORS, rtol=0)
    for model, name, blocks in ((sdar, "sdar_fwd_logits_b4_f64", 4), (llada, "llada_fwd_logits_f64", None)):
        ids = vectors["sdar" if blocks else "llada"]["fwd_ids"]
        torch.testing.assert_close(model.logits(ids, blocks)[0], vectors["rcd"][name], atol=1e-9, rtol=0)
    visible = v["pad_attention_mask"].bool()
    padded = llada.logits(v["pad_ids"], attention_mask=v["pad_attention_mask"])
    torch.testing.assert_close(padded[visible], v["pad_logits"][visible], atol=AUTHORS, rtol=0)


def check_gradients(model: Any, norms: dict[str, float]) -> None:
    weights = model.official_files()[1]
    by_data = {p.data_ptr(): p for p in model.parameters()}
    for name, norm in norms.items():
        gradient = by_data[weights[name].data_ptr()].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=2e-5), name


def sample_numbers(positions: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    """(B, L) positions of packed samples -> the sample that each token belongs to, -1 for padding."""
    samples = (positions == 0).cumsum(1) - 1
    samples[:, sum(case["sample_lengths"]) :] = -1
    return samples


@pytest.mark.parametrize("case", SDAR_TRAIN, ids=lambda c: c["name"])
def test_sdar_training(vectors: dict[str, Any], case: dict[str, Any]) -> None:
    """SDAR's loss, although our path omits noisy blocks without masks and clean blocks that nothing attends to."""
    v, name = vectors["sdar"], case["name"]
    masked = v[f"{name}_masked_half"].bool()
    ids, positions = v[f"{name}_input_ids"], v[f"{name}_position_ids"]
    p_mask = torch.ones(ids.shape, dtype=torch.float64)
    p_mask[masked] = v[f"{name}_p_mask_at_masked"].reshape(-1)
    samples = sample_numbers(positions, case)
    model = load_fp64("sdar_tiny").train()
    noisy = ids.masked_fill(masked, model.mask_token_id)
    batch = TrainingBatch(ids, v[f"{name}_labels"], noisy, masked, p_mask, case["block_length"], samples, positions)
    loss = training_loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    check_gradients(model, case["grad_norms"])
    parameters = dict(model.backbone.named_parameters())
    pairs = {"grad_final_norm": "model.norm.weight", "grad_l0_q_norm": "model.layers.0.self_attn.q_norm.weight"}
    for stored, parameter in pairs.items():
        torch.testing.assert_close(parameters[parameter].grad, v[f"{name}_{stored}"].reshape(-1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", LLADA_TRAIN, ids=lambda c: c["kind"])
def test_llada_training(vectors: dict[str, Any], case: dict[str, Any]) -> None:
    v, kind = vectors["llada"], case["kind"]
    ids, masked = v["train_ids"], v[f"train_{kind}_masked"].bool()
    labels = ids.clone()
    for row, length in enumerate(case["prompt_lengths"] or []):
        labels[row, :length] = -100
    model = load_fp64("llada_tiny").train()
    batch = TrainingBatch(ids, labels, v[f"train_{kind}_noisy_ids"], masked, v[f"train_{kind}_p_mask"], 4)
    loss = training_loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    check_gradients(model, case["grad_norms"])
    torch.testing.assert_close(
        model.backbone.model.norm.weight.grad, v[f"train_{kind}_grad_ln_f"].reshape(-1), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("case", RCD_LOSS, ids=lambda c: c["name"])
def test_rcd_loss(vectors: dict[str, Any], case: dict[str, Any]) -> None:
    """Eq. 4 on reference distributions at the same noisy input, with gradients through delta's embedding table."""
    v, family, name = vectors["rcd"], case["family"], case["name"]
    ids, noisy = (v[f"loss_{family}_{k}"].reshape(-1, v[f"loss_{family}_ids"].shape[-1]) for k in ("ids", "noisy"))
    model = load_fp64(f"{family}_tiny").train()
    masked = noisy == model.mask_token_id
    labels = ids.clone()
    answers = [case["answer_len"]] if family == "sdar" else case["answer_lengths"]
    for row, length in enumerate(answers):
        labels[row, : ids.shape[1] - length] = -100
    p_mask = torch.tensor([case["p_mask"]], dtype=torch.float64).reshape(-1)
    batch = TrainingBatch(ids, labels, noisy, masked, p_mask, case.get("block_length") or 4)
    stem = name.rsplit("_T", 1)[0] if case["delta_from"] == "T1" else name
    logits = v[f"{stem.split('_T')[0]}_ref_logits_masked"]
    delta_temperature = case["T_res"] if case["delta_from"] == "T_res" else 1.0
    loss = training_loss(model, batch, DenseSignals(logits, case["T_res"], delta_temperature))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=STORED)
    check_gradients(model, case["grad_norms_delta_attached"])
    plain = training_loss(model, batch, None)
    assert plain.item() == pytest.approx(case["loss_without_residual"], rel=1e-12)
    stored = (v[f"{name}_alpha"], v[f"{name}_delta"])
    assert training_loss(model, batch, stored).item() == pytest.approx(case["loss"], rel=STORED)
    zero = (torch.zeros(len(logits)), stored[1])
    assert torch.equal(training_loss(model, batch, zero), plain), "alpha = 0 must be plain SFT, bit for bit"


@pytest.mark.parametrize("family", ["sdar", "llada"])
@pytest.mark.parametrize("source", ["ref", "self"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("variant", ["Tres", "T1"])
def test_one_state(vectors: dict[str, Any], family: str, source: str, temperature: float, variant: str) -> None:
    """Eq. 1-3 on one stored state, dense and sparse with k = V."""
    v = vectors["rcd"]
    logits = v[f"{family}_step_{'ref' if source == 'ref' else 'target_plain'}_logits"]
    names = (k.removesuffix("_alpha") for k in v if k.startswith(f"{family}_step_") and k.endswith("_alpha"))
    name = next(n for n in names if source in n and str(temperature) in n and variant in n)
    model = load_fp64(f"{family}_tiny")
    table = model.embedding.weight.detach()
    alpha = entropy_weight(logits, temperature=temperature)
    delta = soft_embedding(torch.softmax(logits / (temperature if variant == "Tres" else 1.0), -1), table)
    torch.testing.assert_close(alpha, v[f"{name}_alpha"], atol=5e-7, rtol=0)
    torch.testing.assert_close(delta, v[f"{name}_delta"], atol=5e-6, rtol=0)
    mask = torch.ones(len(alpha), dtype=torch.bool)
    plain = table[model.mask_token_id].expand(len(alpha), -1)
    blended = inject_residual(plain, mask, alpha, delta, table[model.mask_token_id])
    torch.testing.assert_close(blended, v[f"{name}_emb"], atol=5e-6, rtol=0)
    temperatures = {"alpha_temperature": temperature, "delta_temperature": temperature if variant == "Tres" else 1.0}
    for signals in (
        DenseSignals(logits, **temperatures),
        ReferenceSignals.from_logits(logits, len(table), **temperatures),
    ):
        torch.testing.assert_close(signals.alpha(len(table)).double(), alpha, atol=5e-7, rtol=0)
        torch.testing.assert_close(signals.soft_embedding(table), delta, atol=2e-3, rtol=0)  # fp16 log-probabilities


def test_masked_hidden_is_what_the_whole_forward_gives(vectors: dict[str, Any]) -> None:
    """Omitting unused blocks of [noisy | clean] changes nothing, compared with the stored logits of all tokens."""
    v, name = vectors["sdar"], "train_packed_b4"
    case = next(c for c in SDAR_TRAIN if c["name"] == name)
    model = load_fp64("sdar_tiny")
    masked, ids = v[f"{name}_masked_half"].bool(), v[f"{name}_input_ids"]
    positions = v[f"{name}_position_ids"]
    samples = sample_numbers(positions, case)
    noisy = ids.masked_fill(masked, model.mask_token_id)
    batch = TrainingBatch(ids, ids, noisy, masked, torch.ones(ids.shape), 4, samples, positions)
    with torch.no_grad():
        logits = model.head(masked_hidden(model, batch, None))
    torch.testing.assert_close(logits, v[f"{name}_logits"][v[f"{name}_loss_rows"].bool()], atol=AUTHORS, rtol=0)


def test_reference_signals_are_those_of_its_logits(vectors: dict[str, Any]) -> None:
    """The tiled path from hidden states agrees with from_logits on the whole matrix."""
    model = load_fp64("rcd/sdar_ref_tiny")
    ids = vectors["sdar"]["train_single_b4_input_ids"]
    masked = vectors["sdar"]["train_single_b4_masked_half"].bool()
    noisy = ids.masked_fill(masked, model.mask_token_id)
    batch = TrainingBatch(ids, ids, noisy, masked, torch.ones(ids.shape), 4)
    signals = reference_signals(model, batch, SignalRule(top_k=16))
    with torch.no_grad():
        want = ReferenceSignals.from_logits(model.head(masked_hidden(model, batch, None)), 16)
    assert torch.equal(signals.topk_ids, want.topk_ids)
    torch.testing.assert_close(signals.entropy, want.entropy)
    torch.testing.assert_close(signals.tail_mass, want.tail_mass)
