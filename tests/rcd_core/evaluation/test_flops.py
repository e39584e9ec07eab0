"""The FLOPs formula against torch's count of a forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rcd_core import Decoder, DecodeSettings, new_model
from rcd_core.evaluation.flops import pass_flops, reference_weight, shape_of
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig

VOCAB, MASK = 61, 60
SIZES = ModelConfig(
    family="sdar", hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, head_dim=16
)
SMALLER = replace(SIZES, hidden_size=16, num_layers=1)


def model_of(config: ModelConfig, block_length: int = 8) -> DiffusionModel:
    info = CheckpointInfo(MASK, (), 0, block_length, {})
    return new_model(config, vocab_size=VOCAB, info=info, seed=0, attention="eager")


def counted(model: DiffusionModel, length: int, predicted: int) -> float:
    """FLOPs that torch counts in one pass over `length` tokens."""
    ids = torch.zeros((1, length), dtype=torch.int64)
    positions = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.hidden(model.embedding(ids), positions)
        model.head(hidden[0, :predicted])
    return float(counter.get_total_flops())


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_the_formula_is_what_torch_counts(family: str) -> None:
    heads = {"num_kv_heads": 4, "head_dim": None} if family == "llada" else {}
    model = model_of(replace(SIZES, family=family, **heads))
    for length, predicted in ((8, 8), (24, 5)):
        rotary = 2 * length * (shape_of(model).head_dim // 2)  # positions times frequencies, once per pass
        flops = pass_flops(shape_of(model), queries=length, keys=length, predicted=predicted)
        assert flops == pytest.approx(counted(model, length, predicted), abs=rotary)


def decoded(model: DiffusionModel, reference: DiffusionModel, settings: DecodeSettings, prompt: int = 8) -> float:
    decoder = Decoder(model, reference)
    ids = [3] * prompt
    (done,) = decoder.generate([ids], settings)
    return reference_weight(decoder.check(ids, settings), done, shape_of(reference))


SETTINGS = DecodeSettings(
    residual=True, start="reference", alpha="normalized_entropy", max_new_tokens=16, confidence_threshold=1.0,
    stop_token_ids=(),
)  # fmt: skip


def test_weight_of_a_block_by_hand() -> None:
    """Two blocks of 8 behind a prompt of 8, one token a pass: 16 and 24 keys, 8 masked for the reference and on average
    (8 + 1) / 2 for the target."""
    model, reference = model_of(SIZES), model_of(SMALLER)
    reference_flops, target_flops = (
        sum(pass_flops(shape_of(m), queries=8, keys=keys, predicted=predicted) for keys in (16, 24))
        for m, predicted in ((reference, 8), (model, 4.5))
    )
    assert decoded(model, reference, SETTINGS) == pytest.approx(reference_flops / target_flops)


def test_a_model_as_its_own_reference_costs_a_pass_and_more_of_the_head() -> None:
    model = model_of(SIZES)
    one_pass = replace(SETTINGS, confidence_threshold=0.0)  # all 8 in one pass: both passes are equal
    assert decoded(model, model, one_pass) == pytest.approx(1.0)
    assert decoded(model, model, SETTINGS) > 1.0
    assert decoded(model, model, replace(SETTINGS, residual_source="reference")) == pytest.approx(1.0)


def test_without_a_cache_both_passes_see_the_whole_canvas() -> None:
    """LLaDA's reference pass processes the whole canvas; with a cache the target's later passes do not."""
    llada = replace(SIZES, family="llada", num_kv_heads=4, head_dim=None)
    model, reference = model_of(llada), model_of(replace(llada, num_layers=1))
    weights = [decoded(model, reference, replace(SETTINGS, cache=cache)) for cache in ("none", "prefix", "dual")]
    assert weights[0] < weights[1] < weights[2]
    assert 0.4 < weights[0] < 0.7, "half of the layers, and the head"
