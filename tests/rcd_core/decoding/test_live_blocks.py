"""Several live blocks: which are live, what they start from, refusals. Golden traces are in test_golden_live_blocks.py;
the invariants of test_decoding.py, test_engine.py, test_pages.py and test_fixed_shapes.py draw them at random too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rcd_core import Decoder, DecodeSettings, UserError
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.sampler import choose_commits
from tests.rcd_core.decoding.test_decoding import decoder, model
from tests.rcd_core.decoding.test_engine import engine, request, run

FAMILIES = ["sdar", "llada"]
SEVERAL = DecodeSettings(
    block_length=4,
    max_new_tokens=40,
    confidence_threshold=0.8,
    max_live_blocks=3,
    block_add_threshold=0.25,
    decoded_token_threshold=0.75,
    stop_token_ids=(),
    trace=True,
)
RCD = replace(SEVERAL, residual=True, start="zero")


@pytest.mark.parametrize("family", FAMILIES)
def test_live_blocks_are_neighbours_and_at_most_so_many(family: str) -> None:
    e, r = engine(family), request(family, [5, 6, 7, 8, 9], replace(SEVERAL, block_add_threshold=0.0))
    e.add(r)
    counts = set()
    while e.busy:
        e.step()
        counts.add(len(r.live))
        assert [b.index for b in r.live] == list(range(r.live[0].index, r.live[-1].index + 1))
        assert r.live[0].activated and r.live[-1].end - r.live[0].start <= 12
        assert not (r.canvas[r.num_prompt : r.block[0]] == r.model.mask_token_id).any()
    assert counts == {1, 2, 3}
    assert r.forwards.prefill == r.forwards.store == 0


@pytest.mark.parametrize(("live", "committed"), [(None, [0, 1, 3]), (2, [1])])
def test_d2f_commits_above_the_threshold_only(live: int | None, committed: list[int]) -> None:
    """LLaDA's plain decoding, as Fast-dLLM's, commits at the threshold too."""
    r = request("llada", [5], replace(SEVERAL, confidence_threshold=0.5, max_live_blocks=live))
    masked, unused = MaskedPositions.of(r.live), np.zeros(4)
    commit = choose_commits(masked, np.array([0.5, 0.9, 0.1, 0.5]), unused, unused)
    assert np.flatnonzero(commit).tolist() == committed


def test_one_live_block_is_plain_decoding_without_a_prefill() -> None:
    """SDAR. Exact, but for the prompt, which shares the first pass."""
    prompt = list(range(20, 31))
    plain, one = (decoder("sdar").generate([prompt], replace(SEVERAL, max_live_blocks=n))[0] for n in (None, 1))
    assert one.token_ids == plain.token_ids
    assert [s.committed for s in one.steps] == [s.committed for s in plain.steps]
    assert (plain.num_forwards.prefill, one.num_forwards.prefill) == (1, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["zero", "reference", "self", "dirichlet"])
def test_every_block_has_its_own_start(family: str, start: Any) -> None:
    """The reference is asked once for each block, when it is added; a start from itself takes a pass of the block."""
    s = replace(RCD, start=start)
    out = decoder(family).generate([[5, 6]], s)[0]
    first_alpha: dict[int, float] = {}
    for step in out.steps:
        first_alpha = {**dict(zip(step.masked, step.alpha, strict=True)), **first_alpha}
    blocks = decoder(family).check([5, 6], s).blocks
    assert set(first_alpha) >= set(range(2, 42))
    assert all((alpha > 0) == (start != "zero") for alpha in first_alpha.values())
    assert out.num_forwards.reference == (len(blocks) if start == "reference" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_token_ends_the_answer_when_all_before_it_is_final(family: str) -> None:
    """No block is added once a stop token is committed. The authors' code goes on with those behind it."""
    whole = decoder(family).generate([[5, 6, 7]], SEVERAL)[0]
    stop = whole.token_ids[13]
    at = whole.token_ids.index(stop)
    ours, authors = (
        decoder(family).generate([[5, 6, 7]], replace(SEVERAL, stop_token_ids=(stop,), compat_passes=c))[0]
        for c in (False, True)
    )
    assert ours.token_ids == authors.token_ids == whole.token_ids[:at]
    assert ours.finish_reason == authors.finish_reason == "stop"
    assert ours.num_forwards.total <= authors.num_forwards.total < whole.num_forwards.total
    assert model(family).mask_token_id not in ours.canvas_ids + authors.canvas_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("s", [SEVERAL, RCD], ids=["seqd", "rcd"])
def test_a_preempted_request_ends_with_the_same_tokens(family: str, s: DecodeSettings) -> None:
    """It starts again where a block was alone: what follows depends on how far the blocks before it were."""
    e = engine(family, num_pages=4)
    requests = [request(family, [n, 7, 8], s) for n in (5, 6)]
    preempt, live = e._preempt, []
    e._preempt = lambda r: (live.append(len(r.live)), preempt(r))[1]  # type: ignore[method-assign]
    outputs = run(e, *requests)
    assert max(live) > 1
    for r, out in zip(requests, outputs, strict=True):
        alone = decoder(family).generate([r.canvas[:3].tolist()], s)[0]
        assert out.token_ids == alone.token_ids
        assert [step.committed for step in out.steps] == [step.committed for step in alone.steps]
        assert out.num_forwards == alone.num_forwards


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("live", [1, 3])
def test_a_request_resumes_only_if_each_block_was_alone(family: str, live: int) -> None:
    """With several live blocks it starts again, because they depend on how far those before them were."""
    s = replace(SEVERAL, max_live_blocks=live, block_add_threshold=0.0)
    prompt = list(range(20, 28))
    whole = decoder(family).generate([prompt], s)[0].token_ids
    rest = make_sequence(model(family), prompt, s, infill=False, has_reference=False, committed=whole[:8])
    assert rest.block[0] == (16 if live == 1 else 8)
    assert run(engine(family), rest)[0].token_ids == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_infill_with_given_blocks_between(family: str) -> None:
    """Blocks without masks are seen by those behind them, and count as part of the span."""
    mask = model(family).mask_token_id
    canvas = [3, mask, mask, mask, *range(10, 14), *[mask] * 6, 20, 21, *[mask] * 3]
    s = replace(SEVERAL, confidence_threshold=1.0)
    filled = decoder(family).infill([canvas], s)[0]
    cached, plain = (decoder(family).infill([canvas], replace(s, cache=c))[0] for c in ("block", "none"))  # type: ignore[arg-type]
    assert filled.canvas_ids == cached.canvas_ids == plain.canvas_ids
    assert [i for i, (a, b) in enumerate(zip(canvas, filled.canvas_ids, strict=True)) if a != b] == [
        i for i, a in enumerate(canvas) if a == mask
    ]
    alone = decoder(family).infill([canvas], replace(s, max_live_blocks=1))[0]
    assert filled.num_forwards.denoise < alone.num_forwards.denoise


def test_a_llada_prompt_is_not_shared() -> None:
    """All of it sees all of it, so none of it can be taken from another prompt."""
    e = engine("llada", reuse_prefixes=True, max_length=128)
    for end in (50, 60):
        run(e, request("llada", [*range(10, 42), end], SEVERAL))
    assert e.statistics.reused_tokens == 0


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    """SDAR: what is left of it after whole chunks shares the first pass."""
    prompt, s = list(range(100, 150)), replace(SEVERAL, block_add_threshold=0.0)
    chunked = request("sdar", prompt, s)
    run(engine("sdar", prefill_chunk=19, max_length=96), chunked)
    assert chunked.forwards.prefill == 2
    assert chunked.output().token_ids == decoder("sdar").generate([prompt], s)[0].token_ids


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("sdar", {"max_live_blocks": 0}, "max_live_blocks is 0"),
        ("sdar", {"block_add_threshold": 1.1}, "block_add_threshold is 1.1"),
        ("sdar", {"decoded_token_threshold": 1.1}, "decoded_token_threshold is 1.1"),
        ("sdar", {"decoded_token_threshold": None}, "decoded_token_threshold is None"),
        ("sdar", {"policy": "sequential"}, "policy is 'sequential'"),
        ("llada", {"cache": "dual"}, "cache is 'dual'; allowed for llada with max_live_blocks: none, block"),
        ("llada", {"cache": "none", "cfg_scale": 1.0}, "cfg_scale is 1.0"),
        ("llada", {"residual": True, "residual_scope": "all_masked"}, "residual_scope is 'all_masked'"),
    ],
)
def test_what_makes_no_sense_is_refused(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Decoder(model(family)).check([1], replace(SEVERAL, **changes))
