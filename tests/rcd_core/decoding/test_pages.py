"""Pages: allocation, shared prefixes, requests that grow and give up their pages; attention over pages."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcd_core import DecodeSettings, UserError
from rcd_core.attention.paged import TILE, EagerAttention, Rows, SdpaAttention
from rcd_core.attention.paged_backends import FlashBackend, VarlenBackend, paged_backend
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.pages import Pages
from tests.rcd_core.decoding.test_decoding import FAMILIES, MASK, any_settings, decoder, many, model, prompts
from tests.rcd_core.decoding.test_engine import assert_free, engine, request, run

SETTINGS = DecodeSettings(block_length=4, max_new_tokens=40, stop_token_ids=(), seed=1)


@many
@given(data=st.data())
def test_a_page_has_one_owner_or_one_content(data: st.DataObject) -> None:
    """Random requests come and go. A page is free, or held by tables whose tokens up to its end are equal."""
    pages = Pages(12, 4)
    tables: list[tuple[list[int], np.ndarray]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if tables and data.draw(st.booleans()):
            pages.release(tables.pop(data.draw(st.integers(0, len(tables) - 1)))[0])
        else:
            ids = np.array(data.draw(st.lists(st.sampled_from([1, 2]), min_size=8, max_size=16)))
            found = pages.find(ids, 4, len(ids) // 4 * 4)
            new = pages.take(pages.count(len(ids)) - len(found))
            if new is None:
                pages.release(found)
                continue
            table = found + new
            pages.register(table, ids, 4, 4 * len(found), len(ids) // 4 * 4)
            tables.append((table, ids))
        held: dict[int, bytes] = {}
        for table, ids in tables:
            assert len(set(table)) == len(table)
            for i, page in enumerate(table):
                content = ids[: 4 * (i + 1)].tobytes()
                assert held.setdefault(page, content) == content
        assert pages.num_free == 12 - len(held)


def test_only_whole_blocks_are_shared() -> None:
    """Pages of 4, blocks of 6: two blocks fill three pages, the smallest unit. Another block length shares nothing."""
    pages, ids = Pages(20, 4), np.arange(30)
    table = pages.take(8) or []
    pages.register(table, ids, 6, 0, 11)
    assert pages.find(ids, 6, 30) == []
    pages.register(table, ids, 6, 0, 24)
    assert pages.find(ids, 6, 30) == table[:6] and pages.find(ids, 6, 23) == table[:3]
    assert pages.find(ids, 3, 30) == [] and pages.find(ids[::-1].copy(), 6, 30) == []


def test_a_page_that_is_taken_again_is_no_longer_found() -> None:
    pages, ids = Pages(3, 4), np.arange(12)
    table = pages.take(3) or []
    pages.register(table, ids, 4, 0, 12)
    pages.release(table)
    again = pages.take(1)
    assert again == [table[-1]], "the end of a prefix goes first"
    assert pages.find(ids, 4, 12) == table[:2]


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_few_pages_change_no_result(family: str, data: st.DataObject) -> None:
    """With pages for about one request, requests are preempted, and end as they do alone, passes included."""
    several = data.draw(st.lists(st.tuples(prompts, any_settings(family)), min_size=2, max_size=5))
    e = engine(family, num_pages=data.draw(st.integers(4, 5)), reuse_prefixes=data.draw(st.booleans()))
    requests = [request(family, p, replace(s, max_new_tokens=3 * s.max_new_tokens)) for p, s in several]
    outputs = run(e, *requests)
    assert_free(e, 4)
    for r, out in zip(requests, outputs, strict=True):
        alone = decoder(family).generate([r.canvas[: r.num_prompt].tolist()], r.settings)[0]
        assert out.token_ids == alone.token_ids
        assert out.num_forwards.denoise == alone.num_forwards.denoise


def test_preempted_before_an_empty_pass_the_block_is_decoded_again() -> None:
    """compat_passes: Fast-dLLM's pass after a block that was done in its first one, which commits nothing."""
    s = replace(SETTINGS, cache="dual", compat_passes=True, confidence_threshold=0.0, denoising_steps=1)
    e, r = engine("llada"), request("llada", [3, 1, 4], s)
    e.add(r)
    while not r.empty_pass_due:
        e.step()
    e._preempt(r)
    run(e)
    alone = decoder("llada").generate([[3, 1, 4]], s)[0]
    assert r.output().token_ids == alone.token_ids and MASK["llada"] not in r.output().token_ids


def test_a_request_takes_pages_as_it_grows() -> None:
    e = engine("sdar", num_pages=8)
    requests = [request("sdar", [1, 2, 3], SETTINGS) for _ in range(4)]  # 3 pages each in the end
    for r in requests:
        e.add(r)
    e.step()
    assert [len(r.pages) for r in requests] == [1, 1, 1, 1] and len(e.running) == 4
    while e.busy:
        e.step()
    assert e.statistics.preempted > 0
    assert len({tuple(r.output().token_ids) for r in requests}) == 1


def test_shared_pages_are_held_once() -> None:
    prompt = list(range(10, 42))
    e = engine("sdar", num_pages=12, reuse_prefixes=True)
    first, second = (request("sdar", [*prompt, end], replace(SETTINGS, max_new_tokens=8)) for end in (50, 60))
    e.add(first)
    e.step()
    e.add(second)
    e.step()
    assert first.pages[:2] == second.pages[:2] and first.pages[2] != second.pages[2]
    assert e.tables.num_free_pages == 12 - 4 and second.forwards.prefill == 0
    run(e)
    for r in (first, second):
        assert r.output().token_ids == decoder("sdar").generate([r.canvas[:33].tolist()], r.settings)[0].token_ids


def test_a_request_longer_than_all_pages_is_refused() -> None:
    with pytest.raises(UserError, match="max_new_tokens"):
        engine("sdar", num_pages=2).add(request("sdar", [1], SETTINGS))


def test_sharing_needs_final_tokens() -> None:
    """LLaDA's caches depend on the masks at the time, so nothing of them is registered."""
    e = engine("llada", reuse_prefixes=True)
    same = [request("llada", list(range(40)), replace(SETTINGS, max_new_tokens=8, cache="dual")) for _ in range(2)]
    for r in same:
        run(e, r)
    assert e.statistics.reused_tokens == 0


# -- attention


@many
@given(data=st.data())
def test_sdpa_equals_eager(data: st.DataObject) -> None:
    """Rows of random lengths, several per request, over pages anywhere or in lanes."""
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    slots, columns, page = 5, 8, 4
    lanes = data.draw(st.booleans())
    tables = np.zeros((slots + 1, columns), dtype=np.int64)
    pages = np.arange(1, slots * columns + 1)
    tables[:slots] = (pages if lanes else generator.permutation(pages)).reshape(slots, columns)
    used = np.sort(generator.permutation(slots)[: data.draw(st.integers(1, slots))])
    slot = np.repeat(used, generator.integers(1, 4, len(used)))
    counts = generator.integers(1, data.draw(st.sampled_from([2, 5, TILE])), len(slot))
    num_keys = generator.integers(1, columns * page + 1, len(slot))
    for s in used:  # later rows of a request see more
        num_keys[slot == s] = np.sort(num_keys[slot == s])
    rows = Rows(np.append(0, counts.cumsum()), num_keys, slot, tables, columns if lanes else None)
    heads, groups, width = data.draw(st.sampled_from([(4, 2), (3, 3), (4, 1)])) + (8,)
    query = torch.randn(int(counts.sum()), heads, width, dtype=torch.float64)
    keys, values = torch.randn(2, (slots * columns + 1) * page, groups, width, dtype=torch.float64)
    found = SdpaAttention(rows, page, heads, groups, query)(query, keys, values, 0.3)
    torch.testing.assert_close(found, EagerAttention(rows, page)(query, keys, values, 0.3), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_backend_changes_no_token(family: str) -> None:
    outs = [run(engine(family, attention=name), request(family, [5, 6, 7], SETTINGS)) for name in ("sdpa", "eager")]
    assert outs[0][0].token_ids == outs[1][0].token_ids


def plain_kernel(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, firsts: Any, *bounds: int, **options: Any) -> Tensor:
    """What torch's varlen_attn and flash-attn's function compute, by plain products."""
    assert starts.dtype == torch.int32 and not options.get("causal")
    table = options["block_table"]
    lengths = options["seqused_k"] if "seqused_k" in options else firsts.diff()
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        tokens = slice(int(starts[row]), int(starts[row + 1]))
        assert tokens.stop - tokens.start <= bounds[0] and length <= bounds[1]
        if table is not None:
            keys, values = (pool[table[row].long()].flatten(0, 1)[:length] for pool in (k, v))
        else:
            keys, values = (pool[int(firsts[row]) :][:length] for pool in (k, v))
        keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[tokens], keys) * (options.get("scale") or options["softmax_scale"])
        out[tokens] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["flash", "tables", "lanes"])
def test_the_kernels_calls_give_the_same_tokens(family: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of flash-attn and PyTorch are replaced by plain ones with the same arguments."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_kernel)
    package: Any = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = plain_kernel
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    config = model(family).config
    sizes = config.num_attention_heads, config.num_key_value_heads, 16
    backend = FlashBackend(*sizes) if kernel == "flash" else VarlenBackend(*sizes, follows_tables=kernel == "tables")
    monkeypatch.setattr("rcd_core.decoding.engine.paged_backend", lambda *_: backend)
    several = [(list(range(5, 5 + n)), replace(SETTINGS, max_new_tokens=n)) for n in (3, 9, 24, 6, 17)]
    for pages in (None, 8) if kernel != "lanes" else (None,):
        e = engine(family, max_batch=3, num_pages=pages, fixed_shapes=True)
        outputs = run(e, *(request(family, *one) for one in several))
        for (prompt, settings), out in zip(several, outputs, strict=True):
            assert out.token_ids == decoder(family).generate([prompt], settings)[0].token_ids


@pytest.mark.parametrize("name", ["varlen", "flash", "flex"])
def test_a_backend_that_cannot_run_here_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"attention is '{name}'"):
        Engine(model("sdar"), None, max_batch=1, max_length=16, attention=name)


def test_on_a_gpu_the_kernel_is_tried_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flash-attn 3 PyTorch's kernel follows no table; a kernel that refuses everything leaves sdpa."""
    from rcd_core.attention import paged_backends

    refusals: dict[bool, str | None] = {True: "block_table needs FA3", False: None}
    monkeypatch.setattr(paged_backends, "_refusal", lambda backend, *_: refusals[not backend.needs_lanes])
    arguments = model("sdar").config, torch.bfloat16, torch.device("cuda"), 256
    lanes = paged_backend("auto", *arguments)
    assert isinstance(lanes, VarlenBackend) and lanes.needs_lanes
    refusals[False] = "no kernel image"
    assert paged_backend("auto", *arguments).name == "sdpa"
    with pytest.raises(UserError, match="no kernel image"):
        paged_backend("varlen", *arguments)


@pytest.mark.parametrize("follows_tables", [True, False])
def test_the_kernels_get_each_rows_keys(follows_tables: bool) -> None:
    """What varlen and flash read from the integers describes the same keys as Rows."""
    tables = np.array([[3, 4], [1, 2], [0, 0]])
    rows = Rows(np.array([0, 2, 5, 6]), np.array([4, 6, 3]), np.array([0, 0, 1]), tables)
    varlen = VarlenBackend(4, 2, 4, follows_tables=follows_tables)
    plan = varlen.plan(torch.from_numpy(varlen.integers(rows)), rows, 3, 3, 8, torch.zeros(1))
    assert plan.starts.tolist() == [0, 2, 5, 6] and plan.num_keys.tolist() == [4, 6, 3]  # type: ignore[attr-defined]
    if follows_tables:
        assert plan.tables.tolist() == [[3, 4], [3, 4], [1, 2]]  # type: ignore[attr-defined]
    else:
        assert plan.first_keys.tolist()[:3] == [12, 12, 4]  # type: ignore[attr-defined]
    flash = FlashBackend(4, 2, 4)
    plan = flash.plan(torch.from_numpy(flash.integers(rows)), rows, 3, 3, 8, torch.zeros(1))
    assert plan.key_starts.tolist() == [0, 4, 10, 13] and plan.tables.tolist()[2] == [1, 2]  # type: ignore[attr-defined]
