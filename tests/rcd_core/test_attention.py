"""Layouts against their definitions, and every backend against plain matrix products."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rcd_core import UserError, load_model
from rcd_core.attention import backends as attention
from rcd_core.attention.layouts import Layout, bidirectional, block_causal, block_diffusion
from rcd_core.training.objective import TrainingBatch, loss_sum

GOLDEN = Path(__file__).parents[1] / "golden"
few = settings(max_examples=25, deadline=None, derandomize=True)


def by_definition(masked: Tensor, samples: Tensor, positions: Tensor, b: int) -> Tensor:
    """(2L, 2L) mask of one row, [noisy | clean], clean blocks see clean blocks up to their own, noisy blocks the clean
    ones before and themselves."""
    n = masked.shape[0]
    allowed = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for q in range(2 * n):
        for k in range(2 * n):
            i, j = q % n, k % n
            if samples[i] != samples[j] or samples[i] < 0:
                continue
            blk_q, blk_k = positions[i] // b, positions[j] // b
            q_noisy, k_noisy = q < n, k < n
            allowed[q, k] = (
                (q_noisy == k_noisy and blk_q == blk_k)
                or (q_noisy and not k_noisy and blk_k < blk_q)
                or (not q_noisy and not k_noisy and blk_k <= blk_q)
            )
    return allowed


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """masked, sample_ids, positions (B, L) of rows that hold one to three samples and some padding."""
    b = draw(st.sampled_from([1, 2, 3, 4]))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        rows.append([b * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))])
    length = max(map(sum, rows)) + draw(st.integers(0, 3))
    samples, positions = torch.full((len(rows), length), -1), torch.zeros(len(rows), length, dtype=torch.long)
    for r, sizes in enumerate(rows):
        at = 0
        for s, size in enumerate(sizes):
            samples[r, at : at + size], positions[r, at : at + size] = s, torch.arange(size)
            at += size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    masked = (torch.rand(samples.shape, generator=generator) < 0.4) & (samples >= 0)
    masked[:, 0] = True
    return masked, samples, positions, b


@few
@given(packed_rows())
def test_block_diffusion_is_the_definition_without_unread_tokens(case: Any) -> None:
    masked, samples, positions, b = case
    packed = block_diffusion(masked, samples, positions, b)
    visible = packed.layout.visible()[:, 0]
    for r in range(len(masked)):
        expected = by_definition(masked[r], samples[r], positions[r], b)
        kept = (packed.source[r] + (~packed.noisy[r]) * masked.shape[1])[packed.valid[r]]
        n = len(kept)
        assert torch.equal(visible[r, :n, :n], expected[kept][:, kept])
        assert not visible[r, :n, n:].any() and visible[r].any(-1).all()
        # No masked noisy token reads a dropped token, directly or through other tokens.
        read = torch.zeros(len(expected), dtype=torch.bool)
        read[: len(masked[r])] = masked[r]
        for _ in range(3):
            read |= expected[read].any(0)
        assert set(read.nonzero().flatten().tolist()) <= set(kept.tolist())


def test_block_causal_is_the_definition() -> None:
    positions = torch.tensor([[4, 5, 6, 7], [2, 3, 4, 4]])
    layout = block_causal(positions, torch.tensor([8, 5]), 9, torch.tensor([4, 3]))
    expected = [
        [[k < n and k // b <= q // b for k in range(9)] for q in row]
        for row, n, b in zip(positions.tolist(), (8, 5), (4, 3), strict=True)
    ]
    assert torch.equal(layout.visible()[:, 0], torch.tensor(expected))
    everyone = block_causal(positions, torch.tensor([8, 5]), 9, None).visible()[:, 0]
    assert everyone.sum(-1).tolist() == [[8] * 4, [5] * 4]


# -- backends


def layouts(kind: str) -> Layout | None:
    generator = torch.Generator().manual_seed(3)
    samples = torch.tensor([[0] * 150 + [1] * 90 + [-1] * 20, [0] * 260])
    positions = torch.cat([torch.arange(150), torch.arange(90), torch.zeros(20)]).long()
    positions = torch.stack([positions, torch.arange(260)])
    if kind == "block_diffusion":
        masked = (torch.rand(samples.shape, generator=generator) < 0.3) & (samples >= 0)
        return block_diffusion(masked, samples, positions, 8).layout
    if kind == "packed":
        return bidirectional(samples)
    if kind == "padded":
        return bidirectional(torch.where(torch.arange(260) < torch.tensor([[131], [260]]), 0, -1))
    if kind == "prefill":
        return block_causal(torch.arange(260).expand(2, -1), torch.tensor([260, 260]), 260, torch.tensor([4, 32]))
    if kind == "one_block":
        blocks = torch.tensor([32, 32])
        return block_causal(torch.arange(128, 160).expand(2, -1), torch.tensor([160, 160]), 200, blocks, True)
    return None


KINDS = ["block_diffusion", "packed", "padded", "prefill", "one_block", "full"]


def tensors(layout: Layout | None) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped heads: 4 of queries, 2 of keys."""
    torch.manual_seed(0)
    rows, queries, keys = (2, 60, 60) if layout is None else layout.shape
    shapes = ((rows, 4, queries, 16), (rows, 2, keys, 16), (rows, 2, keys, 16))
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k, v


def run(name: str, kind: str, grad: bool = True) -> list[Tensor]:
    layout = layouts(kind)
    q, k, v = (t.detach().requires_grad_(grad) for t in tensors(layout))
    with torch.set_grad_enabled(grad):
        out = attention.FUNCTIONS[name](q, k, v, layout, 0.25)
    if not grad:
        return [out]
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out * weight).sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_and_its_tiles_equal_eager(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = run("eager", kind)
    for dense_pairs in (1 << 23, 0):
        monkeypatch.setattr(attention, "DENSE_PAIRS", dense_pairs)
        for tile in (64, 1000):
            monkeypatch.setattr(attention, "TILE", tile)
            for actual, expected in zip(run("sdpa", kind), eager, strict=True):
                torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_flex_equals_eager(kind: str) -> None:
    torch.testing.assert_close(run("flex", kind, grad=False), run("eager", kind, grad=False), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_flex_tiles_cover_what_is_visible_and_skip_what_can_be_skipped(kind: str) -> None:
    layout = layouts(kind)
    assert layout is not None
    mask = attention._block_mask(layout)
    visible = layout.visible()[:, 0].float()
    size = attention.FLEX_TILE
    pooled = torch.nn.functional.max_pool2d(visible, size, ceil_mode=True).bool()
    dense = mask.to_dense()[:, 0].bool()
    assert not (pooled & ~dense).any(), "a visible pair is in a tile that is not computed"
    full = torch.zeros_like(dense)
    for r in range(dense.shape[0]):
        for q in range(dense.shape[1]):
            full[r, q, mask.full_kv_indices[r, 0, q, : mask.full_kv_num_blocks[r, 0, q]].long()] = True
    emptiest = -torch.nn.functional.max_pool2d(-visible, size, ceil_mode=True)
    assert (emptiest[full] == 1).all(), "a tile without a mask hides a pair"
    if kind == "prefill":
        assert dense.sum() < dense.numel(), "block-causal attention skips the tiles above the diagonal"
        assert full.any()


def test_flex_model_equals_sdpa_and_does_not_train_on_a_cpu() -> None:
    ids = torch.randint(0, 490, (2, 21), generator=torch.Generator().manual_seed(1))
    for name in ("sdar_tiny", "llada_tiny"):
        plain, flex = (load_model(GOLDEN / name, attention=a) for a in ("sdpa", "flex"))
        with torch.no_grad():
            torch.testing.assert_close(flex.logits(ids, 4), plain.logits(ids, 4), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="attention is 'flex'"):
        flex.requires_grad_(True).logits(ids)


# -- flash-attn (without the package and a GPU: the tests replace its functions and check our calls)


def test_flash_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "flash_attn" else name)
    with pytest.raises(UserError, match=r"attention is 'flash'.*rcd-ray\[flash\]"):
        load_model(GOLDEN / "sdar_tiny", attention="flash")
    with pytest.raises(UserError, match="attention is 'fast'.*sdpa"):
        load_model(GOLDEN / "sdar_tiny", attention="fast")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: name)
    with pytest.raises(UserError, match="device is cpu"):
        load_model(GOLDEN / "sdar_tiny", attention="flash")


def plain_flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """flash_attn_func: (B, Q, H, d), (B, K, G, d) -> (B, Q, H, d)."""
    assert not causal
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(softmax_scale).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def plain_flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, most_q: int, most_k: int, **options: Any
) -> Tensor:
    """flash_attn_varlen_func: rows end to end, cut at cumulative lengths."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    parts = []
    for r in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[r], starts_q[r + 1]), slice(starts_k[r], starts_k[r + 1])
        assert len(q[queries]) <= most_q and len(k[keys]) <= most_k
        parts.append(plain_flash(q[None, queries], k[None, keys], v[None, keys], **options)[0])
    return torch.cat(parts)


@pytest.fixture
def flash_package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    package: Any = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = plain_flash, plain_flash_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return package


@pytest.mark.parametrize("kind", KINDS)
def test_flash_equals_eager(kind: str, flash_package: types.ModuleType) -> None:
    layout = layouts(kind)
    actual, expected = run("flash", kind, grad=False)[0], run("eager", kind, grad=False)[0]
    if kind == "padded":  # padding queries may see anything finite
        assert layout is not None and layout.lengths is not None and torch.isfinite(actual).all()
        for r, n in enumerate(layout.lengths.tolist()):
            torch.testing.assert_close(actual[r, :n], expected[r, :n], atol=2e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


# -- packing


@pytest.mark.parametrize("weight", ["uniform", "inverse_t"])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_packed_samples_train_as_if_alone(family: str, weight: Any) -> None:
    """Two samples and padding in one row: loss and gradients are the sums of both alone."""
    model = load_model(GOLDEN / f"{family}_tiny").requires_grad_(True)
    generator = torch.Generator().manual_seed(5)
    sizes, b = (8, 12), 4
    ids = torch.randint(0, 490, (1, sum(sizes)), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.5
    p = torch.tensor([[0.4] * sizes[0] + [0.7] * sizes[1]])

    def batch(part: slice, extra: int = 0, **more: Any) -> TrainingBatch:
        def widen(t: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(t[:, part], (0, extra), value=value)

        noisy = ids.masked_fill(masked, model.mask_token_id)
        return TrainingBatch(
            widen(ids, 0), widen(ids, -100), widen(noisy, 0), widen(masked, False), widen(p, 1.0), b, **more
        )

    def gradients(*batches: TrainingBatch) -> list[Tensor]:
        model.zero_grad()
        loss = torch.stack([loss_sum(model, x, None, weight) for x in batches]).sum()
        loss.backward()
        return [loss.detach(), *(q.grad.clone() for q in model.parameters() if q.grad is not None)]

    first, second = slice(0, sizes[0]), slice(sizes[0], sum(sizes))
    samples = torch.tensor([[0] * sizes[0] + [1] * sizes[1] + [-1] * 3])
    positions = torch.cat([torch.arange(n) for n in (*sizes, 3)])[None]
    together = gradients(batch(slice(None), 3, sample_ids=samples, positions=positions))
    for actual, expected in zip(together, gradients(batch(first), batch(second)), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.drill  # compiles
def test_compiled_flex_serves_all_lengths_and_fails_at_the_limit_of_recompilations() -> None:
    """As on a GPU, forward only. Without the limit PyTorch would go on with all scores in memory, without a word."""
    flex = attention._flex(True)
    with torch.no_grad():
        for kind in KINDS[:-1]:
            layout = layouts(kind)
            assert layout is not None
            q, k, v = tensors(layout)
            out = flex(q, k, v, block_mask=attention._block_mask(layout), scale=0.25, enable_gqa=True)
            want = attention.eager_attention(q, k, v, layout, 0.25).transpose(1, 2)
            torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)
        with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="recompile_limit"):
            flex(q.double(), k.double(), v.double(), block_mask=None, scale=0.25, enable_gqa=True)
