"""Memory plans: what counts as free, and both models of a warm start together."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from rcd_core import Decoder, DecodeSettings, LocalReference, WarmStart, signals
from rcd_core.attention.paged_backends import VarlenBackend
from rcd_core.decoding import decoder
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.memory import EnginePlan, available_bytes, engine_memory, fit
from rcd_core.decoding.pages import bytes_per_position
from rcd_core.decoding.request import make_sequence
from tests.rcd_core.decoding.test_decoding import FAMILIES, model
from tests.rcd_core.tensor_sizes import LargestTensor

PLAIN = DecodeSettings(block_length=8, max_new_tokens=24, stop_token_ids=())
WARM = DecodeSettings(block_length=8, max_new_tokens=16, residual=True, start="reference", stop_token_ids=())


def cache_bytes(reference: LocalReference) -> int:
    forward = reference._forward
    return 0 if forward is None else sum(t.nbytes for t in (*forward.cache.keys, *forward.cache.values))


def test_memory_that_the_allocator_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 of 80 bytes are free for everybody; this process has reserved 10 and uses 4 of them."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    assert [available_bytes(torch.device("cuda"), part) for part in (1.0, 0.5, 0.25)] == [56, 36, 16]


def test_the_second_piece_sees_the_memory_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which PyTorch keeps all that the first engine has freed."""
    total, weights = 1 << 30, 100 << 20
    state = {"reserved": weights}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - state["reserved"], total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: weights)
    first = available_bytes(torch.device("cuda"))
    state["reserved"] = total * 9 // 10
    assert available_bytes(torch.device("cuda")) == first == total - weights


@pytest.mark.parametrize("family", FAMILIES)
def test_target_and_reference_share_the_budget(family: str) -> None:
    target, reference = model(family), LocalReference(model(f"{family}_ref_tiny"), cache_slots=6)
    alone = [engine_memory(target, n, 64, 8).total for n in range(1, 9)]
    other = [engine_memory(reference.model, n, 64, 8).cache for n in range(1, 9)]
    assert fit(target, 64, 8, 8, free=alone[7]) == EnginePlan(8)
    assert fit(target, 64, 8, 8, free=alone[7], reference=reference).max_batch < 8
    assert [reference.missing_bytes(n, 64) for n in range(1, 9)] == [*other[:6], other[5], other[5]]
    # What the reference holds already is taken from the device's free memory: it is not counted again.
    reference.plan(4, 64)
    reference.signals([WarmStart((1, 2, reference.model.mask_token_id), (2,), 4)])
    assert cache_bytes(reference) == other[3]
    assert reference.missing_bytes(4, 64) == reference.missing_bytes(3, 40) == 0
    assert reference.missing_bytes(5, 64) == other[4] - other[3]


def test_the_references_cache_is_as_large_as_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 contexts, however few requests there are, would not fit beside an engine that fills the memory."""
    planned = []

    def plan(*arguments: object, **more: object) -> EnginePlan:
        planned.append(more["reference"])
        return fit(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "fit", plan)
    both = Decoder(model("sdar"), model("sdar_ref_tiny"))
    first = both.generate([[1, 2], [3], [4, 5, 6]], WARM)
    local = both.reference
    assert isinstance(local, LocalReference) and planned == [local]
    assert local.cache_slots == 3 and cache_bytes(local) == engine_memory(local.model, 3, 24, 8).cache
    more = both.generate([[1, 2], [3], [4, 5, 6], [7]], WARM)
    assert local.cache_slots == 4
    assert [g.token_ids for g in more[:3]] == [g.token_ids for g in first]


def test_pages_fill_what_is_left() -> None:
    """With a kernel that follows page tables, requests need not all have room for their longest length."""
    m = model("sdar")
    backend = VarlenBackend(m.config.num_attention_heads, m.config.num_key_value_heads, 16, follows_tables=True)
    page = 16 * bytes_per_position(m)
    whole = engine_memory(m, 8, 640, 8, backend=backend)
    assert fit(m, 640, 8, 8, free=whole.total, backend=backend) == EnginePlan(8, 8 * 40)
    less = fit(m, 640, 8, 8, free=whole.total - 100 * page, backend=backend)
    assert less == EnginePlan(8, 8 * 40 - 100)
    planned = engine_memory(m, 8, 640, 8, less.num_pages, backend)
    assert planned.total <= whole.total - 100 * page < planned.total + page
    # One request of the longest length must always fit, else a smaller batch leaves more for pages.
    scarce = fit(m, 640, 8, 8, free=engine_memory(m, 5, 640, 8, 40, backend).total, backend=backend)
    assert scarce == EnginePlan(5, 40)
    # A reference's contexts have neighbouring pages, whatever the kernel.
    scarce_bytes = engine_memory(m, 5, 640, 8, 40, backend).total
    assert fit(m, 640, 8, 8, free=scarce_bytes, backend=backend, lanes=True).max_batch < 5
    prompts = [[1, 2, 3], [4, 5], list(range(1, 20))]
    engine = Engine(m, None, max_length=640, **asdict(scarce))
    requests = [make_sequence(m, ids, PLAIN, infill=False, has_reference=False) for ids in prompts]
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    assert [r.output().token_ids for r in requests] == [g.token_ids for g in Decoder(m).generate(prompts, PLAIN)]


@pytest.mark.parametrize("family", FAMILIES)
def test_warm_starts_hold_no_more_than_a_tile(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 requests that start together: 512 ids, tiles of 4 positions, blocks of 8."""
    monkeypatch.setattr("rcd_core.ops.tiles.SMALLEST", 4 * 4 * 512)
    reference, table = LocalReference(model(f"{family}_ref_tiny")), model(family).embedding.weight
    mask = reference.model.mask_token_id
    requests = [WarmStart((3, 4 + i, 5, 6, *[mask] * 8), tuple(range(4, 12)), 4) for i in range(16)]
    with LargestTensor() as largest:
        answers = reference.signals(requests)
        tiled = [signals.residual_state(answer, table, "normalized_entropy", None) for answer in answers]
    assert largest.bytes < 16 * 8 * 4 * 512, "not the logits of all"
    monkeypatch.undo()
    for request, found in zip(requests, tiled, strict=True):
        [whole] = LocalReference(reference.model).signals([request])
        for x, y in zip(found, signals.residual_state(whole, table, "normalized_entropy", None), strict=True):
            torch.testing.assert_close(x, y)
