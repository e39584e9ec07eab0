"""Sampling against its definition, and the policies that choose what a pass commits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcd_core import Decoder, DecodeSettings
from rcd_core.decoding.policies import POLICIES, BlockView
from rcd_core.decoding.sampler import Draws, Kind, SpecialTokens, choose_tokens, filtered_probabilities
from tests.rcd_core.decoding.test_decoding import GOLDEN, many, model

# -- sampling


GREEDY = Kind(feedback=None, entropy=False)
DRAWN = replace(GREEDY, drawn=True)


def draws(temperature: torch.Tensor, **changes: torch.Tensor) -> Draws:
    """One row of numbers per row of logits, all off except `changes`."""
    rows = torch.ones_like(temperature, dtype=torch.float64)
    plain = {"top_k": rows * 10_000, "top_p": rows, "uniform": rows * 0, "cfg_scale": rows * 0}
    return Draws(temperature=temperature.double(), **{**plain, **{n: v.double() for n, v in changes.items()}})


def test_filtered_distribution_is_the_authors() -> None:
    from safetensors.torch import load_file

    v = load_file(GOLDEN / "sdar_vectors.safetensors")
    logits = v["sampling_logits"]
    checked = 0
    for name, want in v.items():
        if not name.endswith("_draw_probs"):
            continue
        t, k, p = (float(part[1:]) for part in name.removeprefix("sampling_").removesuffix("_draw_probs").split("_"))
        rows = torch.ones(len(logits))
        found = filtered_probabilities(logits, rows * t, (rows * (k or logits.shape[1])).long(), rows * p)
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)
        top = {"top_k": (rows * (k or logits.shape[1])).long(), "top_p": rows * p}
        full = torch.softmax(logits / t, -1)
        kind = replace(DRAWN, filtered=True)
        tokens, confidence = choose_tokens(logits, kind, draws(rows * t, **top), SpecialTokens(511), True)
        torch.testing.assert_close(confidence, full.gather(1, tokens[:, None])[:, 0])
        best = want.argmax(-1)
        # The authors may draw the mask token, and we never do, so it gets an extra column without mass.
        padded = torch.nn.functional.pad(logits, (0, 1), value=float("-inf"))
        # The uniform number that draws the most probable token: the middle of its interval in the running sum.
        middle = (want.double().cumsum(-1).gather(1, best[:, None])[:, 0] - want.amax(-1).double() / 2).float()
        for filtered, name_of in ((True, "generate_py"), (False, "opencompass")):
            chosen = replace(kind, filtered_confidence=filtered)
            numbers = draws(rows * t, **top, uniform=middle)
            tokens, confidence = choose_tokens(padded, chosen, numbers, SpecialTokens(512), True)
            assert torch.equal(tokens, best)
            stored = v[name.replace("_draw_probs", f"_conf_of_argmax_{name_of}")]
            torch.testing.assert_close(confidence, stored, atol=1e-6, rtol=1e-4)
        checked += 1
    assert checked == 8


def test_draws_follow_the_distribution() -> None:
    """Stratified uniforms give frequencies within one draw in 4,000 of the probabilities."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 9.0]]).expand(4000, -1)
    ones = torch.ones(4000)
    strata = draws(ones, uniform=(torch.arange(4000) + 0.5) / 4000)
    tokens, _ = choose_tokens(logits, DRAWN, strata, SpecialTokens(4), True)  # 4 is the mask token: never drawn
    frequencies = torch.bincount(tokens, minlength=5) / 4000
    want = torch.cat([torch.softmax(logits[0, :4], -1), torch.zeros(1)])
    torch.testing.assert_close(frequencies, want, atol=1.1 / 4000, rtol=0)


def test_eos_options() -> None:
    """logits_eos_inf: EOS is not chosen and gets no mass. confidence_eos_eot_inf: it is chosen, with confidence 0."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])  # 0 is EOS, 1 the end of a turn
    special = SpecialTokens(3, eos=(0,), ends=(0, 1))
    chosen = [
        choose_tokens(logits, replace(GREEDY, no_eos=no_eos, eos_last=eos_last), None, special, False)
        for no_eos, eos_last in ((False, False), (True, False), (False, True), (True, True))
    ]
    assert [tokens.item() for tokens, _ in chosen] == [0, 1, 0, 1]
    want = [torch.softmax(logits[0], -1)[0].item(), torch.softmax(logits[0, 1:], -1)[0].item(), 0.0, 0.0]
    assert [confidence.item() for _, confidence in chosen] == pytest.approx(want)


def test_logits_eos_inf_generates_no_eos() -> None:
    llada = Decoder(model("llada"))
    s = DecodeSettings(block_length=8, max_new_tokens=16, stop_token_ids=(), temperature=50.0, seed=3)
    eos = model("llada").info.eos_token_ids[0]
    drawn = [t for out in llada.generate([[i] for i in range(160)], s) for t in out.token_ids]
    without = replace(s, logits_eos_inf=True)
    spared = [t for out in llada.generate([[i] for i in range(160)], without) for t in out.token_ids]
    assert eos in drawn and eos not in spared


# -- policies


def test_the_seed_decides_the_random_order() -> None:
    """Random remasking commits one token a pass, in an order that depends on the seed and not on the batch."""
    s = DecodeSettings(block_length=8, max_new_tokens=8, policy="random", seed=1, stop_token_ids=(), trace=True)
    together = Decoder(model("llada")).generate([[5], [6], [5]], [s, s, replace(s, seed=2)])
    orders = [[p for step in out.steps for p in step.committed] for out in together]
    assert sorted(orders[0]) == list(range(1, 9)) and orders[0] == orders[1] != orders[2]
    alone = Decoder(model("llada")).generate([[5]], replace(s, seed=2))[0]
    assert alone.token_ids == together[2].token_ids


@many
@given(data=st.data())
def test_every_policy_commits_something_and_only_masked(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    masked = generator.random((rows, width)) < 0.6
    view = BlockView(
        masked,
        generator.random((rows, width)),
        generator.random((rows, width)),
        generator.random((rows, width)),
        generator.random((rows, width)),
        generator.integers(0, width + 2, rows),
        np.where(generator.random(rows) < 0.3, 1.0, generator.random(rows)),
        generator.random(rows),
        generator.random(rows),
        generator.random(rows) < 0.5,
    )
    for name, select in POLICIES.items():
        chosen = select(view)
        assert not (chosen & ~masked).any()
        must = view.share == 1.0 if name == "independent" else view.quota > 0
        assert (chosen.any(1) == masked.any(1))[must].all()
