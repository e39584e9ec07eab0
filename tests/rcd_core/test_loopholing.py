"""Loopholing, against its authors' rule (vectors in tests/golden/loopholing) and against plain loops.

The vectors' "both" and "last" give states to clean tokens and to finished blocks as well. The engine has neither: what
is stored of a block would depend on how it was decoded, and a request could not be resumed from its tokens.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rcd_core import DecodeSettings, TrainingBatch
from rcd_core.attention.layouts import block_causal
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.request import make_sequence
from rcd_core.errors import UserError
from rcd_core.loopholing import Loophole
from rcd_core.training.data.batches import MicroBatch
from rcd_core.training.loopholing import first_states
from rcd_core.training.loss_module import LossModule
from rcd_core.training.objective import masked_hidden
from rcd_core.training.settings import ResidualSettings
from tests.rcd_core.golden_models import GOLDEN, load_fp64

STORED = json.loads((GOLDEN / "loopholing" / "loopholing.json").read_text())
TENSORS = {
    k: v.double() if v.is_floating_point() else v
    for k, v in load_file(GOLDEN / "loopholing" / "loopholing.safetensors").items()
}
STATES = 2e-4  # stored in fp32, whose distance to fp64 the vectors' README gives as 1.2e-4
LOOPHOLING = ResidualSettings(source="loopholing", dropout=0.0)
EVERY: dict[str, Any] = {"residual": True, "stop_token_ids": (), "trace": True}


def with_loophole(name: str, adapter: str) -> Any:
    torch.set_num_threads(1)
    model = load_fp64(name)
    width = model.embedding.weight.shape[1]
    model.loophole = Loophole(width).double()
    model.loophole.load_state_dict({k: TENSORS[f"adapter_{adapter}_{k}"][:width] for k in ("weight", "bias")})
    return model


def decoded(model: Any, requests: list[tuple[list[int], DecodeSettings]], infill: bool = False, **options: Any) -> Any:
    engine = Engine(model, None, **{"max_batch": 16, "max_length": 64, **options})
    sequences = [make_sequence(model, p, s, infill=infill, has_reference=False) for p, s in requests]
    for sequence in sequences:
        engine.add(sequence)
    while engine.busy:
        engine.step()
    assert engine.tables.num_free_pages == engine.tables.num_pages
    return [sequence.output() for sequence in sequences]


# -- the authors' objective, on LLaDA's layers


def lddm_pass(model: Any, ids: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logits, states) of (B, L) tokens."""
    stream = model.stream(model.loophole(model.embedding(ids), states), torch.arange(ids.shape[1]).expand(ids.shape))
    return model.head(model.backbone.model.norm(stream)), stream


@pytest.mark.parametrize("case", STORED["lddm_loss"], ids=lambda c: c["adapter"])
def test_two_passes_are_the_authors(case: dict[str, Any]) -> None:
    adapter, stored = case["adapter"], STORED["lddm"]
    model = with_loophole("llada_tiny", adapter).requires_grad_(True)
    clean, noisy, t = torch.tensor(stored["x0"]), torch.tensor(stored["xt"]), torch.tensor(stored["t"]).double()
    masked = noisy == stored["mask_id"]
    batch = TrainingBatch(clean, clean, noisy, masked, torch.ones(2), clean.shape[1])
    states = first_states(model, batch, torch.ones(int(masked.sum())))
    assert torch.allclose(states, TENSORS[f"lddm_{adapter}_h1"], atol=STATES)
    logits, after = lddm_pass(model, noisy, states)
    assert torch.allclose(logits, TENSORS[f"lddm_{adapter}_logits2"], atol=STATES)
    assert torch.allclose(after, TENSORS[f"lddm_{adapter}_h2"], atol=STATES)
    for kind, before in (("two_pass", states), ("one_pass", states * 0)):
        model.zero_grad()
        hidden = masked_hidden(model, batch, None, before)
        logits = model.head(hidden).index_fill(1, torch.tensor([stored["mask_id"]]), -1e6)
        losses = torch.nn.functional.cross_entropy(logits, clean[masked], reduction="none")
        loss = (losses / t[:, None].expand(2, clean.shape[1])[masked]).sum() / clean.numel()
        loss.backward()
        assert loss.item() == pytest.approx(case[kind]["loss_f64"], rel=1e-6)
        assert model.loophole.weight.grad.norm().item() == pytest.approx(case[kind]["grad_adapter_weight"], rel=1e-4)
        assert model.loophole.bias.grad.norm().item() == pytest.approx(case[kind]["grad_adapter_bias"], rel=1e-4)
        assert model.embedding.weight.grad.norm().item() == pytest.approx(case[kind]["grad_wte"], rel=1e-4)
        if kind == "two_pass":
            for name in ("weight", "bias"):
                gradient = getattr(model.loophole, name).grad
                assert torch.allclose(gradient, TENSORS[f"lddm_{adapter}_grad_{name}"], atol=1e-4, rtol=1e-4)


def test_a_new_loophole_changes_nothing() -> None:
    plain, model = load_fp64("llada_tiny"), with_loophole("llada_tiny", "zero")
    ids = torch.tensor(STORED["lddm"]["xt"])
    logits, states = lddm_pass(model, ids, None)
    assert torch.equal(logits, plain.logits(ids)) and torch.equal(lddm_pass(model, ids, states)[0], logits)
    assert torch.equal(model.logits(ids), logits)


@pytest.mark.parametrize("case", STORED["lddm_sampling"], ids=lambda c: c["noise_removal"])
def test_ancestral_sampling_is_the_authors(case: dict[str, Any]) -> None:
    model, mask = with_loophole("llada_tiny", case["adapter"]), STORED["lddm"]["mask_id"]
    uniforms = TENSORS[f"lddm_sampling_{case['noise_removal']}_uniforms"]
    canvas, states = torch.full((case["length"],), mask), None
    times = [*torch.linspace(1, case["eps"], case["steps"] + 1, dtype=torch.float64).tolist(), None]
    with torch.no_grad():
        for i, expected in enumerate(case["states"][1:]):
            logits, states = lddm_pass(model, canvas[None], states)
            p = torch.softmax(logits[0].index_fill(1, torch.tensor([mask]), -torch.inf), -1)
            if times[i + 1] is None and case["noise_removal"] == "greedy":
                drawn = p.argmax(-1)
            else:
                following = 1.0 if times[i + 1] is None else 1 - 0.999 * (times[i] - case["dt"])
                q = p * (following - (1 - 0.999 * times[i]))
                q[:, mask] = 1 - following
                drawn = (q / (1e-10 - torch.log(uniforms[i] + 1e-10))).argmax(-1)
            canvas = torch.where(canvas == mask, drawn, canvas)
            assert canvas.tolist() == expected
    assert states is not None
    assert torch.allclose(states[0], TENSORS[f"lddm_sampling_{case['noise_removal']}_h_last"], atol=STATES)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", STORED["harness_greedy"], ids=lambda c: str(c["n_target"]))
def test_greedy_decoding_is_the_authors(case: dict[str, Any], fixed: bool) -> None:
    """By the engine: one block, one token a pass, after a pass that only gives states."""
    model, count = with_loophole("llada_tiny", case["adapter"]), case["n_target"]
    canvas = [*case["prefix"], *[model.mask_token_id] * (count - 1), case["eos_id"]]
    settings = DecodeSettings(
        block_length=count, denoising_steps=count - 1, policy="low_confidence_static", start="self", **EVERY
    )
    (out,) = decoded(model, [(canvas, settings)], infill=True, fixed_shapes=fixed)
    assert out.canvas_ids == case["final_ids"] and out.num_forwards.denoise == case["passes"]
    for step, expected in zip(out.steps, case["steps"], strict=True):
        assert step.masked == expected["masked"] and step.argmax == expected["argmax"]
        assert step.confidence == pytest.approx(expected["conf"], abs=1e-4)
        assert step.committed == [expected["committed"]]


# -- blocks


@pytest.mark.parametrize("case", STORED["block_loss"], ids=lambda c: f"{c['id']}-{c['adapter']}-{c['inject']}")
def test_the_loss_of_blocks(case: dict[str, Any]) -> None:
    model = with_loophole("sdar_tiny", case["adapter"]).requires_grad_(True)
    clean, noisy = torch.tensor([case["clean"]]), torch.tensor([case["noisy"]])
    masked = noisy == case["mask_id"]
    batch = TrainingBatch(
        clean,
        None,
        noisy,
        masked,
        torch.tensor([case["p"]]).double(),
        case["block"],
        prompt_lengths=torch.tensor([case["prompt_length"]]),
    )  # type: ignore[arg-type]
    micro = MicroBatch([], batch.with_packed(), None, torch.ones(case["n_masked"]).double())
    if case["inject"] == "both":
        with torch.no_grad():
            packed = micro.batch.packed
            assert packed is not None
            ids = torch.where(packed.noisy, noisy.gather(1, packed.source), clean.gather(1, packed.source))
            positions = micro.batch.positions.gather(1, packed.source)
            states = model.stream(model.loophole(model.embedding(ids)), positions, packed.layout)
        hidden = masked_hidden(model, micro.batch, None, states)
        losses = torch.nn.functional.cross_entropy(model.head(hidden), clean[masked], reduction="sum")
        loss = losses / case["p"]
    else:
        loss, _ = LossModule(model, "inverse_t", LOOPHOLING)(micro, None)
        states = first_states(model, batch, micro.keep)
        hidden = masked_hidden(model, batch, None, states)
    loss = loss / case["n_labelled"]
    loss.backward()
    name = f"block{case['id']}_{case['adapter']}_{case['inject']}"
    assert loss.item() == pytest.approx(case["loss_f64"], rel=1e-6)
    for key, parameter in (
        ("adapter_weight", model.loophole.weight),
        ("adapter_bias", model.loophole.bias),
        ("embed", model.embedding.weight),
    ):
        assert parameter.grad.norm().item() == pytest.approx(case[f"grad_{key}"], rel=1e-4)
    assert torch.allclose(model.loophole.weight.grad, TENSORS[f"{name}_grad_weight"], atol=1e-4, rtol=1e-4)
    if (logits := TENSORS.get(f"{name}_logits2_masked")) is not None:
        assert torch.allclose(model.head(hidden), logits, atol=STATES)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("cache", ["block", "none"])
def test_blocks_are_decoded_as_in_a_plain_loop(cache: Any, fixed: bool) -> None:
    """All stored traces with states of the live block only, in one batch."""
    cases = [c for c in STORED["block_decode"] if c["store_h"] == "zero"]
    model = with_loophole("sdar_tiny", "random")
    requests = [
        (
            c["prompt"],
            DecodeSettings(
                block_length=c["block"],
                max_new_tokens=c["gen_length"],
                confidence_threshold=c["threshold"],
                start="zero",
                cache=cache,
                **EVERY,
            ),
        )
        for c in cases
    ]
    outputs = decoded(model, requests, fixed_shapes=fixed)
    for case, out in zip(cases, outputs, strict=True):
        assert out.canvas_ids[: len(case["final_ids"])] == case["final_ids"]
        assert out.num_forwards.denoise == case["n_denoise"]
        for step, expected in zip(out.steps, case["steps"], strict=True):
            assert step.masked == expected["masked"] and step.argmax == expected["argmax"]
            assert sorted(step.committed) == sorted(expected["committed"])
            assert step.confidence == pytest.approx(expected["conf"], abs=1e-4)


@pytest.mark.parametrize("case", STORED["block_decode"], ids=lambda c: f"{c['id']}-{c['store_h']}")
def test_blocks_in_a_plain_loop(case: dict[str, Any]) -> None:
    """Also with states of finished blocks ("last"), which the engine does not keep."""
    model, block, prompt = with_loophole("sdar_tiny", "random"), case["block"], case["prompt"]
    total = -(-(len(prompt) + case["gen_length"]) // block) * block
    canvas = torch.full((1, total), model.mask_token_id)
    canvas[0, : len(prompt)] = torch.tensor(prompt)
    kept, steps = torch.zeros(1, total, 64, dtype=torch.float64), iter(case["steps"])
    positions = torch.arange(total)[None]
    for start in range(0, total, block):
        end, inside = start + block, slice(start, start + block)
        states = kept[:, :end].clone()
        states[:, inside] = 0
        layout = block_causal(positions[:, :end], torch.tensor([end]), end, torch.tensor([block]))
        while (canvas[0, inside] == model.mask_token_id).any():
            with torch.no_grad():
                stream = model.stream(
                    model.loophole(model.embedding(canvas[:, :end]), states), positions[:, :end], layout
                )
                logits = model.head(model.backbone.model.norm(stream))[0, inside]
            states[:, inside] = stream[:, inside]
            logits[:, model.mask_token_id] = -torch.inf
            confidence, best = torch.softmax(logits, -1).max(-1)
            masked = canvas[0, inside] == model.mask_token_id
            confidence[~masked] = -1.0
            commit = confidence > case["threshold"]
            commit[confidence.argmax()] = True
            expected = next(steps)
            assert [start + i for i in masked.nonzero()[:, 0].tolist()] == expected["masked"]
            assert sorted(start + i for i in commit.nonzero()[:, 0].tolist()) == sorted(expected["committed"])
            canvas[0, inside] = torch.where(commit, best, canvas[0, inside])
        if case["store_h"] == "last" and start + block > len(prompt):
            kept[:, inside] = states[:, inside]
    assert next(steps, None) is None
    assert canvas[0, : len(case["final_ids"])].tolist() == case["final_ids"]


@pytest.mark.parametrize("name", ["sdar_tiny", "llada_tiny", "dream/dream_tiny"])
@pytest.mark.parametrize("start", ["zero", "self"])
def test_batched_preempted_and_alone_are_the_same(name: str, start: Any) -> None:
    model = with_loophole(name, "random")
    settings = [
        DecodeSettings(block_length=b, max_new_tokens=n, confidence_threshold=0.6, start=start, seed=1, **EVERY)
        for b, n in ((4, 12), (8, 16), (3, 7))
    ]
    settings.append(DecodeSettings(block_length=4, max_new_tokens=8, temperature=0.8, seed=3, start=start, **EVERY))
    requests = [([7 + i, 30, 41 + i, 5][: 2 + i % 3], s) for i, s in enumerate(settings)]
    alone = [decoded(model, [one])[0] for one in requests]
    plain = decoded(model, [(p, DecodeSettings(**{**vars(s), "residual": False})) for p, s in requests])
    assert [o.token_ids for o in plain] != [o.token_ids for o in alone], "states matter"
    for options in ({}, {"fixed_shapes": True}, {"num_pages": 3}, {"max_batch": 2, "prefill_chunk": 4}):
        together = decoded(model, requests, **options)
        assert [o.token_ids for o in together] == [o.token_ids for o in alone], options
        assert [o.num_forwards.denoise for o in together] == [o.num_forwards.denoise for o in alone]


def test_a_shifted_model_gets_the_state_of_the_row_that_predicts() -> None:
    """Dream: the engine against a plain loop, and training against both."""
    model = with_loophole("dream/dream_tiny", "random")
    prompt, settings = (
        [5, 9, 17],
        DecodeSettings(
            block_length=8, max_new_tokens=8, denoising_steps=8, policy="low_confidence_static", start="zero", **EVERY
        ),
    )
    (out,) = decoded(model, [(prompt, settings)])
    canvas, states = torch.tensor([prompt + [model.mask_token_id] * 8]), None
    with torch.no_grad():
        for step in out.steps:
            logits, stream = lddm_pass(model, canvas, states)
            batch = TrainingBatch(canvas, canvas, canvas, canvas == model.mask_token_id, torch.ones(1), 8)
            hidden = masked_hidden(model, batch, None, states)
            assert torch.allclose(model.head(hidden), logits[0, [p - 1 for p in step.masked]])
            best = logits[0].index_fill(1, torch.tensor([model.mask_token_id]), -torch.inf).argmax(-1)
            assert step.argmax == [int(best[p - 1]) for p in step.masked]
            if states is None:
                first = first_states(model, batch, torch.ones(len(step.masked)))
            states = stream.roll(1, 1)
            states[:, 0] = 0
            if step is out.steps[0]:
                assert torch.allclose(states, first)
            for p in step.committed:
                canvas[0, p] = step.argmax[step.masked.index(p)]


@pytest.mark.parametrize(
    "setting",
    [
        *({"start": "dirichlet"}, {"residual_top_k": 8}, {"alpha": "normalized_entropy"}, {"max_live_blocks": 2}),
        *({"compat_passes": True}, {"editing_threshold": 0.9}),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_states_do_not_have_is_refused(setting: dict[str, Any]) -> None:
    model = with_loophole("sdar_tiny", "random")
    settings = DecodeSettings(**{"block_length": 4, "residual": True, "start": "zero", **setting})
    with pytest.raises(UserError, match=rf"{next(iter(setting))} is .*Loopholing.*residual=False"):
        make_sequence(model, [5, 6], settings, infill=False, has_reference=False)
