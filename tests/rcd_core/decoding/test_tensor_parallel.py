"""A model that is split over several processes decodes what one process decodes.

The tests of several ranks run in processes of one gloo group: rank 0 compares with the whole model, the others follow.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rcd_core import Decoder, DecodeSettings, LocalReference, UserError, WarmStart, load_model
from rcd_core.alpha import LearnedAlpha
from rcd_core.decode_settings import AlphaRule
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.memory import engine_memory
from rcd_core.decoding.reference import Reference
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.tensor_parallel import LeadingEngine, follow, make_reference, release
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.ranks import ProcessRanks, Ranks
from rcd_core.signals import Signals
from tests.rcd_core.decoding.test_decoding import any_settings, prompts
from tests.rcd_core.training.helpers import GOLDEN, spawn

FAMILIES = ("sdar", "llada")
OTHERS = (
    *("sdar_moe/sdar_moe_tiny", "llada2/llada2_tiny", "llada_moe/llada_moe_tiny", "dream/dream_tiny"),
    *("fastdllm_v2/fastdllm_v2_tiny", "a2d/qwen3_tiny", "llada_moe/llada_moe_tiny_options"),
)
PROMPTS = [[11, 12, 13, 14, 15], [7], [3, 1, 4]]
RCD = DecodeSettings(block_length=4, max_new_tokens=12, confidence_threshold=0.6, residual=True, trace=True, seed=3)


def load(name: str, ranks: Ranks, dtype: torch.dtype = torch.float64) -> DiffusionModel:
    """With a learned alpha that is not its initial value."""
    model = load_model(GOLDEN / (f"rcd/{name}" if "ref" in name else f"{name}_tiny"), dtype=dtype, ranks=ranks)
    model.learned_alpha = LearnedAlpha().to(dtype)
    torch.nn.init.constant_(model.learned_alpha.out.weight, 0.3)
    return model


# -- several ranks


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.drill)])
def test_ranks_decode_what_one_process_decodes(size: int) -> None:
    spawn(_compare, size, size)


def _compare(rank: int, size: int) -> None:
    ranks = ProcessRanks(rank, size, "cpu")
    for family in FAMILIES:
        for check in CHECKS:
            dtype = torch.float32 if check is _single_precision else torch.float64
            model = load(family, ranks, dtype)
            reference = _reference(check, family, ranks)
            if rank:
                follow(model, reference)
            else:
                whole = load(family, Ranks(), dtype)
                check(whole, model, reference)
                release(model)
    for path in OTHERS:
        fields = {"mask_token_id": 255} if "a2d" in path else {}
        model = load_model(GOLDEN / path, dtype=torch.float64, ranks=ranks, fields=fields)
        if rank:
            follow(model)
        else:
            plain, zero = replace(RCD, residual=False), replace(RCD, start="zero")
            whole = load_model(GOLDEN / path, dtype=torch.float64, fields=fields)
            _same(Decoder(whole), Decoder(model), PROMPTS, [zero, zero, plain], atol=1e-6)  # routers compute in fp32
            assert model.num_parameters() == whole.num_parameters()
            release(model)


def _reference(check: Callable[..., None], family: str, ranks: Ranks) -> LocalReference | None:
    if check is _any_settings:  # each rank has a whole one
        return LocalReference(load(f"{family}_ref_tiny", Ranks()))
    return LocalReference(load(family, ranks)) if check is _split_reference else None


def _same(whole: Decoder, split: Decoder, inputs: list[list[int]], s: list[DecodeSettings], atol: float = 1e-9) -> None:
    for want, got in zip(whole.generate(inputs, s), split.generate(inputs, s), strict=True):
        assert got.token_ids == want.token_ids and got.num_forwards == want.num_forwards, want.settings
        for a, b in zip(want.steps, got.steps, strict=True):
            assert a.committed == b.committed
            for name in ("confidence", "entropy", "alpha"):
                np.testing.assert_allclose(getattr(b, name), getattr(a, name), atol=atol, rtol=0)


def _any_settings(whole: DiffusionModel, split: DiffusionModel, reference: Reference) -> None:
    local = LocalReference(load(f"{whole.family}_ref_tiny", Ranks()))
    pair = Decoder(whole, local, max_batch=3), Decoder(split, reference, max_batch=3)

    @settings(max_examples=3, phases=[Phase.generate], deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(st.tuples(prompts, any_settings(whole.family)), min_size=2, max_size=5))
    def check(several: list[tuple[list[int], DecodeSettings]]) -> None:
        _same(*pair, [p for p, _ in several], [s for _, s in several])

    check()


def _rules(whole: DiffusionModel, split: DiffusionModel, reference: None) -> None:
    """Every rule of alpha, with dense and sparse residuals, at one temperature and at two; guidance; filters."""
    one = [replace(RCD, alpha=rule, alpha_scale=3.0, start="self") for rule in get_args(AlphaRule)]
    several = one + [replace(s, residual_top_k=8, residual_temperature=1.5, start="dirichlet") for s in one]
    several += [replace(s, residual_temperature=0.7, temperature=0.9, top_k=20, top_p=0.8) for s in one[:3]]
    if whole.family == "llada":
        several += [replace(RCD, cfg_scale=1.5, start="zero")]
    _same(Decoder(whole), Decoder(split), [PROMPTS[i % 3] for i in range(len(several))], several)


def _single_precision(whole: DiffusionModel, split: DiffusionModel, reference: None) -> None:
    """Up to rounding."""
    s = [replace(RCD, start="self"), replace(RCD, residual=False), replace(RCD, start="self", residual_top_k=8)]
    _same(Decoder(whole), Decoder(split), PROMPTS, s, atol=1e-3)


def _split_reference(whole: DiffusionModel, split: DiffusionModel, reference: Reference) -> None:
    local = LocalReference(load(whole.family, Ranks()))
    s = [replace(RCD, start="reference", residual_top_k=k, residual_temperature=t) for k, t in ((8, 1), (None, 1.5))]
    s += [replace(RCD, start="reference", residual_source="reference", residual_top_k=8, alpha="top1")]
    _same(Decoder(whole, local), Decoder(split, reference), PROMPTS, s)


def _served_reference(whole: DiffusionModel, split: DiffusionModel, reference: None) -> None:
    """Rank 0's reference answers by itself, from few contexts; a prediction that is not finite fails one call only."""
    mask = whole.mask_token_id
    local, served = LocalReference(whole, 2, 32), make_reference(split, 2, 32)
    asked = [WarmStart((3, 4 + i, 5, 6, *[mask] * 4), (4, 5, 6, 7), 4, top_k=8) for i in range(3)]
    longer = [replace(asked[0], canvas_ids=(3, 4, 5, 6, 7, 8, 9, 10, *[mask] * 4), positions=(8, 9, 10, 11))]
    for requests in (asked, asked[:1], longer):
        for want, got in zip(local.signals(requests), served.signals(requests), strict=True):
            assert torch.equal(got.topk_ids, want.topk_ids)
            torch.testing.assert_close(got.entropy, want.entropy, atol=1e-9, rtol=0)
    assert served.reused_tokens == local.reused_tokens
    with pytest.raises(UserError):
        served.signals([replace(asked[0], top_k=0)])
    assert torch.equal(served.signals(longer)[0].topk_ids, local.signals(longer)[0].topk_ids)


class Remote:
    """An AsyncReference whose answers arrive at any time."""

    def __init__(self, model: DiffusionModel) -> None:
        self.local, self.threads = LocalReference(model), ThreadPoolExecutor(1)

    def submit(self, requests: list[WarmStart]) -> list[Future[Signals]]:
        return [self.threads.submit(lambda r: self.local.signals([r])[0], request) for request in requests]


def _remote_reference(whole: DiffusionModel, split: DiffusionModel, reference: None) -> None:
    """Rank 0 alone asks it, and the others take its answers."""
    model = load(whole.family, Ranks())
    s = [replace(RCD, start="reference", residual_top_k=8), replace(RCD, start="self")]
    _same(Decoder(whole, LocalReference(model)), Decoder(split, Remote(model)), PROMPTS[:2], s)  # type: ignore[arg-type]


def _engine(whole: DiffusionModel, split: DiffusionModel, reference: None) -> None:
    """Requests that join, leave, share prefixes, report logprobs, and give up their pages."""
    engines = [kind(model, None, max_batch=3, max_length=64, reuse_prefixes=True, num_pages=6)
               for kind, model in ((Engine, whole), (LeadingEngine, split))]  # fmt: skip
    results = []
    for engine in engines:
        make = partial(make_sequence, engine.model, infill=False, has_reference=False, num_logprobs=2)
        first = [make([*range(17), i], replace(RCD, start="zero", max_new_tokens=20)) for i in range(4)]
        for s in first:
            engine.add(s)
        engine.step()
        engine.step()
        engine.cancel(first[1])
        late = make(list(range(20)), replace(RCD, start="self"))
        engine.add(late)
        while engine.busy:
            engine.step()
        results.append([(s.output().token_ids, sorted(s.logprobs)) for s in (first[0], *first[2:], late)])
    assert results[0] == results[1]
    assert engines[0].statistics.preempted == engines[1].statistics.preempted > 0
    assert engines[0].statistics.reused_tokens == engines[1].statistics.reused_tokens


CHECKS: tuple[Callable[..., None], ...] = (
    *(_any_settings, _rules, _single_precision),
    *(_split_reference, _served_reference, _remote_reference, _engine),
)


# -- one rank alone


class Part(Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_holds_its_share(family: str) -> None:
    whole = load_model(GOLDEN / f"{family}_tiny")
    parts = [load_model(GOLDEN / f"{family}_tiny", ranks=Part(rank, 2)) for rank in range(2)]
    assert all(part.num_parameters() == whole.num_parameters() for part in parts)
    own = sum(p.numel() for p in parts[0].parameters())
    assert own < 0.51 * whole.num_parameters()
    rows = torch.cat([part.embedding.weight for part in parts])
    assert torch.equal(rows, whole.embedding.weight)
    plans = [engine_memory(model, 8, 64, 4) for model in (whole, parts[0])]
    assert plans[1].cache == plans[0].cache // 2


def test_a_vocabulary_that_does_not_divide_is_covered() -> None:
    ids = [Part(rank, 4).vocabulary(10) for rank in range(4)]
    assert [i for part in ids for i in part] == list(range(10))


@pytest.mark.parametrize(("size", "what"), [(3, "attention heads"), (8, "attention heads"), (600, "ids")])
def test_sizes_that_do_not_divide_are_named(size: int, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"tensor_parallel is {size}.*{what}"):
        load_model(GOLDEN / "sdar_tiny", ranks=Part(0, size))


def test_after_a_failed_step_no_engine_is_made() -> None:
    model: Any = load_model(GOLDEN / "sdar_tiny", ranks=Ranks())
    engine = LeadingEngine(model, None, max_batch=1, max_length=32)
    engine.add(make_sequence(model, [1], DecodeSettings(max_new_tokens=4), infill=False, has_reference=False))
    model.backbone.lm_head.weight = None
    with pytest.raises(Exception, match=r"."):
        while True:
            engine.step()
    with pytest.raises(RuntimeError):
        LeadingEngine(model, None, max_batch=1, max_length=32)
