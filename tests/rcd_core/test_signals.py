"""ReferenceSignals: fidelity, serialisation, errors."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcd_core import ReferenceSignals, UserError
from rcd_core.alpha import entropy
from rcd_core.dense_signals import DenseSignals, HiddenSignals
from rcd_core.ops.encode import TailSums, encode, tail_sums_fused, tail_sums_plain
from rcd_core.ops.top_k import largest, top_k
from rcd_core.signals import residual_state
from tests.rcd_core.tensor_sizes import LargestTensor

NUM, VOCAB, WIDTH = 7, 50, 12


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(NUM, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5


def test_fields_and_dtypes(logits: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits.to(torch.bfloat16), k=8)
    assert (s.topk_ids.dtype, s.topk_logprobs.dtype) == (torch.int32, torch.float16)
    assert (s.entropy.dtype, s.tail_mass.dtype) == (torch.float32, torch.float32)
    assert s.topk_ids.shape == s.topk_logprobs.shape == (NUM, 8)


def test_whole_distribution_is_accounted_for(logits: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits, k=8)
    mass = s.topk_logprobs.float().exp().sum(1) + s.tail_mass
    torch.testing.assert_close(mass, torch.ones(NUM), atol=2e-3, rtol=0)  # fp16 log-probabilities
    torch.testing.assert_close(s.entropy, entropy(logits))
    torch.testing.assert_close(s.alpha(VOCAB), entropy(logits) / math.log(VOCAB))


def test_all_kept_equals_dense(logits: torch.Tensor, table: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits, k=VOCAB)
    assert s.tail_mass.max() == 0
    dense = DenseSignals(logits).soft_embedding(table)
    torch.testing.assert_close(s.soft_embedding(table), dense, atol=4e-3, rtol=0)


def test_tail_mass_is_on_the_mean_of_the_other_ids(logits: torch.Tensor, table: torch.Tensor) -> None:
    """Written out for one position; the gradient reaches ids that were not kept."""
    s = ReferenceSignals.from_logits(logits, k=4)
    weight = table.clone().requires_grad_()
    delta = s.soft_embedding(weight)
    ids = s.topk_ids[0].long()
    left = [i for i in range(VOCAB) if i not in ids.tolist()]
    expected = (s.topk_logprobs[0].float().exp()[:, None] * table[ids]).sum(0) + s.tail_mass[0] * table[left].mean(0)
    torch.testing.assert_close(delta[0], expected, atol=1e-5, rtol=1e-5)
    delta[0].sum().backward()
    assert weight.grad is not None and (weight.grad[left[0]] > 0).all()


def test_more_entries_are_more_accurate(logits: torch.Tensor, table: torch.Tensor) -> None:
    dense = DenseSignals(logits).soft_embedding(table)
    errors = [(ReferenceSignals.from_logits(logits, k=k).soft_embedding(table) - dense).norm() for k in (1, 4, 16, 50)]
    assert errors == sorted(errors, reverse=True)


def test_temperatures_are_part_of_the_signals(logits: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits, k=8, alpha_temperature=2.0, delta_temperature=0.5)
    torch.testing.assert_close(s.entropy, entropy(logits / 2.0))
    expected = torch.log_softmax(logits / 0.5, -1).gather(1, s.topk_ids.long())
    torch.testing.assert_close(s.topk_logprobs.float(), expected, atol=2e-2, rtol=1e-3)
    back = ReferenceSignals.from_bytes(s.to_bytes())
    assert (back.alpha_temperature, back.delta_temperature) == (2.0, 0.5)
    with pytest.raises(UserError, match=r"1\.0.*2\.0"):
        ReferenceSignals.cat([s, ReferenceSignals.from_logits(logits, k=8)])


def same(a: ReferenceSignals, b: ReferenceSignals) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("topk_ids", "topk_logprobs", "entropy", "tail_mass"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(num=st.integers(1, 9), k=st.integers(1, 12), cut=st.integers(0, 9))
def test_serialise_slice_and_concatenate(num: int, k: int, cut: int) -> None:
    s = ReferenceSignals.from_logits(torch.randn(num, 12), k=k)
    assert same(ReferenceSignals.from_arrow(s.to_arrow()), s)
    assert same(ReferenceSignals.from_bytes(s.to_bytes()), s)
    assert same(ReferenceSignals.cat([s[:cut], s[cut:]]), s)
    wider = ReferenceSignals.cat([s, ReferenceSignals.from_logits(torch.randn(2, 12), k=12)])
    assert same(ReferenceSignals.from_arrow(wider.to_arrow()), wider), "padding is not stored but restored"


def test_from_hidden_equals_from_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 rows, the last one shorter. Small integers are exact in bf16 and full of ties, which would show if a
    row depended on its neighbours."""
    monkeypatch.setattr("rcd_core.ops.tiles.SMALLEST", 4 * 4 * VOCAB)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randint(-2, 3, (n, WIDTH), generator=generator).float() for n in (33, VOCAB))
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype), head.to(dtype)
        close(ReferenceSignals.from_hidden(h, w, 6, 0.9), ReferenceSignals.from_logits(h @ w.T, 6, 0.9))
    assert len(ReferenceSignals.from_hidden(hidden[:0], head, k=6)) == 0
    trained = ReferenceSignals.from_hidden(hidden.clone().requires_grad_(), head.clone().requires_grad_(), k=6)
    assert not trained.entropy.requires_grad


def close(a: ReferenceSignals, b: ReferenceSignals) -> None:
    assert torch.equal(a.topk_ids, b.topk_ids)
    for name in ("topk_logprobs", "entropy", "tail_mass"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-5)


def test_from_hidden_never_allocates_all_logits() -> None:
    """The largest tensor during encoding is a tile, not (N, V)."""
    hidden, head = torch.randn(1000, 4), torch.randn(40_000, 4)
    with LargestTensor() as largest:
        ReferenceSignals.from_hidden(hidden, head, k=4)
    assert 32 << 20 < largest.bytes <= 64 << 20


@pytest.mark.parametrize("rows", [1, 10, 35])
def test_whole_distributions_exist_a_tile_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 10 positions. One tile gives the bits of the whole matrix."""
    monkeypatch.setattr("rcd_core.ops.tiles.SMALLEST", 10 * 4 * 1000)
    generator = torch.Generator().manual_seed(0)
    hidden, head, table = (torch.randn(n, 4, generator=generator) for n in (rows, 1000, 1000))
    tiled = HiddenSignals(hidden, lambda h: h @ head.T, len(head), 1.5, 1.0)
    with LargestTensor() as largest:
        found = residual_state(tiled, table, "normalized_entropy", None)
    assert largest.bytes <= 10 * 4 * 1000
    dense = DenseSignals(hidden @ head.T, 1.5, 1.0)
    for x, y in zip(found, residual_state(dense, table, "normalized_entropy", None), strict=True):
        assert torch.equal(x, y) or rows > 10
        torch.testing.assert_close(x, y)
    assert torch.equal(tiled[:5].top1(), dense.top1()[:5]) and len(tiled) == rows
    torch.testing.assert_close(tiled.alpha(1000, "confidence"), dense.alpha(1000, "confidence"))
    torch.testing.assert_close(tiled.soft_embedding(table), dense.soft_embedding(table))


def test_a_small_tail_is_as_accurate_as_a_large_one() -> None:
    """Against float64. 1 - (sum of the kept) would be 0 or noise below 1e-7, as would an entropy from p log p."""
    z = torch.full((12, 1000), 0.0)
    z[:, :4] = torch.arange(5.0, 65.0, 5.0)[:, None] + torch.tensor([0.3, 0.2, 0.1, 0.0])
    s = ReferenceSignals.from_logits(z, k=4)
    exact = z.double()
    expected = (exact[:, 4:].logsumexp(1) - exact.logsumexp(1)).exp()
    assert expected.min() < 1e-20 and expected.max() > 0.5
    torch.testing.assert_close(s.tail_mass.double(), expected, rtol=1e-5, atol=0)
    sharp = torch.zeros(12, 1000)
    sharp[:, 0] = torch.arange(5.0, 65.0, 5.0)
    p = sharp.double().softmax(1)
    rest = p[:, 1:].sum(1)
    expected = -torch.log1p(-rest) * p[:, 0] - (p * sharp.double().log_softmax(1))[:, 1:].sum(1)
    torch.testing.assert_close(ReferenceSignals.from_logits(sharp, k=4).entropy.double(), expected, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num=st.integers(1, 40),
    vocab_size=st.sampled_from([1, 3, 64, 271, 1024, 1025, 5000, 5120]),
    k=st.sampled_from([1, 2, 8, 5000]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    grid=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_all_top_k_algorithms_agree(
    num: int, vocab_size: int, k: int, scale: float, grid: bool, dtype: torch.dtype, seed: int
) -> None:
    """Sorted rows, blocks, or torch.topk; with ties (a coarse grid of logits) and without."""
    z = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    z = (z.round() if grid else z).to(dtype)
    k = min(k, vocab_size)
    values, ids = top_k(z.float(), k)
    assert torch.equal(values, z.float().topk(k).values)
    assert torch.equal(z.float().gather(1, ids), values) and all(len(set(r)) == k for r in ids.tolist())
    logits, s = z.double(), ReferenceSignals.from_logits(z, k)
    p = logits.softmax(1)
    torch.testing.assert_close(s.entropy.double(), torch.special.entr(p).sum(1), rtol=1e-4, atol=1e-5)
    left = p.scatter(1, ids, 0.0).sum(1)
    torch.testing.assert_close(s.tail_mass.double(), left, rtol=1e-4, atol=1e-30)


def hard_logits() -> torch.Tensor:
    """Ties at the k-th entry, a flat row, impossible tokens, a clipped maximum, one possible token."""
    z = torch.randn(13, 300, generator=torch.Generator().manual_seed(0)) * 4
    z[0], z[1], z[2] = z[0].round(), 0.0, z[2] * 20
    z[2, 50:] = -math.inf
    z[3] = z[3].clamp(max=1.0)
    z[4, :] = -math.inf
    z[4, 7] = 2.0
    return z


def sums_agree(fused: TailSums, z: torch.Tensor, k: int, temperature: float) -> None:
    top, ids = top_k(z.float(), k)
    for a, b in zip(fused(z, top, ids, temperature), tail_sums_plain(z, top, ids, temperature), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_largest_is_the_first_of_equals_and_nan_before_all(dtype: torch.dtype) -> None:
    z = hard_logits().to(dtype)
    z[5, 100:200:50], z[6] = math.nan, -math.inf
    for rows in (z, z.T.contiguous().T, z[:, 3:]):
        values, ids = largest(rows)
        torch.testing.assert_close(values, rows.amax(-1), rtol=0, atol=0, equal_nan=True)
        first = [next(i for i, x in enumerate(row) if math.isnan(x) or x == max(row)) for row in rows.tolist()]
        first[5] = next(i for i, x in enumerate(rows[5].tolist()) if math.isnan(x))
        assert ids.tolist() == first


def test_top_k_covers_every_block_of_the_vocabulary() -> None:
    """The largest entries in the first, the last whole and the shorter last block."""
    z = torch.zeros(3, 64 * 100 + 5)
    for row, first in enumerate((0, 64 * 99, 64 * 100)):
        z[row, first : first + 4] = torch.tensor([1.0, 4.0, 2.0, 3.0])
    values, ids = top_k(z, 4)
    assert values.tolist() == [[4.0, 3.0, 2.0, 1.0]] * 3
    assert (ids - torch.tensor([0, 64 * 99, 64 * 100])[:, None]).tolist() == [[1, 3, 2, 0]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_sums_equal_plain_ones(dtype: torch.dtype) -> None:
    """The functions compiled for CUDA, on the CPU."""
    z = hard_logits().to(dtype)
    for k, temperature in ((1, 1.0), (8, 1.0), (300, 1.0), (8, 0.7)):
        sums_agree(tail_sums_fused, z, k, temperature)
        a, b = (encode(z, k, 1.0, temperature, way) for way in (tail_sums_fused, tail_sums_plain))
        torch.testing.assert_close(a.entropy, b.entropy)
        torch.testing.assert_close(a.tail, b.tail)


@pytest.mark.drill  # compiles C++ code; the same sums are tested above without the compiler
def test_compiled_sums_equal_plain_ones() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    sums_agree(torch.compile(tail_sums_fused), hard_logits(), 8, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu() -> None:
    hidden, head = torch.randn(500, 64), torch.randn(20_000, 64) / 4
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.to(dtype), head.to(dtype)
        logits = (h.cuda() @ w.cuda().T).cpu()
        a = ReferenceSignals.from_hidden(h.cuda(), w.cuda(), 32, 0.9).to("cpu")
        b = ReferenceSignals.from_logits(logits, 32, 0.9)
        torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.topk_logprobs, b.topk_logprobs, rtol=2e-3, atol=2e-3)


def test_adaptive_k_keeps_the_fewest_that_reach_the_mass(logits: torch.Tensor, table: torch.Tensor) -> None:
    k, mass = 20, 0.9
    s, full = ReferenceSignals.from_logits(logits, k, mass), ReferenceSignals.from_logits(logits, k)
    kept = torch.isfinite(s.topk_logprobs)
    p = torch.softmax(logits, 1).sort(1, descending=True).values
    for row, count in zip(p, kept.sum(1).tolist(), strict=True):
        assert row[:count].sum() >= mass or count == k
        assert count == 1 or row[: count - 1].sum() < mass
    assert 1 < kept.sum() < kept.numel(), "some are dropped, some are kept"
    assert s.topk_ids.shape == full.topk_ids.shape, "rectangular in memory"
    assert torch.equal(s.topk_ids[kept], full.topk_ids[kept]) and (s.topk_ids[~kept] == 0).all()
    mass_of_all = torch.softmax(logits, 1).gather(1, s.topk_ids.long()).masked_fill(~kept, 0).sum(1) + s.tail_mass
    torch.testing.assert_close(mass_of_all, torch.ones(NUM))
    assert torch.equal(s.entropy, full.entropy), "entropy is that of the whole distribution"
    assert len(s.to_arrow()["topk_ids"].combine_chunks().flatten()) == int(kept.sum()), "ragged in Arrow"
    assert same(ReferenceSignals.from_bytes(s.to_bytes()), s)
    for i, count in enumerate(kept.sum(1).tolist()):  # padding has weight 0; the mean is over all ids not kept
        alone = ReferenceSignals.from_logits(logits[i : i + 1], count)
        torch.testing.assert_close(s[i : i + 1].soft_embedding(table), alone.soft_embedding(table))
    one = ReferenceSignals.from_logits(logits, k, 1e-9)
    assert torch.isfinite(one.topk_logprobs).sum(1).tolist() == [1] * NUM, "at least one"
    everything = ReferenceSignals.from_logits(logits, VOCAB, 1.0)
    dense = DenseSignals(logits).soft_embedding(table)
    torch.testing.assert_close(everything.soft_embedding(table), dense, atol=4e-3, rtol=0)


def test_broken_logits_raise(logits: torch.Tensor, table: torch.Tensor) -> None:
    wide = torch.randn(4, 40_000)
    for rows in (logits, wide):
        for bad in (math.nan, math.inf):
            broken = rows.clone()
            broken[2, 3] = bad
            with pytest.raises(ValueError, match="row 2 .*NaN"):
                ReferenceSignals.from_logits(broken, k=8)
        nothing = rows.clone()
        nothing[1] = -math.inf
        with pytest.raises(ValueError, match="row 1 .*-inf"):
            ReferenceSignals.from_logits(nothing, k=8)
    impossible = logits.clone()
    impossible[:, 5:] = -math.inf
    s = ReferenceSignals.from_logits(impossible, k=8)
    assert torch.isfinite(s.soft_embedding(table)).all() and torch.isfinite(s.entropy).all()
    assert same(ReferenceSignals.from_arrow(s.to_arrow()), s)
    with pytest.raises(UserError, match="id [0-9]+ .* 10 rows"):
        ReferenceSignals.from_logits(logits, k=50).soft_embedding(table[:10])


def test_bad_arguments_raise_by_name(logits: torch.Tensor) -> None:
    for arguments, message in (
        ({"k": 0}, "k is 0"),
        ({"mass": 0.0}, "mass is 0.0"),
        ({"mass": 1.5}, "mass is 1.5"),
        ({"delta_temperature": 0.0}, "delta_temperature is 0.0"),
        ({"alpha_temperature": math.inf}, "alpha_temperature is inf"),
    ):
        with pytest.raises(UserError, match=message):
            ReferenceSignals.from_logits(logits, **arguments)
    with pytest.raises(UserError, match="int64"):
        ReferenceSignals.from_logits(logits.long())
    with pytest.raises(UserError, match=r"lm_head_weight \(50, 9\)"):
        ReferenceSignals.from_hidden(torch.randn(3, 8), torch.randn(50, 9))


def test_top1_rule_takes_the_top_token(logits: torch.Tensor, table: torch.Tensor) -> None:
    for signals in (DenseSignals(logits), ReferenceSignals.from_logits(logits, k=4)):
        _, delta = residual_state(signals, table, "top1", None)
        assert torch.equal(delta, table[logits.argmax(-1)])
