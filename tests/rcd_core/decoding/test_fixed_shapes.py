"""Passes of fixed shape, as a GPU captures them: few shapes, no host synchronisation. Here they are called directly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rcd_core import DecodeSettings
from rcd_core.decoding.cuda_graphs import GraphCache
from rcd_core.decoding.engine import Engine
from rcd_core.ops import encode, top_k
from tests.rcd_core.decoding.test_decoding import FAMILIES, any_settings, decoder, many, prompts
from tests.rcd_core.decoding.test_engine import engine, request, run

Request = tuple[list[int], DecodeSettings]


def decode(family: str, several: list[Request], fixed: Engine) -> list[Any]:
    return run(fixed, *(request(family, prompt, settings) for prompt, settings in several))


def fixed_engine(family: str) -> Engine:
    return engine(family, max_batch=5, fixed_shapes=True)


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_fixed_shapes_change_no_token(family: str, data: st.DataObject) -> None:
    """The extra rows, keys and positions change no result."""
    several = data.draw(st.lists(st.tuples(prompts, any_settings(family)), min_size=1, max_size=7))
    found = decode(family, several, fixed_engine(family))
    for (prompt, s), out in zip(several, found, strict=True):
        alone = decoder(family).generate([prompt], s)[0]
        assert out.token_ids == alone.token_ids and out.num_forwards.denoise == alone.num_forwards.denoise


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("own", [{"cache": "prefix"}, {"cache": "dual"}, {"max_live_blocks": 2}, {"cache": "none"}])
def test_guidance_of_one_request_leaves_the_others_alone(own: dict[str, Any], fixed: bool) -> None:
    """Its passes without a prompt write no page of theirs, and passes of fixed shape find its states."""
    plain = DecodeSettings(block_length=4, max_new_tokens=24, stop_token_ids=())
    several = [([*range(20, 52)], replace(plain, **own)), ([7, 8, 9], replace(plain, cfg_scale=1.5, cache="none"))]
    found = decode("llada", several, engine("llada", max_batch=5, fixed_shapes=fixed))
    for (prompt, s), out in zip(several, found, strict=True):
        assert out.token_ids == decoder("llada").generate([prompt], s)[0].token_ids


class Recorded(GraphCache):
    """Records the keys, and runs the warmup first, as a capture does; it must change nothing."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.keys: list[Any] = []

    def __call__(self, key: Any, numbers: Any, warmup_inputs: Any, run: Any) -> torch.Tensor:
        if key not in self.keys:
            for _ in range(2):
                run(torch.from_numpy(warmup_inputs))
        self.keys.append(key)
        return super().__call__(key, numbers, warmup_inputs, run)


GREEDY = DecodeSettings(block_length=4, max_new_tokens=24, stop_token_ids=(), policy="low_confidence_static")
RESIDUAL = replace(GREEDY, residual=True, start="zero")


@pytest.mark.parametrize("s", [GREEDY, RESIDUAL, replace(RESIDUAL, residual_top_k=8)], ids=["seqd", "dense", "sparse"])
def test_few_shapes_occur_and_the_warmup_changes_nothing(s: DecodeSettings) -> None:
    several = [(list(range(3, 3 + n)), replace(s, max_new_tokens=8 + n)) for n in (4, 9, 17, 22, 27)]
    e = fixed_engine("sdar")
    e._runner.graphs = recorded = Recorded()
    found = decode("sdar", several, e)
    assert len(recorded.keys) > 3 * len(set(recorded.keys)), "keys repeat"
    for (prompt, settings), out in zip(several, found, strict=True):
        assert out.token_ids == decoder("sdar").generate([prompt], settings)[0].token_ids


@pytest.mark.parametrize("s", [GREEDY, RESIDUAL, replace(RESIDUAL, residual_top_k=8)], ids=["seqd", "dense", "sparse"])
def test_a_pass_never_synchronises_with_the_host(s: DecodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which have a shape but no content, reading a value fails, as it would during a capture."""
    # The GPU path: no sorting by numpy, and sums that torch.compile fuses.
    monkeypatch.setattr(top_k, "_SORTED_VOCAB", 0)
    monkeypatch.setattr(encode, "tail_sums_plain", encode.tail_sums_fused)

    class Checked(GraphCache):
        checked = 0

        def __call__(self, key: Any, numbers: Any, warmup_inputs: Any, run: Any) -> torch.Tensor:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                run(mode.from_tensor(torch.from_numpy(numbers)))
            self.checked += 1
            return super().__call__(key, numbers, warmup_inputs, run)

    e = fixed_engine("sdar")
    e._runner.graphs = checked = Checked(torch.device("cpu"))
    assert e._runner.forward.cache and e._runner.sampler.vocabulary.table.sum is not None, "made before the pass"
    out = decode("sdar", [([3, 4, 5, 6], s)], e)[0]
    assert checked.checked == out.num_forwards.prefill + 2 * out.num_forwards.denoise  # layers, and the head

    def reads_a_value(numbers: torch.Tensor) -> torch.Tensor:
        return numbers if bool(numbers[0] > 0) else -numbers

    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        reads_a_value(mode.from_tensor(torch.from_numpy(np.ones(2, dtype=np.int64))))
