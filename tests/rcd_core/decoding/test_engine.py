"""The engine while requests join, leave, share prefixes and wait for a remote reference; streams; memory plans."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcd_core import Decoder, DecodeSettings, LocalReference, UserError, WarmStart
from rcd_core.decoding.chunk import Chunk
from rcd_core.decoding.engine import Engine, QueueFull
from rcd_core.decoding.memory import engine_memory, fit
from rcd_core.decoding.model_runner import MAX_PASS_TOKENS, RequestPass, group_requests
from rcd_core.decoding.pages import PagedCache
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.stream import BlockDone, PassDone, TextStream, stream
from tests.rcd_core.decoding.test_decoding import FAMILIES, any_settings, decoder, many, model, prompts

OK = DecodeSettings(block_length=4, max_new_tokens=16, stop_token_ids=())


def request(family: str, prompt: list[int], settings: DecodeSettings) -> Any:
    return make_sequence(model(family), prompt, settings, infill=False, has_reference=True)


def engine(family: str, reference: Any = None, **options: Any) -> Engine:
    options = {"max_batch": 4, "max_length": 64, **options}
    return Engine(model(family), reference or LocalReference(model(f"{family}_ref_tiny")), **options)


def run(engine: Engine, *requests: Any) -> list[Any]:
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    return [r.output() for r in requests]


def assert_free(e: Engine, slots: int) -> None:
    """Every slot and every page is free again."""
    assert e.tables.num_free_slots == slots and e.tables.num_free_pages == e.tables.num_pages


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_joins_and_cancellations_change_no_result(family: str, data: st.DataObject) -> None:
    """Requests arrive and are cancelled between passes at random; the others get the result that they get alone."""
    several = data.draw(st.lists(st.tuples(prompts, any_settings(family)), min_size=3, max_size=7))
    order = random.Random(data.draw(st.integers(0, 99)))
    e = engine(family, max_batch=3, reuse_prefixes=data.draw(st.booleans()), prefill_chunk=4)
    requests = [request(family, p, s) for p, s in several]
    waiting, cancelled = list(requests), set()
    while waiting or e.busy:
        if waiting and order.random() < 0.6:
            e.add(waiting.pop(0))
        if order.random() < 0.1 and (running := [*e.running, *e.waiting]):
            victim = order.choice(running)
            e.cancel(victim)
            cancelled.add(id(victim))
        e.step()
    assert_free(e, 3)
    for (prompt, s), r in zip(several, requests, strict=True):
        assert r.finished != (id(r) in cancelled)
        if r.finished:
            alone = decoder(family).generate([prompt], s)[0]
            assert r.output().token_ids == alone.token_ids
            assert r.output().num_forwards.denoise == alone.num_forwards.denoise


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_streamed_equals_whole(family: str, data: st.DataObject) -> None:
    several = data.draw(st.lists(st.tuples(prompts, any_settings(family)), min_size=1, max_size=4))
    whole = decoder(family).generate([p for p, _ in several], [s for _, s in several])
    tokens: list[list[int]] = [[] for _ in several]
    steps: list[list[Any]] = [[] for _ in several]
    finished: dict[int, Any] = {}
    for event in decoder(family).stream([p for p, _ in several], [s for _, s in several]):
        assert event.index not in finished, "no event follows Finished"
        if isinstance(event, BlockDone):
            tokens[event.index] += event.token_ids
        elif isinstance(event, PassDone):
            steps[event.index].append(event.step)
        else:
            finished[event.index] = event.generation
    for i, want in enumerate(whole):
        assert tokens[i] == want.token_ids == finished[i].token_ids
        assert steps[i] == want.steps


def test_a_closed_stream_frees_its_slots() -> None:
    e = engine("sdar", max_batch=2)
    events = stream(e, [request("sdar", [1, 2, 3], OK) for _ in range(3)])
    next(events)
    assert e.busy
    events.close()  # type: ignore[attr-defined]
    assert not e.busy
    assert_free(e, 2)


def test_prompts_with_the_same_beginning_share_their_prefill() -> None:
    """A request prefills only the blocks that no running or finished request has in its slot. Requests with another
    block length or compat_passes share nothing."""
    start = list(range(10, 26))
    first, second = request("sdar", start + [30, 31], OK), request("sdar", start + [40], OK)
    e = engine("sdar", reuse_prefixes=True)
    e.add(first)
    e.step()
    run(e, second)
    assert (first.forwards.prefill, second.forwards.prefill, e.statistics.reused_tokens) == (1, 0, 16)
    assert e.statistics.reused_prefills == 1
    later = request("sdar", start + [50] * 8, OK)
    run(e, later)
    assert later.forwards.prefill == 1 and e.statistics.reused_tokens == 32
    for r in (first, second, later):
        alone = Decoder(model("sdar")).generate([r.canvas[: r.num_prompt].tolist()], OK)[0]
        assert r.output().token_ids == alone.token_ids
    for other in (replace(OK, block_length=8), replace(OK, compat_passes=True)):
        before = e.statistics.reused_tokens
        run(e, request("sdar", start + [30, 31], other))
        assert e.statistics.reused_tokens == before


def test_long_prompts_are_prefilled_in_chunks() -> None:
    prompt = list(range(100, 150))
    whole = request("sdar", prompt, OK)
    chunked = request("sdar", prompt, OK)
    for r, chunk in ((whole, 2048), (chunked, 19)):
        e = engine("sdar", prefill_chunk=chunk, max_length=80)
        run(e, r)
    assert (whole.forwards.prefill, chunked.forwards.prefill) == (1, 3)  # 48 tokens in chunks of 16
    assert whole.output().token_ids == chunked.output().token_ids


def test_the_queue_is_bounded() -> None:
    e = engine("sdar", max_batch=1, max_queue=1)
    requests = [request("sdar", [1], OK) for _ in range(4)]
    e.add(requests[0])
    e.step()
    e.add(requests[1])
    with pytest.raises(QueueFull, match="waiting"):
        e.add(requests[2])
    e.cancel(requests[0])
    e.step()
    e.add(requests[2])


class Remote:
    """A remote reference that answers when the test calls `answer`, or at once; None if it fails."""

    def __init__(self, family: str) -> None:
        self.local = LocalReference(model(f"{family}_ref_tiny"))
        self.pending: list[tuple[WarmStart, Future[Any]]] = []
        self.at_once = self.fails = False

    def submit(self, requests: Sequence[WarmStart]) -> list[Future[Any]]:
        futures: list[Future[Any]] = [Future() for _ in requests]
        self.pending += zip(requests, futures, strict=True)
        if self.at_once:
            self.answer()
        return futures

    def answer(self) -> None:
        for request, future in self.pending:
            future.set_result(None if self.fails else self.local.signals([request])[0])
        self.pending.clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_requests_continue_while_a_remote_reference_works(family: str) -> None:
    warm = replace(OK, residual=True, start="reference", residual_top_k=16)
    remote = Remote(family)
    e = engine(family, remote)
    asking, plain = request(family, [3, 4], warm), request(family, [5], OK)
    e.add(asking)
    e.add(plain)
    while not plain.finished:
        e.step()
    assert asking.forwards.denoise == 0, "only the request with a warm start waits"
    remote.at_once = True
    remote.answer()
    run(e)
    alone = decoder(family).generate([[3, 4]], warm)[0]
    assert asking.output().token_ids == alone.token_ids
    assert asking.output().num_forwards == alone.num_forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_that_fails_means_a_zero_start(family: str) -> None:
    warm = replace(OK, residual=True, start="reference", residual_top_k=16)
    remote = Remote(family)
    remote.at_once = remote.fails = True
    e = engine(family, remote)
    asking = request(family, [3, 4], warm)
    run(e, asking)
    output = asking.output()
    zero = decoder(family).generate([[3, 4]], replace(warm, start="zero"))[0]
    assert output.token_ids == zero.token_ids
    blocks = [start for start, _ in asking.blocks if not asking.is_next_token(start)]
    assert output.reference_failures == len(blocks) and output.num_forwards.reference == 0


def test_the_reference_keeps_its_contexts() -> None:
    """From block to block the local reference runs only the new tokens, with the result of one without a cache."""
    ref = model("sdar_ref_tiny")
    kept, seen = LocalReference(ref), []
    canvas = torch.randint(0, 490, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    inner = kept._row

    def row(*arguments: Any) -> Any:
        slot, chunk = inner(*arguments)
        seen.append(len(chunk.token_ids))
        return slot, chunk

    kept._row = row  # type: ignore[method-assign]
    for end in (8, 12, 16, 24):
        requests = [WarmStart((*canvas[: end - 4], *[511] * 4), tuple(range(end - 4, end)), 4, top_k=8)]
        fresh = LocalReference(ref).signals(requests)[0]
        cached = kept.signals(requests)[0]
        assert torch.equal(cached.topk_ids, fresh.topk_ids)  # type: ignore[union-attr]
        torch.testing.assert_close(cached.entropy, fresh.entropy, atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
    # A longer canvas enlarges the cache, which empties it, so the canvases of 12 and 24 tokens run from their start.
    assert seen == [8, 12, 8, 24]


@pytest.mark.parametrize(("slots", "reused"), [(2, 0), (3, 3 * (4 + 8 + 12))])
def test_a_reference_with_enough_slots_reuses_every_context(slots: int, reused: int) -> None:
    """Three answers take turns, four blocks each. With a slot too few, each context is dropped before it is needed."""
    kept = LocalReference(model("sdar_ref_tiny"), slots, max_length=20)
    for end in (8, 12, 16, 20):
        for first in (1, 2, 3):
            kept.signals([WarmStart((*[first] * (end - 4), *[511] * 4), tuple(range(end - 4, end)), 4, top_k=8)])
    assert kept.reused_tokens == reused


# -- text


def test_text_comes_in_safe_pieces() -> None:
    """Bytes as ids: a character of three bytes cut in two, a stop string spread over three pushes."""

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    text = "Grüße, 世界! <end> never"
    ids = list(text.encode())
    for size in (1, 2, 3, 5, 50):
        pieces = TextStream(decode, stop=["<end>", "<endless>"])
        out = [pieces.push(ids[i : i + size]) for i in range(0, len(ids), size)] + [pieces.finish()]
        assert "".join(out) == "Grüße, 世界! " and pieces.stopped
        assert not any("\ufffd" in piece for piece in out)
    unstopped = TextStream(decode, stop=["<end!"])
    pushed = unstopped.push(ids)
    assert pushed + unstopped.finish() == text and not unstopped.stopped
    half = TextStream(decode)
    assert half.push("é".encode()[:1]) == "" and half.finish() == "\ufffd"
    waiting = TextStream(decode, stop=["stop"])
    assert waiting.push(b"a st") == "a " and waiting.push(b"ill") == "still"


def test_statistics_are_the_sums_over_the_requests() -> None:
    warm = replace(OK, residual=True, start="reference", residual_top_k=16)
    e = engine("sdar")
    requests = [request("sdar", list(range(1, 4 + 3 * i)), warm if i % 2 else OK) for i in range(5)]
    outputs = run(e, *requests)
    totals = e.statistics
    assert (totals.requests, totals.tokens) == (5, sum(len(o.token_ids) for o in outputs))
    assert totals.forwards["reference"] == sum(o.num_forwards.reference for o in outputs) > 0
    assert totals.tokens_per_forward == totals.tokens / sum(o.num_forwards.denoise for o in outputs)
    passes = sum(o.num_forwards.total + 0.5 * o.num_forwards.reference for o in outputs)
    assert totals.tokens_per_pass(0.5) == totals.tokens / passes
    assert totals.merged_stores == sum(len(r.blocks) - 1 for r in requests)
    assert sum(totals.rows.values()) == sum(o.num_forwards.total + o.num_forwards.reference for o in outputs)
    assert 1.0 < totals.occupancy <= 4.0 and totals.seconds.keys() == {*totals.passes, "choose"}


# -- resuming and memory


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_a_request_resumes_in_another_engine(family: str, data: st.DataObject) -> None:
    """Another engine gets the prompt and the tokens of a broken stream, and ends with the same tokens."""
    prompt, s = data.draw(prompts), data.draw(any_settings(family))
    if family == "llada":  # its caches depend on the masks at the time, so a fresh one may differ
        s = replace(s, cache="none", residual_scope="block")
    settings = replace(s, seed=s.seed or 5, compat_passes=False)
    whole = decoder(family).generate([prompt], settings)[0]
    events = list(decoder(family).stream([prompt], settings))
    blocks = [e.token_ids for e in events if isinstance(e, BlockDone)]
    committed = [t for b in blocks[: data.draw(st.integers(0, max(0, len(blocks) - 1)))] for t in b]
    rest = make_sequence(model(family), prompt, settings, infill=False, has_reference=True, committed=committed)
    e = engine(family, max_length=len(rest.canvas))
    run(e, rest)
    assert rest.output().token_ids == whole.token_ids


@pytest.mark.parametrize("fixed", [False, True])
def test_passes_are_no_larger_than_planned(fixed: bool) -> None:
    sizes = [2048] * 9 + [8] * 40
    requests = [request("sdar", [1], OK) for _ in sizes]
    for i, r in enumerate(requests):
        r.slot = i
    rows = [Chunk(np.zeros(n, dtype=np.int64), 0, n, None) for n in sizes]
    passes = [RequestPass(r, "denoise", [row], len(row.token_ids), 1) for r, row in zip(requests, rows, strict=True)]
    groups = group_requests(passes, fixed)
    assert sorted(p.sequence.slot for group in groups for p in group) == list(range(49))
    assert all(sum(p.num_tokens for p in group) <= MAX_PASS_TOKENS for group in groups)
    assert len(groups) == 4 if fixed else 3


def test_as_many_requests_as_fit() -> None:
    m = model("sdar")
    needed = [engine_memory(m, n, 64, 4) for n in range(1, 9)]
    assert all(a.total < b.total and a.cache < b.cache for a, b in zip(needed, needed[1:], strict=False))
    assert fit(m, 64, 4, max_batch=8, free=needed[4].total).max_batch == 5
    assert fit(m, 64, 4, max_batch=3, free=needed[4].total).max_batch == 3
    with pytest.raises(UserError, match="max_new_tokens"):
        fit(m, 64, 4, max_batch=8, free=1000)
    cache = PagedCache(m, 3 * 64 // 16, 16)
    assert engine_memory(m, 3, 64, 4).cache == sum(t.nbytes for t in (*cache.keys, *cache.values))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured on Linux only")
@pytest.mark.parametrize("residual_top_k", [pytest.param(None, marks=pytest.mark.drill), 32])
def test_a_pass_needs_no_more_than_planned(residual_top_k: int | None) -> None:
    """The peak memory of a full batch beyond cache and state, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.engine_memory", "24", "16", "20000"]
    out = subprocess.run([*command, str(residual_top_k or 0)], capture_output=True, text=True, check=True)
    measured = json.loads(out.stdout.splitlines()[-1])
    assert 0.1 * measured["planned"] < measured["bytes"] <= measured["planned"], measured
