"""Invariants of decoding over random prompts, lengths and settings, on the tiny golden models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcd_core import Decoder, DecodeSettings, LocalReference, ReferenceSignals, UserError, WarmStart, load_model
from rcd_core.decoding.policies import POLICIES

GOLDEN = Path(__file__).parents[2] / "golden"
MASK = {"sdar": 511, "llada": 505, "fast_dllm": 253}
FAMILIES = ["sdar", "llada", "fast_dllm"]
many = settings(max_examples=10, deadline=None, derandomize=True)  # the same cases in every run


@cache
def model(name: str) -> Any:
    torch.set_num_threads(1)
    if "fast_dllm" in name:
        return load_model(GOLDEN / "fastdllm_v2" / "fastdllm_v2_tiny")
    return load_model(GOLDEN / (f"rcd/{name}" if "ref" in name else f"{name}_tiny"))


def decoder(family: str, **options: Any) -> Decoder:
    return Decoder(model(family), model(f"{family}_ref_tiny"), **options)


@st.composite
def any_settings(draw: st.DrawFn, family: str) -> DecodeSettings:
    live_blocks = draw(st.sampled_from([None, None, 1, 2, 4])) if family != "fast_dllm" else None
    block_length = draw(st.sampled_from([1, 3, 4, 8]))
    divisors = [None, *(n for n in (1, 2, 4) if block_length % n == 0)]
    sub_block = draw(st.sampled_from(divisors)) if family != "llada" and live_blocks is None else None
    policies = sorted(POLICIES) if live_blocks is None else ["entropy_bounded", "low_confidence_dynamic"]
    policy = draw(st.sampled_from(policies))
    caches = [None, "none"] if family != "llada" or live_blocks else ["none", "prefix", "dual"]
    caches += ["dual"] if sub_block or family == "fast_dllm" else []
    single = sub_block is None and live_blocks is None and family == "sdar"
    editing = draw(st.sampled_from([None, None, 0.0, 0.3])) if single else None
    residual = draw(st.booleans())
    temperature = draw(st.sampled_from([0.0, 0.0, 0.8]))
    cache = draw(st.sampled_from(caches))
    guided = family == "llada" and cache == "none" and live_blocks is None
    return DecodeSettings(
        block_length=block_length,
        sub_block_length=sub_block,
        max_new_tokens=draw(st.integers(1, 14)),
        policy=policy,  # type: ignore[arg-type]
        confidence_threshold=draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])),
        entropy_bound=1.0 if policy == "entropy_bounded" else None,
        rank_by=draw(st.sampled_from(["confidence", "confidence", "entropy", "margin"])),  # type: ignore[arg-type]
        temperature=temperature,
        filtered_confidence=temperature > 0 and draw(st.booleans()),
        logits_eos_inf=draw(st.booleans()),
        confidence_eos_eot_inf=draw(st.booleans()),
        top_k=draw(st.sampled_from([None, 5])),
        top_p=draw(st.sampled_from([None, 0.9])),
        seed=draw(st.integers(0, 9)),
        stop_token_ids=draw(st.sampled_from([None, (), (91, 231)])),
        cache=cache,  # type: ignore[arg-type]
        cfg_scale=draw(st.sampled_from([0.0, 1.5])) if guided else 0.0,
        max_live_blocks=live_blocks,
        block_add_threshold=draw(st.sampled_from([0.0, 0.3, 1.0])),
        decoded_token_threshold=draw(st.sampled_from([0.0, 0.5, 1.0])),
        editing_threshold=editing,
        max_post_steps=draw(st.sampled_from([0, 2, 16])),
        compat_passes=draw(st.booleans()) and editing is None and sub_block is None and family != "fast_dllm",
        residual=residual,
        start=draw(st.sampled_from(["zero", "self", "dirichlet", "reference"])),  # type: ignore[arg-type]
        residual_temperature=draw(st.sampled_from([1.0, 1.5])),
        residual_top_k=draw(st.sampled_from([None, 16])),
        alpha=draw(st.sampled_from([None, None, "uniform", "ramp"])),  # type: ignore[arg-type]
        trace=True,
    )


prompts = st.lists(st.integers(0, 240), min_size=1, max_size=11)


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_invariants(family: str, data: st.DataObject) -> None:
    """No mask is left, the prompt and every committed token stay, each step commits something, lengths are kept."""
    s, prompt = data.draw(any_settings(family)), data.draw(prompts)
    out = decoder(family).generate([prompt], s)[0]
    done = set(range(len(prompt))) | {p for step in out.steps for p in step.committed}
    if s.max_live_blocks:  # those behind a block with a stop token are dropped
        done = {p for p in done if p < len(out.canvas_ids)}
    assert out.canvas_ids[: len(prompt)] == prompt
    assert MASK[family] not in [out.canvas_ids[p] for p in done]
    assert len(out.token_ids) <= s.max_new_tokens
    if out.finish_reason == "length":
        assert len(out.token_ids) == s.max_new_tokens
    last: dict[int, int] = {}
    for step in out.steps:
        assert set(step.committed) <= set(step.masked)
        assert step.committed or s.editing_threshold is not None or s.policy == "independent"
        assert set(step.edited) == last.keys() & set(step.committed), "only an edit changes a token"
        chosen = dict(zip(step.masked, step.argmax, strict=True))
        last |= {p: chosen[p] for p in step.committed}
    assert all(out.canvas_ids[p] == last[p] for p in done & last.keys())
    for step in out.steps:
        assert all(0.0 <= a <= 1.0 for a in step.alpha)
        if not s.residual:
            assert not any(step.alpha)


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_batched_equals_single(family: str, data: st.DataObject) -> None:
    """Requests of different lengths and settings in one batch, more of them than slots, in any order."""
    several = data.draw(st.lists(st.tuples(prompts, any_settings(family)), min_size=2, max_size=6))
    batch = decoder(family, max_batch=3).generate([p for p, _ in several], [s for _, s in several])
    for (prompt, s), together in zip(several, batch, strict=True):
        alone = decoder(family).generate([prompt], s)[0]
        assert together.token_ids == alone.token_ids
        assert together.num_forwards == alone.num_forwards


@many
@given(data=st.data())
def test_cache_and_merging_change_no_token(data: st.DataObject) -> None:
    """SDAR's block cache is exact, and a finished block may be stored with the next one's first pass."""
    s, prompt = data.draw(any_settings("sdar")), data.draw(prompts)
    s = replace(s, sub_block_length=None, editing_threshold=None)
    variants = [replace(s, cache=c, compat_passes=p) for c, p in (("none", False), ("block", False), ("block", True))]
    plain, merged, separate = (decoder("sdar").generate([prompt], v)[0] for v in variants)
    assert plain.token_ids == merged.token_ids == separate.token_ids
    assert plain.num_forwards.denoise == merged.num_forwards.denoise <= separate.num_forwards.denoise
    assert merged.num_forwards.store == 0
    if s.max_live_blocks:
        return
    assert merged.num_forwards.denoise == separate.num_forwards.denoise
    num_blocks = len({step.masked[0] // (s.block_length or 1) for step in separate.steps})
    assert separate.num_forwards.store == num_blocks


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_infill_changes_the_masks_only(family: str, data: st.DataObject) -> None:
    s = data.draw(any_settings(family))
    canvas = data.draw(st.lists(st.integers(0, 240) | st.just(MASK[family]), min_size=1, max_size=30))
    canvas[data.draw(st.integers(0, len(canvas) - 1))] = MASK[family]
    out = decoder(family).infill([canvas], s)[0]
    assert len(out.canvas_ids) == len(canvas) and MASK[family] not in out.canvas_ids
    assert all(a == b for a, b in zip(out.canvas_ids, canvas, strict=True) if b != MASK[family])
    assert out.token_ids == [a for a, b in zip(out.canvas_ids, canvas, strict=True) if b == MASK[family]]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_infilling_of_a_masked_tail(family: str) -> None:
    s = DecodeSettings(block_length=4, max_new_tokens=8, stop_token_ids=(), residual=True, start="zero")
    prompt = [3, 1, 4, 1]
    generated = decoder(family).generate([prompt], s)[0]
    assert decoder(family).infill([prompt + [MASK[family]] * 8], s)[0].canvas_ids == generated.canvas_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_change_the_second_pass_and_alpha_zero_does_not(family: str) -> None:
    s = DecodeSettings(block_length=8, max_new_tokens=16, confidence_threshold=1.0, stop_token_ids=(), trace=True)
    rcd = replace(s, residual=True, start="zero")
    plain, fed = (decoder(family).generate([[5, 6, 7]], x)[0] for x in (s, rcd))
    assert plain.steps[0].confidence == fed.steps[0].confidence, "a zero start is a plain first pass"
    assert plain.steps[1].confidence != fed.steps[1].confidence
    muted = replace(rcd, alpha="calibrated_entropy", alpha_scale=1e30)  # alpha underflows to 0
    silent = decoder(family).generate([[5, 6, 7]], muted)[0]
    assert [x.confidence for x in silent.steps] == [x.confidence for x in plain.steps], "bit for bit"


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_with_everything_kept_equals_dense(family: str) -> None:
    s = DecodeSettings(
        block_length=8, max_new_tokens=16, residual=True, start="reference", stop_token_ids=(), trace=True
    )
    dense, sparse = (decoder(family).generate([[5, 6]], x)[0] for x in (s, replace(s, residual_top_k=512)))
    assert dense.token_ids == sparse.token_ids
    np.testing.assert_allclose(dense.steps[0].alpha, sparse.steps[0].alpha, atol=1e-5)


class Remote:
    """A reference whose answers are sent as bytes."""

    def __init__(self, family: str) -> None:
        self.local = LocalReference(model(f"{family}_ref_tiny"))

    def signals(self, requests: Sequence[WarmStart]) -> list[Any]:
        answers = self.local.signals(requests)
        return [ReferenceSignals.from_bytes(s.to_bytes()) for s in answers if isinstance(s, ReferenceSignals)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["self", "reference"])
def test_remote_reference_equals_local(family: str, source: str) -> None:
    s = DecodeSettings(
        block_length=8,
        max_new_tokens=16,
        residual=True,
        start="reference",
        residual_top_k=16,
        residual_source=source,
        trace=True,  # type: ignore[arg-type]
    )
    local = decoder(family).generate([[5, 6], [7]], s)
    remote = Decoder(model(family), Remote(family)).generate([[5, 6], [7]], s)
    assert [(o.token_ids, o.steps, o.num_forwards) for o in local] == [
        (o.token_ids, o.steps, o.num_forwards) for o in remote
    ]
    passes = local[0].num_forwards.denoise - 2 * (family == "fast_dllm")  # two predict the next block's first token
    blocks = 2 if family == "llada" else 3
    assert local[0].num_forwards.reference == (passes if source == "reference" else blocks)


@pytest.mark.parametrize(
    "field",
    [
        {"block_length": 0},
        {"confidence_threshold": 1.2},
        {"temperature": float("nan")},
        {"policy": "best"},
        {"max_new_tokens": None},
        {"max_new_tokens": True},
        {"residual_temperature": 0.0},
        {"start": "warm"},
        {"seed": 1 << 63},
    ],
)
def test_a_bad_setting_is_named(field: dict[str, Any]) -> None:
    [(name, value)] = field.items()
    with pytest.raises(UserError, match=f"{name} is {value!r}"):
        DecodeSettings(**field)


def test_entropy_bounded_needs_a_bound() -> None:
    with pytest.raises(UserError, match="entropy_bound"):
        DecodeSettings(policy="entropy_bounded")


@pytest.mark.parametrize(
    ("ids", "changes", "name"),
    [
        ([], {}, "prompt is empty"),
        ([1, 511], {}, "mask token .id 511"),
        ([1, 512], {}, "token id 512"),
        ([1], {"max_new_tokens": 2000}, "max_new_tokens 2000"),
        ([1], {"cache": "dual"}, "cache is 'dual'; allowed for sdar: none, block"),
        ([1], {"denoising_steps": 9, "block_length": 4}, "denoising_steps is 9"),
        ([1], {"denoising_steps": 8193, "schedule": "time"}, "denoising_steps is 8193; it must be at most 8192"),
        ([1 << 64], {}, "token id of more than 64 bits"),
        ([1], {"stop_token_ids": (2, 512)}, "stop_token_ids holds 512; ids run from 0 to 511"),
        ([1], {"cfg_scale": 1.0}, "cfg_scale"),
        ([1], {"residual": True, "start": "reference"}, "start is 'reference'"),
        ([1], {"residual": True, "alpha": "calibrated_entropy"}, "alpha_scale"),
    ],
)
def test_a_bad_request_is_named(ids: list[int], changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        Decoder(model("sdar")).generate([ids], DecodeSettings(**{"max_new_tokens": 4, **changes}))


def test_infill_needs_a_mask() -> None:
    with pytest.raises(UserError, match="id 511"):
        decoder("sdar").infill([[1, 2]])
    assert decoder("sdar").generate([]) == []


def test_the_readme_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(GOLDEN.parents[1])
    exec((Path("rcd_core") / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.splitlines()[-1] == "length"
