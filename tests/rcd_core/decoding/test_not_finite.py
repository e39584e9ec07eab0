"""A request whose predictions are NaN fails with the checkpoint and the layer; the others go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcd_core import Decoder, DecodeSettings, LocalReference, UserError, load_model
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.stream import Finished
from tests.rcd_core.checkpoints import GOLDEN, checkpoint

PLAIN = {"block_length": 4, "max_new_tokens": 8, "stop_token_ids": (), "residual": False}
POLICIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "random")


def broken(directory: Path, source: str, name: str, rows: slice = slice(None)) -> Any:
    """A golden checkpoint with NaN in some rows of a tensor."""
    file = checkpoint(directory, source) / "model.safetensors"
    whole = load_file(file)
    whole[name][rows] = float("nan")
    save_file(whole, file)
    return load_model(directory)


def settings(**changes: Any) -> DecodeSettings:
    return DecodeSettings(**{**PLAIN, **changes})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_policy_loops_for_ever(policy: str, temperature: float, tmp_path: Path) -> None:
    model = broken(tmp_path, "sdar_tiny", "lm_head.weight")
    bound = 0.5 if policy == "entropy_bounded" else None
    with pytest.raises(UserError, match=rf"{tmp_path}.* the head, whose weights"):
        Decoder(model).generate([[1, 2, 3]], settings(policy=policy, temperature=temperature, entropy_bound=bound))


@pytest.mark.parametrize(
    ("source", "name", "place"),
    [
        ("sdar_tiny", "lm_head.weight", "the head, whose weights"),
        ("sdar_tiny", "model.layers.1.mlp.up_proj.weight", "layer 1, whose weights"),
        ("sdar_tiny", "model.norm.weight", "the last norm, whose weights"),
        ("llada_tiny", "model.transformer.blocks.0.attn_out.weight", "layer 0, whose weights"),
        ("llada_tiny", "model.transformer.ff_out.weight", "the head, whose weights"),
    ],
)
def test_the_first_layer_is_named(source: str, name: str, place: str, tmp_path: Path) -> None:
    model = broken(tmp_path, source, name)
    for residual in ({}, {"residual": True, "start": "self", "residual_temperature": 1.0}):
        with pytest.raises(UserError, match=rf"2 requests .*{tmp_path}.*{place}"):
            Decoder(model).generate([[1, 2, 3], [4, 5]], settings(**residual))
        with pytest.raises(UserError, match=place):
            list(Decoder(model).stream([[1, 2, 3]], settings(**residual)))


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_the_other_requests_go_on_and_so_does_the_slot(family: str, fixed_shapes: bool, tmp_path: Path) -> None:
    """The embedding of token 7 is NaN. The slot of a request with it is taken by the next one, with the same result."""
    name = {"sdar": "model.embed_tokens.weight", "llada": "model.transformer.wte.weight"}[family]
    model = broken(tmp_path, f"{family}_tiny", name, slice(7, 8))
    prompts = [[1, 2, 3, 4, 5], [1, 7, 3, 4, 5, 6, 7, 8, 9], [9, 8], [1, 7, 2], [5, 6, 5, 6, 5]]
    sound = [0, 2, 4]
    want = Decoder(load_model(GOLDEN / f"{family}_tiny")).generate([prompts[i] for i in sound], settings())
    engine = Engine(model, None, max_batch=2, max_length=32, reuse_prefixes=True, fixed_shapes=fixed_shapes)
    requests = [make_sequence(model, p, settings(), infill=False, has_reference=False) for p in prompts]
    for request in requests:
        engine.add(request)
    for _ in range(100):
        engine.step()
    assert not engine.busy and engine.statistics.requests == 3
    assert [r.error is None for r in requests] == [i in sound for i in range(5)]
    assert [requests[i].output().token_ids for i in sound] == [w.token_ids for w in want]
    assert "the embedding, whose weights" in str(requests[1].error)


def test_answers_come_before_the_error(tmp_path: Path) -> None:
    model = broken(tmp_path, "sdar_tiny", "model.embed_tokens.weight", slice(7, 8))
    done = []
    with pytest.raises(UserError, match="1 requests"):
        for index, _ in Decoder(model).as_completed([[1, 2], [7], [3]], settings(), infill=False):
            done.append(index)
    assert sorted(done) == [0, 2]
    events = []
    with pytest.raises(UserError, match="1 requests"):
        for event in Decoder(model).stream([[1, 2], [7], [3]], settings()):
            events.append(event)
    assert sorted(e.index for e in events if isinstance(e, Finished)) == [0, 2]


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_reference_with_nan_fails_its_requests(top_k: int | None, tmp_path: Path) -> None:
    model = load_model(GOLDEN / "sdar_tiny")
    reference = LocalReference(broken(tmp_path, "sdar_tiny", "model.embed_tokens.weight", slice(7, 8)))
    warm = settings(residual=True, start="reference", residual_temperature=1.0, residual_top_k=top_k)
    decoder = Decoder(model, reference)
    want = decoder.generate([[1, 2, 3, 4, 5]], warm)[0].token_ids
    done = {}
    with pytest.raises(UserError, match="1 requests .*(reference|residual)"):
        for index, output in decoder.as_completed([[1, 2, 3, 4, 5], [1, 7, 3, 4, 5]], warm, infill=False):
            done[index] = output.token_ids
    assert done == {0: want}


def test_half_precision_that_overflows_fails(tmp_path: Path) -> None:
    """Finite weights, as of a checkpoint that was converted to fp16."""
    file = checkpoint(tmp_path, "sdar_tiny") / "model.safetensors"
    whole = load_file(file)
    whole["model.layers.1.mlp.down_proj.weight"] *= 30_000.0
    save_file(whole, file)
    with pytest.raises(UserError, match=r"float16.*layer 1\. If"):
        Decoder(load_model(tmp_path, dtype=torch.float16)).generate([[1, 2, 3]], settings())
