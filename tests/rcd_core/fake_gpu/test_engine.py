"""Every path of the engine on a fake GPU. Faults D1, D3, D4, D6, D7 and D8 of the engine before have their tests
here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rcd_core import DecodeSettings, LocalReference
from rcd_core.attention import paged_backends
from rcd_core.decoding.cuda_graphs import GraphCache
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.observer import Observed
from rcd_core.decoding.request import make_sequence
from tests.benchmarks.operations import one_pass
from tests.rcd_core.fake_gpu.device import FakeGpu
from tests.rcd_core.fake_gpu.flash_attn_stub import flash_attn_stub
from tests.rcd_core.fake_gpu.models import VOCAB, fake_checkpoint, fake_model

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")
MASK = VOCAB - 1
S = DecodeSettings(block_length=4, max_new_tokens=5, denoising_steps=2, stop_token_ids=(), seed=1)
R = replace(S, residual=True, start="zero")
DRAWN = replace(S, temperature=0.8)

SDAR = {
    "greedy": S,
    "static": replace(S, policy="low_confidence_static"),
    "entropy": replace(S, policy="entropy_bounded", entropy_bound=0.5),
    "random": replace(S, policy="random", trace=True),
    "drawn": DRAWN,
    "filtered": replace(DRAWN, top_k=50, top_p=0.9),
    "filtered confidence": replace(DRAWN, top_k=50, top_p=0.9, filtered_confidence=True),
    "uncached": replace(S, cache="none"),
    "store passes": replace(S, compat_passes=True),
    "dense": R,
    "dense, T_res": replace(R, residual_temperature=1.4, delta_temperature="residual", trace=True),
    "sparse": replace(R, residual_top_k=32),
    "sparse, T_res": replace(R, residual_top_k=32, residual_temperature=1.4),
    "sparse and drawn": replace(R, residual_top_k=32, temperature=0.8, top_p=0.9),
    "learned": replace(R, alpha="learned"),
    "uniform": replace(R, alpha="uniform"),
    "ramp": replace(R, alpha="ramp"),
    "top1": replace(R, alpha="top1"),
    "self": replace(R, start="self"),
    "dirichlet": replace(R, start="dirichlet"),
    "reference": replace(R, start="reference"),
    "sparse reference": replace(R, start="reference", residual_top_k=32),
    "reference in each pass": replace(R, residual_source="reference", residual_top_k=32),
    "editing": replace(R, editing_threshold=0.5),
    "loopholing": R,
}
LLADA = {
    "greedy": S,
    "prefix": replace(S, cache="prefix"),
    "dual": replace(S, cache="dual"),
    "guided": replace(S, cfg_scale=0.5),
    "guided and drawn": replace(S, cfg_scale=0.5, temperature=0.8),
    "no eos": replace(S, logits_eos_inf=True),
    "eos last": replace(S, confidence_eos_eot_inf=True),
    "dense": R,
    "all masked": replace(R, residual_scope="all_masked"),
    "loopholing": R,
    "reference": replace(R, start="reference"),
}
CASES = [*(("sdar", name, "tables") for name in SDAR), *(("llada", name, "tables") for name in LLADA)]
CASES += [(family, "dense", attention) for family in ("sdar", "llada") for attention in ("lanes", "flash", "sdpa")]
CASES += [("llada", "prefix", "sdpa"), ("sdar", "reference", "lanes")]


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with FakeGpu() as entered:
        yield entered


def use(attention: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine's `attention` for one of CASES."""
    if attention == "lanes":  # as where the kernel follows no page table
        refusal = paged_backends._refusal
        monkeypatch.setattr(
            paged_backends, "_refusal", lambda b, *more: refusal(b, *more) if b.needs_lanes else "no page tables"
        )
    if attention == "flash":
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_stub())
    return {"tables": "varlen", "lanes": "varlen"}.get(attention, attention)


def requests(model: Any, s: DecodeSettings, lengths: tuple[int, ...] = (2, 9), **options: Any) -> list[Any]:
    """One prompt is shorter than a block."""
    prompts = [np.random.default_rng(n).integers(1, 1000, n).tolist() for n in lengths]
    return [make_sequence(model, p, s, infill=False, has_reference=True, **options) for p in prompts]


def run(gpu: FakeGpu, engine: Engine, several: list[Any]) -> list[list[str]]:
    """What the host waited for in each step."""
    for request in several:
        engine.add(request)
    steps = []
    while engine.busy:
        before = len(gpu.syncs)
        engine.step()
        steps.append(gpu.syncs[before:])
    assert all(r.finished and r.error is None for r in several)
    return steps


def uncaptured(engine: Engine) -> list[int]:
    """Grows by the tokens of each pass that is not captured."""
    forward, found = engine._runner.forward, []
    inner = forward.hidden

    def hidden(packed: Any, at: Any = None) -> Any:
        found.append(packed.shape.tokens)
        return inner(packed, at)

    forward.hidden = hidden  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(("family", "name", "attention"), CASES, ids=[", ".join(case) for case in CASES])
def test_decoding(family: str, name: str, attention: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mixed devices or dtypes, no wait inside a capture, and one copy to the host in a step."""
    model = fake_model(gpu, family, layers=1, loophole=name == "loopholing")
    s = (SDAR if family == "sdar" else LLADA)[name]
    reference = (
        LocalReference(fake_model(gpu, family, layers=1)) if "reference" in (s.start, s.residual_source) else None
    )
    engine = Engine(model, reference, max_batch=4, max_length=64, attention=use(attention, monkeypatch))
    assert engine._runner.fixed_shapes == (attention != "sdpa")
    alone = uncaptured(engine)
    steps = run(gpu, engine, requests(model, s))
    if attention != "sdpa" and not s.cfg_scale:
        assert gpu.captures and not alone
    of_references = 3 if reference is not None else 0  # whether its predictions are finite, and those of `mixture`
    most = 1 + s.trace + of_references * 3
    assert max(map(len, steps)) <= most, steps


def test_what_needs_the_host_does_not_switch_captures_off_for_others(gpu: FakeGpu) -> None:
    """D1 and D3: a prefill, a drawn and a greedy request, residuals of different kinds, a prompt shorter than a block,
    logprobs and an observer, in one batch. Then each alone, on the graphs of the whole batch."""
    model, seen = fake_model(gpu, layers=1), []
    observer: Any = lambda step: seen.append(step)  # noqa: E731
    engine = Engine(model, None, max_batch=8, max_length=64, attention="varlen", observer=observer)
    alone = uncaptured(engine)
    kinds = [S, DRAWN, SDAR["filtered"], R, SDAR["sparse"], SDAR["learned"]]
    several = [request for i, s in enumerate(kinds) for request in requests(model, s, (2 + 7 * i,))]
    several += requests(model, S, (30,), num_logprobs=3)
    run(gpu, engine, several)
    assert not alone and isinstance(seen[0], Observed) and several[-1].logprobs
    for s in kinds:
        run(gpu, engine, requests(model, s, (2,)))
    assert not alone


def test_infill(gpu: FakeGpu) -> None:
    model = fake_model(gpu, layers=1)
    engine = Engine(model, None, max_batch=4, max_length=64, attention="varlen")
    canvases = [[5] * 3 + [MASK] * 7, [MASK, 4, MASK, 6, 7]]
    several = [make_sequence(model, c, R, infill=True, has_reference=False) for c in canvases]
    assert all(step == ["copy to cpu"] for step in run(gpu, engine, several))


def test_a_wait_inside_a_capture_is_found(gpu: FakeGpu) -> None:
    from tests.rcd_core.fake_gpu.device import FakeGraph, FreedInput, HostSync

    x = torch.ones(4, device="cuda")
    for wait in (
        lambda: bool(x.sum() > 0),
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.cpu(),
        lambda: torch.from_numpy(np.ones(3)).to(x.device),
    ):
        with pytest.raises(HostSync), gpu.capture(FakeGraph()):
            wait()
    with pytest.raises(RuntimeError, match="device"):
        x + torch.ones(4)
    graph, y = FakeGraph(), torch.ones(4, device="cuda")
    with gpu.capture(graph):
        x + y
    graph.replay()
    del y
    with pytest.raises(FreedInput):
        graph.replay()


def test_few_graphs_in_a_run_of_128_requests_in_blocks_of_64(gpu: FakeGpu) -> None:
    """D4: at most 12 keys of one kind, with prompts of many lengths and blocks that end at different times."""
    model = fake_model(gpu, layers=1)
    engine = Engine(model, None, max_batch=128, max_length=384, attention="varlen")
    engine._runner.graphs = graphs = Keys()
    for n in np.random.default_rng(0).integers(1, 250, 140):
        s = replace(R, block_length=64, max_new_tokens=32 + int(n) // 4, denoising_steps=3 + int(n) % 10)
        engine.add(requests(model, replace(s, policy="low_confidence_static"), (int(n),))[0])
    while engine.busy:
        engine.step()
    of_layers = {key for key in graphs.seen if key[0] == "layers"}
    assert len(of_layers) <= 12 and len(graphs.seen - of_layers) <= 12, sorted(map(str, graphs.seen))


def test_rows_of_many_lengths_share_few_graphs(gpu: FakeGpu) -> None:
    model = fake_model(gpu, layers=1)
    engine = Engine(model, None, max_batch=4, max_length=256, attention="varlen")
    engine._runner.graphs = graphs = Keys()
    for n in range(20, 200, 5):
        s = replace(S, block_length=n, denoising_steps=1)
        run(gpu, engine, [make_sequence(model, [MASK] * n, s, infill=True, has_reference=False)])
    assert len([key for key in graphs.seen if key[0] == "layers"]) <= 8


def test_attention_copies_no_pages(gpu: FakeGpu) -> None:
    """D6: no operation makes a tensor of the size of a request's pages, so none is gathered."""
    model = fake_model(gpu, layers=1)
    engine = Engine(model, None, max_batch=4, max_length=4096, attention="varlen")
    engine.add(requests(model, S, (3000,))[0])
    while not engine.running or engine.running[0].stored < 2996:
        engine.step()  # the prompt
    engine._runner.sampler._tile = lambda kind, n, *_: torch.zeros(3, n.shape[1], device="cuda")  # type: ignore
    gpu.largest = 0
    engine.step()
    assert 0 < gpu.largest < 64 * model.config.intermediate_size < 3000 * 2 * 64


def test_random_starts_are_made_on_the_device(gpu: FakeGpu) -> None:
    """D7: a start from "dirichlet" sends keys to the device, not V numbers for each position; draws likewise."""
    model = fake_model(gpu, layers=1)
    for name in ("dirichlet", "filtered"):
        engine = Engine(model, None, max_batch=4, max_length=64, attention="varlen")
        gpu.copied = 0
        steps = run(gpu, engine, requests(model, SDAR[name], (2,)))
        assert 0 < gpu.copied < 50_000 * len(steps) < 8 * VOCAB * len(steps)


@pytest.mark.parametrize("attention", ["tables", "lanes", "flash"])
def test_operations_of_a_layer(attention: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """D8: at most 20 in a decoding pass; views start nothing on the device."""
    engine_attention = use(attention, monkeypatch)
    few, more = (one_pass(fake_model(gpu, layers=n), gpu.counting(), engine_attention) for n in (1, 2))
    calls = more - few
    assert sum(calls.values()) <= 20, calls


class Keys(GraphCache):
    """Of passes of fixed shape, which are not run: all predictions are the same."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"))
        self.seen: set[Any] = set()

    def __call__(self, key: Any, *_: Any) -> torch.Tensor:
        self.seen.add(key)
        return torch.zeros(3, key[-1] if key[0] == "head" else 1, device="cuda")


@pytest.mark.parametrize(
    "name",
    ["sdar_moe/sdar_moe_tiny", "llada2/llada2_tiny", "llada_moe/llada_moe_tiny", "llada_moe/llada_moe_tiny_options"],
)
def test_experts_run_inside_captures(name: str, gpu: FakeGpu) -> None:
    """Which experts a token meets is known to the device only."""
    model = fake_checkpoint(gpu, name)
    for s in (S, R):
        engine = Engine(model, None, max_batch=4, max_length=64)
        alone = uncaptured(engine)
        steps = run(gpu, engine, requests(model, s))
        assert gpu.captures and not alone and max(map(len, steps)) <= 1


@pytest.mark.parametrize("name", ["whole canvas", "prefix", "dual", "filtered"])
def test_shifted_logits(name: str, gpu: FakeGpu) -> None:
    model = fake_checkpoint(gpu, "dream/dream_tiny")
    changes: dict[str, Any] = {"cache": name} if name in ("prefix", "dual") else {"denoising_steps": 5}
    if name == "filtered":
        changes |= {"filtered_confidence": True, "top_p": 0.9, "rank_by": "entropy", "policy": "low_confidence_static"}
    engine = Engine(model, None, max_batch=4, max_length=64)
    alone = uncaptured(engine)
    run(gpu, engine, requests(model, replace(R, **changes)))
    assert gpu.captures and not alone


@pytest.mark.parametrize("cache", ["block", "dual"])
def test_sub_blocks(cache: Any, gpu: FakeGpu) -> None:
    model = fake_checkpoint(gpu, "fastdllm_v2/fastdllm_v2_tiny")
    engine = Engine(model, None, max_batch=4, max_length=64)
    alone = uncaptured(engine)
    run(gpu, engine, requests(model, replace(R, block_length=8, sub_block_length=4, cache=cache)))
    assert gpu.captures and not alone
