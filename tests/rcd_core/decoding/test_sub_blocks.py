"""Sub-blocks and next tokens, with residuals, against a plain loop over the whole canvas. Golden traces are in
tests/rcd_core/families/test_golden_fast_dllm.py; the invariants of test_decoding.py, test_engine.py and test_pages.py
draw sub-blocks at random too."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from rcd_core import Decoder, DecodeSettings, UserError
from rcd_core.attention.layouts import block_causal
from rcd_core.families.base import DiffusionModel
from tests.rcd_core.decoding.test_decoding import MASK
from tests.rcd_core.decoding.test_decoding import model as fp32
from tests.rcd_core.decoding.test_engine import engine, request, run
from tests.rcd_core.golden_models import load_fp64

BLOCK, SUB = 8, 4
PLAIN = DecodeSettings(
    block_length=BLOCK,
    sub_block_length=SUB,
    max_new_tokens=24,
    confidence_threshold=0.4,
    stop_token_ids=(),
    trace=True,
)
RCD = replace(PLAIN, residual=True, start="zero", residual_temperature=1.5)
PROMPTS = [[3, 1, 4, 1, 5], list(range(20, 28)), list(range(40, 56)), [7]]  # two of whole blocks


@cache
def model(family: str) -> DiffusionModel:
    if family == "sdar":
        return load_fp64("sdar_tiny")
    return load_fp64("fastdllm_v2/fastdllm_v2_tiny")


@torch.no_grad()
def plain_loop(family: str, prompt: list[int], s: DecodeSettings) -> list[int]:
    """Every pass over the whole canvas up to the block's end, with the residual of Eq. 2 and 3."""
    m, mask, shift = model(family), MASK[family], int(family == "fast_dllm")
    ids = torch.tensor(prompt)
    table, threshold = m.embedding.weight, s.confidence_threshold

    def forward(ids: torch.Tensor, alpha: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        embeds = torch.lerp(table[ids], delta, alpha[:, None])[None]
        positions = torch.arange(len(ids))[None]
        layout = block_causal(positions, torch.tensor([len(ids)]), len(ids), torch.tensor([BLOCK]))
        return torch.softmax(m.head(m.hidden(embeds, positions, layout))[0], -1)

    while len(ids) < len(prompt) + s.max_new_tokens:
        if shift and len(ids) % BLOCK == 0:
            p = forward(ids, torch.zeros(len(ids)).double(), table[ids])
            ids = torch.cat([ids, p[-1].argmax()[None]])
        end = (len(ids) // BLOCK + 1) * BLOCK
        ids = torch.cat([ids, torch.full((end - len(ids),), mask)])
        alpha, delta = torch.zeros(end).double(), table[ids]
        while (ids == mask).any():
            p = forward(ids, alpha, torch.where((ids == mask)[:, None], delta, table[ids]))
            p = torch.cat([p[:shift], p[: len(p) - shift]])
            tokens = p.argmax(-1)  # the tiny models never predict the mask
            confidence = p.amax(-1)
            masked = (ids == mask).nonzero()[:, 0]
            inside = masked[masked < (int(masked[0]) // SUB + 1) * SUB]
            if s.residual:
                t = s.residual_temperature or 1.0
                tempered = p ** (1 / t) / (p ** (1 / t)).sum(-1, keepdim=True)
                entropy = -torch.special.xlogy(tempered, tempered).sum(-1)
                alpha, delta = entropy / torch.log(torch.tensor(m.vocab_size).double()), p @ table
            chosen = inside[confidence[inside] > threshold]
            if not len(chosen):
                chosen = inside[confidence[inside].argmax()][None]
            ids[chosen] = tokens[chosen]
            alpha = torch.where(ids == mask, alpha, 0.0)
    return [int(i) for i in ids[len(prompt) :][: s.max_new_tokens]]


@pytest.mark.parametrize("s", [PLAIN, RCD], ids=["plain", "residual"])
@pytest.mark.parametrize("family", ["sdar", "fast_dllm"])
def test_decoding_equals_the_plain_loop(family: str, s: DecodeSettings) -> None:
    """With and without the cache of blocks. A prompt of whole blocks is not lost."""
    for cache_mode in ("block", "none"):
        outs = Decoder(model(family)).generate(PROMPTS, replace(s, cache=cache_mode))  # type: ignore[arg-type]
        for prompt, out in zip(PROMPTS, outs, strict=True):
            assert out.token_ids == plain_loop(family, prompt, s)


def test_the_first_pass_of_a_block_predicts_its_first_token_alone() -> None:
    out = Decoder(model("fast_dllm")).generate([PROMPTS[2]], RCD)[0]
    firsts = [step for step in out.steps if step.committed == [16]]
    assert [step.masked for step in firsts] == [[16]] and firsts[0].alpha == [0.0]
    assert out.steps[0] is firsts[0] and out.num_forwards.prefill == 0  # the pass over the prompt predicts it


def test_residuals_pass_from_one_sub_block_to_the_next() -> None:
    """The second sub-block's first pass has residuals, the first one's has none."""
    out = Decoder(model("sdar")).generate([[7] * 8], RCD)[0]
    by_sub_block = {number: [s for s in out.steps if s.masked[0] // SUB == number] for number in (2, 3)}
    assert not any(by_sub_block[2][0].alpha) and all(by_sub_block[3][0].alpha)
    sliced = Decoder(model("sdar")).generate([[7] * 8], replace(RCD, cache="dual"))[0]
    first = next(s for s in sliced.steps if s.masked[0] // SUB == 3)
    assert not any(first.alpha)


def test_a_stop_token_ends_the_request_when_nothing_before_it_is_masked() -> None:
    prompt, tried = PROMPTS[0], 0
    whole = Decoder(model("fast_dllm")).generate([prompt], PLAIN)[0]
    masked = set(range(len(prompt), len(whole.canvas_ids)))
    for number, step in enumerate(whole.steps[:-1]):
        masked -= set(step.committed)
        last = min(masked) - 1  # the last final position after this pass
        stop = whole.canvas_ids[last]
        if (last + 1) % SUB and last >= len(prompt) and stop not in whole.canvas_ids[len(prompt) : last]:
            out = Decoder(model("fast_dllm")).generate([prompt], replace(PLAIN, stop_token_ids=(stop,)))[0]
            assert out.finish_reason == "stop" and out.token_ids == whole.token_ids[: last - len(prompt)]
            assert len(out.steps) <= number + 1 and MASK["fast_dllm"] not in out.canvas_ids
            tried += 1
    assert tried, "no token in the middle of a sub-block"


def test_a_shared_prefix_leaves_the_row_that_predicts_the_next_token() -> None:
    """The prompt is a whole number of blocks and of pages, and stands in the cache already."""
    prompt = list(range(40, 72))
    e = engine("fast_dllm", reuse_prefixes=True)
    alone, first, again = (run(one, request("fast_dllm", prompt, RCD))[0] for one in (engine("fast_dllm"), e, e))
    assert e.statistics.reused_tokens > 0
    assert again.token_ids == first.token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("sdar", {"sub_block_length": 3}, "sub_block_length is 3"),
        ("llada", {}, "sub_block_length is 4"),
        ("sdar", {"max_live_blocks": 2}, "sub_block_length is 4"),
        ("sdar", {"compat_passes": True}, "compat_passes is true"),
        ("fast_dllm", {"sub_block_length": None, "max_live_blocks": 2}, "max_live_blocks is 2"),
        ("fast_dllm", {"cache": "prefix"}, "cache is 'prefix'"),
        ("sdar", {"sub_block_length": None, "cache": "dual"}, "cache is 'dual'"),
    ],
)
def test_what_makes_no_sense_is_refused(family: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=field):
        request(family, [1, 2], replace(PLAIN, **changes))


def test_sub_blocks_of_a_whole_block_change_nothing() -> None:
    whole = replace(RCD, sub_block_length=None)
    for prompt in PROMPTS:
        one, other = (
            Decoder(fp32("sdar")).generate([prompt], s)[0] for s in (whole, replace(whole, sub_block_length=BLOCK))
        )
        assert one.token_ids == other.token_ids and one.steps == other.steps
