"""Quantised layers decode: what is exact stays exact, what is close is close, and what cannot run is named."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.serving.target import weights_id
from rcd_core import Decoder, DecodeSettings, UserError, load_model
from rcd_core.decode_settings import Weights
from rcd_core.families.quantise import is_quantised, weight_bytes

pytestmark = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = ("sdar_tiny", "llada_tiny", "dream/dream_tiny", "sdar_moe/sdar_moe_tiny")
KERNELS: tuple[Weights, ...] = ("int8", "fp8")  # those that torchao has for a CPU
ERROR = {"int8": 0.1, "fp8": 0.4}  # of random models, which amplify rounding


@pytest.mark.parametrize("weights", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_quantised_and_nothing_else(name: str, weights: Weights) -> None:
    whole, small = load_model(GOLDEN / name), load_model(GOLDEN / name, weights=weights)
    changed = {n for n, p in small.named_parameters() if is_quantised(p)}
    linear = {
        f"{n}.weight" for n, module in whole.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in n
    }
    assert changed == linear
    for n, p in whole.named_parameters():
        if n not in changed:
            assert torch.equal(p, small.get_parameter(n)), n
    assert small.dtype == whole.dtype and weight_bytes(small) < weight_bytes(whole)


@pytest.mark.parametrize("weights", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_computes_what_the_layers_compute(name: str, weights: Weights) -> None:
    """Decoding joins projections of plain layers, not of quantised ones; the tokens are those of the model's logits."""
    model = load_model(GOLDEN / name, weights=weights)
    settings = DecodeSettings(residual=True, start="zero", max_new_tokens=8, confidence_threshold=0.3, block_length=4)
    prompts = [[11, 12, 13, 14, 15], [21, 22, 23]]
    together = Decoder(model).generate(prompts, settings)
    alone = [Decoder(model).generate([prompt], settings)[0] for prompt in prompts]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    plain, ids = load_model(GOLDEN / name), torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18]])
    with torch.no_grad():
        exact, close = plain.logits(ids), model.logits(ids)
        assert 0 < (close - exact).norm() / exact.norm() < ERROR[weights]
        for n, p in model.named_parameters():
            if is_quantised(p):
                plain.get_parameter(n).copy_(p.dequantize())
        torch.testing.assert_close(close, plain.logits(ids), atol=2e-3, rtol=1e-3)
    assert [out.token_ids for out in Decoder(plain).generate(prompts, settings)] == [out.token_ids for out in together]


def test_quantised_models_have_an_identity_of_their_own() -> None:
    """A stream is not continued by a replica with other weights."""
    names = [weights_id(load_model(GOLDEN / "sdar_tiny", weights=w)) for w in ("full", "int8", "int8", "fp8")]
    assert names[1] == names[2] and len(set(names)) == 3


def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"'int4'.*cpu.*int8"):
            load_model(GOLDEN / "sdar_tiny", weights="int4")
    model: Any = load_model(GOLDEN / "sdar_tiny")
    model.ranks = type("Two", (), {"size": 2})()
    from rcd_core.families.quantise import quantise

    with pytest.raises(UserError, match="2 ranks"):
        quantise(model, "int8")
