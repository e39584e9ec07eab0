"""D2F's training, against its authors' code (vectors in tests/golden/d2f_train): levels, attention, both losses.

Their blocks are never fully masked (p at most .7), although decoding begins them so; ours sometimes are. Their levels
rise in equal shares of the longest sample of the batch, ours of the sample itself.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rcd_core import Decoder, DecodeSettings, TrainingBatch, UserError, load_model
from rcd_core.families.base import DiffusionModel
from rcd_core.families.llada import LLaDAModel
from rcd_core.noise import FULLY_MASKED, NoiseSettings, blocks_from_label, d2f_levels, mask_example, nested_masks
from rcd_core.ops.fused_loss import weighted_cross_entropy
from rcd_core.training.data.batches import collate, collate_packed
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.objective import IGNORED, loss_parts, masked_blocks, masked_hidden, normalizer, teacher_of
from rcd_core.training.settings import ResidualSettings, TrainSettings
from tests.rcd_core.golden_models import GOLDEN, load_fp64
from tests.rcd_core.training.helpers import write_examples

STORED = json.loads((GOLDEN / "d2f_train" / "d2f_train.json").read_text())
TENSORS = {k: v.double() for k, v in load_file(GOLDEN / "d2f_train" / "d2f_train.safetensors").items()}
CASES = STORED["losses"]
LOGITS = 5e-4  # their code ran in fp32, 1.8e-4 away from fp64 (README of the vectors)
NOISE = NoiseSettings(block_length=4, layout="d2f")
IDS: dict[str, Any] = {"mask_token_id": 505, "pad_token_id": 500, "block_length": 4}


@pytest.mark.parametrize("case", STORED["noise"], ids=lambda c: f"{c['B']}x{c['n_blocks']}")
def test_levels_are_the_authors(case: dict[str, Any]) -> None:
    found = d2f_levels(*levels(case))
    np.testing.assert_allclose(found, np.array(case["p"]), atol=1e-6)


def levels(case: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.array(case["u_first"], dtype=np.float64)[:, 0], np.array(case["u_incr"], dtype=np.float64)


def authors_batch(case: dict[str, Any]) -> TrainingBatch:
    """Masks of their random numbers, one list per block, sample after sample."""
    ids, b = torch.tensor(case["ids"]), case["block"]
    lists, p = iter(case["u_token"]), d2f_levels(*levels(case))
    masked, p_mask, blocks = (torch.zeros(ids.shape).to(t) for t in (torch.bool, torch.float64, torch.long))
    for row, prompt in enumerate(case["prompt_lengths"]):
        for number, start in enumerate(range(prompt, ids.shape[1], b)):
            part = (row, slice(start, min(start + b, ids.shape[1])))
            masked[part] = torch.tensor(next(lists)) < p[row, number]
            p_mask[part], blocks[part] = p[row, number], number + 1
    noisy = torch.where(masked, 505, ids)
    assert noisy.tolist() == case["noisy"] and int(masked.sum()) == case["n_masked"]
    return TrainingBatch(ids, ids, noisy, masked, p_mask, b, blocks=blocks)


class WithAdapters(nn.Module):
    """Their LoRA, by hand: W + 2 B A."""

    def __init__(self) -> None:
        super().__init__()
        self.model = load_fp64("llada_tiny")
        stored = {n.removeprefix("lora."): v for n, v in TENSORS.items() if n.startswith("lora.")}
        self.adapters = {name: nn.Parameter(value) for name, value in stored.items()}

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name in {n.rpartition(".")[0] for n in self.adapters}:
            ours = LLaDAModel.backbone_name(f"model.transformer.{name}.weight")
            base = self.model.backbone.get_parameter(ours)
            found[f"backbone.{ours}"] = base + 2 * self.adapters[f"{name}.B"] @ self.adapters[f"{name}.A"]
        return found


class Loss(nn.Module):
    """A loss as a module's forward, so that its weights can be replaced."""

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainingBatch, teacher: Any) -> tuple[Tensor, Tensor]:
        loss, _ = loss_parts(self.model, batch, None, "inverse_t_mean", teacher)
        with torch.no_grad():
            logits = self.model.head(masked_hidden(self.model, batch, None))
        return loss / normalizer(batch, "llada", "inverse_t_mean"), logits


@pytest.mark.parametrize("kind", ["self_align", "true_token"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c["id"]))
def test_losses_are_the_authors(case: dict[str, Any], kind: str) -> None:
    batch, student, want = authors_batch(case), WithAdapters(), case[kind]
    teacher = teacher_of(load_fp64("llada_tiny"), batch)
    name = f"case{case['id']}"
    assert teacher.head is not None
    found = teacher.hidden @ teacher.head.T
    torch.testing.assert_close(found, TENSORS[f"{name}_teacher_logits_masked"], atol=LOGITS, rtol=0)
    weights = {f"model.{n}": w for n, w in student.weights().items()}
    given = teacher if kind == "self_align" else None
    loss, logits = torch.func.functional_call(Loss(student.model), weights, (batch, given))
    torch.testing.assert_close(logits, TENSORS[f"{name}_student_logits_masked"], atol=LOGITS, rtol=0)
    assert loss.item() == pytest.approx(want["loss_f64"], rel=1e-6)
    loss.backward()
    for adapter, parameter in student.adapters.items():
        layer, _, letter = adapter.rpartition(".")
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(want[f"grad_norm_{letter}"][layer], rel=2e-4), adapter


# -- ours


def row(number: int, length: int, prompt: int) -> TrainingRow:
    ids = np.random.default_rng(number).integers(0, 490, length)
    maskable = np.arange(length) >= prompt
    masked, p = mask_example(maskable, str(number), 0, NOISE)
    return TrainingRow(number, str(number), 0, ids, np.where(maskable, ids, IGNORED), masked, p)


def test_levels_rise_from_the_prompts_end_and_some_blocks_are_fully_masked() -> None:
    full = 0
    for number in range(400):
        maskable = np.arange(30) >= 7
        blocks = blocks_from_label(maskable, NOISE)
        assert blocks[:7].tolist() == [0] * 7 and blocks[7:15].tolist() == [1] * 4 + [2] * 4
        masked, p = mask_example(maskable, str(number), 0, NOISE)
        levels = np.array([p[blocks == b][0] for b in range(1, blocks.max() + 1)])
        assert (np.diff(levels) >= 0).all() and levels[0] >= 0.2
        assert (levels[levels < 1] <= 0.701).all() and masked[(p == 1) & maskable].all()
        full += bool((levels == 1).any())
        (noisier,) = nested_masks(maskable, str(number), 0, NOISE, [0.1])
        assert not (masked & ~noisier).any()
    assert full / 400 == pytest.approx(FULLY_MASKED, abs=0.07)


def test_packed_rows_are_as_alone_with_their_own_groups() -> None:
    model, rows = load_fp64("llada_tiny"), [row(0, 24, 5), row(1, 16, 2)]
    batch, _ = collate_packed([rows], **IDS, noise=NOISE)
    alone = [collate([one], **IDS, noise=NOISE)[0] for one in rows]
    parts = torch.cat([masked_hidden(model, one, None) for one in alone])
    torch.testing.assert_close(masked_hidden(model, batch, None), parts, atol=1e-10, rtol=0)
    groups = masked_blocks(model, batch).tolist()
    want = [(number, int(b)) for number, one in enumerate(alone) for b in one.blocks[one.masked]]  # type: ignore[index]
    assert len(set(zip(groups, want, strict=True))) == len(set(groups)) == len(set(want))


def test_it_is_the_state_of_several_live_blocks() -> None:
    """The predictions of a decoding pass over the prompt and two live blocks are those of training."""
    model, prompt = load_fp64("llada_tiny"), [5, 6, 7, 8, 9]
    s = DecodeSettings(
        block_length=4, max_new_tokens=8, max_live_blocks=2, block_add_threshold=0.0, confidence_threshold=0.9,
        policy="low_confidence_dynamic", stop_token_ids=(), trace=True,
    )  # fmt: skip
    out = Decoder(model).generate([prompt], s)[0]
    number = next(i for i, step in enumerate(out.steps) if min(step.masked) < 9 <= max(step.masked))
    step, decoded = out.steps[number], torch.tensor([out.canvas_ids])
    masked = torch.zeros_like(decoded, dtype=torch.bool)
    masked[0, step.masked] = True
    blocks = torch.tensor([[0] * 5 + [1] * 4 + [2] * 4])
    noisy = torch.where(masked, 505, decoded)
    batch = TrainingBatch(decoded, decoded, noisy, masked, torch.ones(decoded.shape), 4, blocks=blocks)
    p = torch.softmax(model.head(masked_hidden(model, batch, None)), -1)
    assert p.argmax(-1).tolist() == step.argmax
    np.testing.assert_allclose(p.amax(-1).detach(), step.confidence, atol=1e-9)


def test_a_teacher_in_the_fused_loss_is_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, weights, other, others = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 5), (11, 5), (7,), (7, 3), (11, 3))
    )
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(True), head.clone().requires_grad_(True)
        if fused:
            loss, _ = weighted_cross_entropy(h, w, torch.zeros(7).long(), weights.abs(), 3, (other, others))
        else:
            target = torch.softmax(other @ others.T, -1)
            loss = (-(target * torch.log_softmax(h @ w.T, -1)).sum(-1) * weights.abs()).sum()
        loss.backward()
        results.append((loss, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_examples(tmp_path_factory.mktemp("examples"), 20)


def distilled(examples: str, family: str, noise: NoiseSettings, **options: Any) -> list[float]:
    """Gradient norms of a training whose teacher is its own start."""
    torch.set_num_threads(1)
    model, teacher = (load_model(GOLDEN / f"{family}_tiny") for _ in range(2))
    model.requires_grad_(True)
    logged: list[Any] = []
    settings = TrainSettings(
        steps=3, batch_size=4, learning_rate=1e-3, log_every=1, loss_weight="inverse_t_mean", distill=True
    )
    options = {"reference": teacher, **options}
    plain = ResidualSettings(source="none", dropout=0.0)
    callbacks = Callbacks(logged.append, lambda step, save: None)
    train(model, ExampleSource([examples], noise), settings, plain, 4, callbacks, noise=noise, **options)
    return [line["grad_norm"] for line in logged]


def test_a_teacher_with_the_same_attention_teaches_nothing_and_another_does(examples: str) -> None:
    assert distilled(examples, "sdar", NoiseSettings())[0] < 1e-3
    assert distilled(examples, "llada", NoiseSettings())[0] < 1e-3
    assert distilled(examples, "llada", NOISE)[0] > 0.1


def test_what_makes_no_sense_is_refused(examples: str) -> None:
    with pytest.raises(UserError, match=r"train\.distill is true"):
        distilled(examples, "llada", NOISE, reference=None)
    with pytest.raises(UserError, match=r"noise\.layout is d2f"):
        distilled(examples, "sdar", NOISE)
    with pytest.raises(UserError, match=r"noise\.layout is multi_block"):
        distilled(examples, "llada", replace(NOISE, layout="multi_block"))
    with pytest.raises(UserError, match=r"noise\.block_length 8"):
        distilled(examples, "llada", replace(NOISE, block_length=8))
    for family, layout in (("sdar", "d2f"), ("llada", "multi_block")):  # in the stage signals, too
        batch, _ = collate([row(0, 24, 5)], **IDS, noise=replace(NOISE, layout=layout))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"noise\.layout is {layout}"):
            masked_hidden(load_fp64(f"{family}_tiny"), batch, None)
