"""Training with several noisy blocks behind clean ones (MultiTF), against mbd-lms (vectors in tests/golden/multitf).

The authors' groups begin at position 0 and count the prompt's blocks, so that an answer block can lose sight of the
prompt. Ours begin at the first labelled block. `authors_view` restates theirs through TrainingBatch.num_clean.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rcd_core import TrainingBatch, training_loss
from rcd_core.attention import block_diffusion
from rcd_core.attention.backends import FUNCTIONS
from rcd_core.errors import UserError
from rcd_core.noise import FULLY_MASKED, NoiseSettings, chained, group_starts, mask_example, mask_examples
from rcd_core.training.data.batches import collate
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.data.signal_cache import noise_of, noise_record
from rcd_core.training.objective import IGNORED, masked_hidden, reference_signals
from rcd_core.training.settings import SignalRule
from tests.rcd_core.golden_models import GOLDEN, load_fp64

STORED = json.loads((GOLDEN / "multitf" / "multitf.json").read_text())
TENSORS = load_file(GOLDEN / "multitf" / "multitf.safetensors")
ROWS = [(batch, row) for batch in STORED["batches"] for row in batch["rows"]]
NAMES = [f"batch{batch['id']}_v{row['variant']}" for batch, row in ROWS]


def authors_view(
    sizes: list[int], block: int, prompt_length: int | None, content_length: int | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(first noisy block, number of clean blocks) that each block's noisy copy sees in the authors' code."""
    starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    numbers = np.arange(len(starts))
    if prompt_length is None or content_length is None:
        return starts, starts
    prompt = prompt_length // block
    answer = (numbers >= prompt) & (numbers < -(-content_length // block))
    return np.where(answer, np.maximum(starts, prompt), numbers), np.where(answer, starts, numbers)


def views(blocks: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], block: int) -> list[torch.Tensor]:
    return [torch.from_numpy(values.repeat(block))[None] for values in blocks]


@pytest.mark.parametrize("case", STORED["masks"], ids=lambda case: str(case["id"]))
def test_masks_are_the_authors(case: dict[str, Any]) -> None:
    length, block = case["L"], case["block"]
    seen = views(authors_view(case["sizes"], block, case["prompt_length"], case["content_length"]), block)
    every, one, positions = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length).long(), torch.arange(length)
    packed = block_diffusion(every, one, positions[None], block, *seen)
    kept = packed.source[0] + length * ~packed.noisy[0]
    wanted = TENSORS[f"mask{case['id']}_student"].bool()[kept][:, kept]
    assert torch.equal(packed.layout.visible()[0, 0], wanted)
    plain = block_diffusion(every, one, positions[None], block)
    kept = plain.source[0] + length * ~plain.noisy[0]
    assert torch.equal(plain.layout.visible()[0, 0], TENSORS[f"mask{case['id']}_teacher"].bool()[kept][:, kept])


@pytest.mark.parametrize(("batch", "row"), ROWS, ids=NAMES)
def test_losses_logits_and_gradients_are_the_authors(batch: dict[str, Any], row: dict[str, Any]) -> None:
    model = load_fp64("sdar_tiny").requires_grad_(True)
    name, block = f"batch{batch['id']}_v{row['variant']}", batch["block"]
    ids, noisy = (torch.tensor([values]) for values in (batch["input_ids"], row["noisy"]))
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[0, row["labels_at"]] = True
    p_mask = TENSORS[f"{name}_p_mask"].double()[None]
    seen = views(authors_view(row["sizes"], block, len(batch["prompt"]), batch["content_length"]), block)
    one = TrainingBatch(ids, ids, noisy, masked, p_mask, block, first_noisy=seen[0], num_clean=seen[1])
    logits = model.head(masked_hidden(model, one, None))
    torch.testing.assert_close(logits, TENSORS[f"{name}_logits_masked"].double(), atol=5e-4, rtol=0)
    loss = training_loss(model, one, weight="self_normalized")
    assert loss.item() == pytest.approx(row["loss_f64"], rel=1e-7)
    loss.backward()
    gradients = {name.removeprefix("backbone."): p.grad for name, p in model.named_parameters()}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}
    assert norms == pytest.approx(row["grad_norms"], rel=1e-4)


@pytest.mark.parametrize("batch", STORED["batches"], ids=lambda batch: str(batch["id"]))
def test_levels_within_a_group_are_the_authors_chain(batch: dict[str, Any]) -> None:
    """Their range is [0.001, 0.99] and their uniforms come per group: its floor, then its blocks."""
    low, margin, high = batch["noise"]["low"], batch["noise"]["margin"], batch["noise"]["high"]
    top = high - margin * (high - low)
    for row in batch["rows"]:
        starts = np.repeat(np.cumsum([0, *row["sizes"][:-1]]), row["sizes"])
        u, at = np.ones((3, len(starts))), 0
        for start, size in zip(np.unique(starts), row["sizes"], strict=True):
            u[0, start], u[1, start : start + size] = row["uniforms"][at], row["uniforms"][at + 1 : at + 1 + size]
            at += 1 + size
        assert low + (top - low) * chained(starts, u.ravel()) == pytest.approx(row["block_p"], abs=1e-6)


# -- ours

NOISE = NoiseSettings(block_length=4, layout="multi_block", group_blocks=3)


def example(prompt: int, length: int) -> np.ndarray[Any, Any]:
    return np.arange(length) >= prompt


@given(st.integers(0, 20), st.integers(1, 40), st.text(max_size=3), st.integers(0, 3), st.integers(2, 5))
def test_groups_start_at_the_prompts_end_and_cover_the_answer(
    prompt: int, answer: int, name: str, draw: int, most: int
) -> None:
    maskable = example(prompt, prompt + answer)
    starts = group_starts(maskable, name, draw, replace(NOISE, group_blocks=most))
    first = prompt // 4
    assert len(starts) == -(-len(maskable) // 4)
    assert list(starts[: first + 1]) == list(range(first + 1)), "prompt blocks are alone; a group begins behind them"
    sizes = np.unique(starts[first:], return_counts=True)[1]
    assert (np.diff(starts) >= 0).all() and sizes.max() <= most
    assert all(size >= 2 for size in sizes[1:-1])


def test_noise_rises_within_groups_and_some_blocks_are_fully_masked() -> None:
    full = masked_more = total = 0
    for number in range(300):
        maskable = example(6, 40)
        masked, p = mask_example(maskable, str(number), 0, NOISE)
        starts, levels = group_starts(maskable, str(number), 0, NOISE), p[::4]
        assert all(levels[k] >= levels[k - 1] for k in range(2, 10) if starts[k] == starts[k - 1])
        ends = [k for k in range(1, 10) if k == 9 or starts[k + 1] != starts[k]]
        full += sum(levels[k] == 1.0 for k in ends)
        total += len(ends)
        masked_more += int(masked[36:].all())
        assert not masked[:6].any()
    assert full / total == pytest.approx(FULLY_MASKED, abs=0.05) and masked_more > 0


def test_many_examples_at_once_are_the_same() -> None:
    parts = [example(3, 20), example(0, 9), example(11, 30)]
    offsets, names = np.cumsum([0, *map(len, parts)]), ["a", "b", "c"]
    masked, p = mask_examples(np.concatenate(parts), offsets, names, 1, NOISE)
    alone = [mask_example(part, name, 1, NOISE) for part, name in zip(parts, names, strict=True)]
    assert np.array_equal(masked, np.concatenate([m for m, _ in alone]))
    assert np.array_equal(p, np.concatenate([q for _, q in alone]))


def row(number: int, length: int, prompt: int, noise: NoiseSettings = NOISE) -> TrainingRow:
    generator = np.random.default_rng(number)
    ids, maskable = generator.integers(0, 490, length), example(prompt, length)
    masked, p = mask_example(maskable, str(number), 0, noise)
    return TrainingRow(number, str(number), 0, ids, np.where(maskable, ids, IGNORED), masked, p)


IDS: dict[str, Any] = {"mask_token_id": 511, "pad_token_id": 500, "block_length": 4}


def test_what_is_dropped_changes_nothing() -> None:
    """A dense computation with all 2 L tokens and the rule stated as a mask, against the packed one."""
    model = load_fp64("sdar_tiny")
    for number in range(6):
        one = row(number, 32, 5)
        batch, _ = collate([one], **IDS, noise=NOISE)
        starts = group_starts(one.labels != IGNORED, one.example_id, 0, NOISE).repeat(4)
        block = np.arange(32) // 4
        q, k = np.ix_(range(32), range(32))
        of_noisy = np.hstack([(block[k] >= starts[q]) & (block[k] <= block[q]), block[k] < starts[q]])
        of_clean = np.hstack([np.zeros((32, 32), dtype=bool), block[k] <= block[q]])
        mask = torch.from_numpy(np.vstack([of_noisy, of_clean]))[None, None]
        embeds = model.embedding(torch.cat([batch.noisy_ids, batch.input_ids], 1))
        positions = torch.arange(32).repeat(2)[None]
        model.config._attn_implementation = "sdpa"
        dense = model.hidden(embeds, positions, mask)[0, :32][batch.masked[0]]  # type: ignore[arg-type]
        model.config._attn_implementation = "rcd_sdpa"
        torch.testing.assert_close(masked_hidden(model, batch, None), dense, atol=1e-10, rtol=0)


def test_flex_sees_the_same() -> None:
    batch, _ = collate([row(number, 160, 9) for number in range(2)], **IDS, noise=NOISE)
    packed = batch.with_packed().packed
    assert packed is not None
    shape = (2, 2, packed.source.shape[1], 16)
    query, key, value = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        flex, eager = (FUNCTIONS[name](query, key, value, packed.layout, 0.25) for name in ("flex", "eager"))
    assert packed.layout.own_low is not None
    torch.testing.assert_close(flex, eager.view(flex.shape), atol=1e-5, rtol=0)


def test_packed_rows_are_as_alone_and_signals_follow_the_layout() -> None:
    model = load_fp64("sdar_tiny")
    rows = [row(0, 24, 5), row(1, 16, 2)]
    together = masked_hidden(model, collate_both(rows), None)
    alone = [masked_hidden(model, collate([one], **IDS, noise=NOISE)[0], None) for one in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=0)
    rule = SignalRule(top_k=4)
    plain, _ = collate([rows[0]], **IDS)
    grouped, _ = collate([rows[0]], **IDS, noise=NOISE)
    first, second = (reference_signals(model, batch, rule).entropy for batch in (plain, grouped))
    assert not torch.allclose(first, second), "the reference sees the noisy blocks, too"


def collate_both(rows: list[TrainingRow]) -> TrainingBatch:
    from rcd_core.training.data.batches import collate_packed

    return collate_packed([rows], **IDS, noise=NOISE)[0]


def test_it_is_the_state_of_several_live_blocks() -> None:
    """Hidden states in training are those of decoding with the same noisy blocks behind the same clean prefix."""
    model = load_fp64("sdar_tiny")
    noise = replace(NOISE, group_blocks=4)
    rows = (row(number, 24, 8, noise) for number in range(99))
    one = next(r for r in rows if group_starts(r.labels != IGNORED, r.example_id, 0, noise)[4] == 2)
    batch, _ = collate([one], **IDS, noise=noise)
    ids = torch.where(batch.masked, 511, batch.input_ids)[:, :20]  # clean prompt, then blocks 2 to 4 as they are
    seen = model.logits(ids, 4)  # block-causal, as a decoding pass over a cached prompt
    hidden = masked_hidden(model, batch, None)[: int(batch.masked[:, :20].sum())]
    torch.testing.assert_close(model.head(hidden), seen[batch.masked[:, :20]], atol=1e-10, rtol=0)


def test_the_manifest_restores_the_layout() -> None:
    assert noise_of(noise_record(NOISE)) == NOISE
    single = NoiseSettings(seed=3)
    assert noise_of(noise_record(single)) == single and "layout" not in noise_record(single)


@pytest.mark.parametrize("settings", [{"layout": "multi_block"}, {"group_blocks": 1}])
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"noise\.(layout|group_blocks)"):
        NoiseSettings(**settings)
