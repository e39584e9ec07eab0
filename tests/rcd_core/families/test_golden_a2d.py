"""dLLM's a2d models against its samplers (vectors in tests/golden): forward passes, schedule, BD3LM and MDLM, losses.

Models are in fp64. Left out: shifted logits, which no released model has; guidance of BD3LM; answers that end within a
block, whose canvas our engine rounds up; a padding id that hides tokens.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rcd_core import Decoder, DecodeSettings, TrainingBatch, load_model, training_loss
from rcd_core.decoding.policies import linear_commits
from rcd_core.families.base import DiffusionModel
from tests.rcd_core.decoding.test_golden_decoding import AUTHORS
from tests.rcd_core.families.overfit import overfit
from tests.rcd_core.golden_models import GOLDEN, load_fp64

BACKBONES = ("qwen3", "qwen2", "llama")
STORED = {name: json.loads((GOLDEN / "a2d" / f"{name}_vectors.json").read_text()) for name in BACKBONES}
CASES = [
    (name, case)
    for name in BACKBONES
    for case in STORED[name]["generate"]
    if not case["right_shift_logits"]
    and not (case["sampler"] == "bd3lm" and case["cfg_scale"])
    and case["max_new_tokens"] % case["block_size"] == 0
    and case["ids"]["pad"] == 249
]


def checkpoint(directory: Path, name: str, sampler: str, **changes: Any) -> Path:
    """With the mask id, which released models have in their tokenizer, and the field that decides how it decodes."""
    source = GOLDEN / "a2d" / f"{name}_tiny"
    field = {"block_size" if sampler == "bd3lm" else "block_length": 4}
    config = json.loads((source / "config.json").read_text()) | {"mask_token_id": 255} | field | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return directory


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def model(name: str, sampler: str) -> DiffusionModel:
        directory = checkpoint(tmp_path_factory.mktemp("a2d"), name, sampler)
        return load_fp64(str(directory))

    return model


def vectors(name: str) -> dict[str, torch.Tensor]:
    stored = load_file(GOLDEN / "a2d" / f"{name}_vectors.safetensors")
    return {k: v.double() if v.is_floating_point() else v for k, v in stored.items()}


@pytest.mark.parametrize("name", BACKBONES)
def test_forward(name: str, load: Any) -> None:
    v = vectors(name)
    whole = load(name, "mdlm")
    torch.testing.assert_close(whole.logits(v["fwd_ids"]), v["fwd_logits"], atol=AUTHORS, rtol=0)
    visible = v["pad_attention_mask"].bool()
    padded = whole.logits(v["pad_ids"], attention_mask=v["pad_attention_mask"])
    torch.testing.assert_close(padded[visible], v["pad_logits"][visible], atol=AUTHORS, rtol=0)
    blocks = [int(match[1]) for k in v if (match := re.fullmatch(r"block(\d+)_ids", k))]
    for b in blocks:
        want = v[f"block{b}_logits"][0]
        found = load(name, "bd3lm").logits(v[f"block{b}_ids"][:1], b)[0]
        torch.testing.assert_close(found, want, atol=AUTHORS, rtol=0)


def test_linear_schedule() -> None:
    for key, counts in STORED["qwen3"]["num_transfer_table"].items():
        assert linear_commits(*map(int, key.split(","))) == counts, key


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}{c['id']}-{c['sampler']}" for n, c in CASES])
def test_decodes(name: str, case: dict[str, Any], load: Any) -> None:
    """A batch of prompts of several lengths. An EOS that every row has in a finished block ends dLLM's batch; ours ends
    each row by itself, so up to there."""
    model = load(name, case["sampler"])
    b, total = case["block_size"], case["max_new_tokens"]
    settings = DecodeSettings(
        block_length=b,
        denoising_steps=-(-case["steps_arg"] // (total // b)),
        max_new_tokens=total,
        policy="low_confidence_static",
        cfg_scale=case["cfg_scale"],
        stop_token_ids=(),
        trace=True,
    )
    outs = Decoder(model).generate(case["prompts"], settings)
    passes = [s for s in case["steps"] if s["kind"] != "prefix"]
    stopped = "eos id" in case.get("note", "")
    for row, (prompt, out) in enumerate(zip(case["prompts"], outs, strict=True)):
        final = case["final_ids"][row]
        pads = 0
        if case["sampler"] == "bd3lm":
            pads = next(s["start"] for s in passes) - len(prompt)  # on the left
        final = final[pads : pads + len(prompt) + total]
        assert out.canvas_ids[: len(final)] == final
        expected = [s["rows"][row] for s in passes if s["rows"][row]["masked"]]
        assert len(out.steps) == len(expected) or stopped
        for found, want in zip(out.steps, expected, strict=not stopped):
            # MDLM reports the masks of the whole canvas, and commits in the current block.
            inside = [i for i, at in enumerate(want["masked"]) if at - pads in found.masked]
            assert found.masked == [want["masked"][i] - pads for i in inside]
            assert found.argmax == [want["argmax"][i] for i in inside]
            assert sorted(found.committed) == sorted(at - pads for at in want["committed"])
            conf = torch.tensor([want["conf"][i] for i in inside], dtype=torch.float64)
            torch.testing.assert_close(torch.tensor(found.confidence).double(), conf, atol=AUTHORS, rtol=0)


@pytest.mark.parametrize("sampler", ["bd3lm", "mdlm"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_batch_decodes_as_each_request_alone(name: str, sampler: str, load: Any) -> None:
    """With residuals, warm starts and prompts of every length within a block; cached passes equal whole ones."""
    model = load(name, sampler)
    decoder = Decoder(model, reference=None)
    prompts = [[11, 12, 13, 14, 15], [7], [3, 1, 4, 1, 5, 9, 2, 6], [2, 3], [1, 2, 3]]
    for start in ("zero", "self"):
        s = DecodeSettings(
            block_length=4, max_new_tokens=12, confidence_threshold=0.3, residual=True, start=start, alpha="one"
        )  # fmt: skip
        together = decoder.generate(prompts, s)
        for prompt, out in zip(prompts, together, strict=True):
            assert decoder.generate([prompt], s)[0].token_ids == out.token_ids
        if sampler == "bd3lm":
            whole = decoder.generate(prompts, DecodeSettings(**{**vars(s), "cache": "none"}))
            assert [o.token_ids for o in whole] == [o.token_ids for o in together]


@pytest.mark.parametrize("sampler", ["bd3lm", "mdlm"])
@pytest.mark.parametrize("name", BACKBONES)
def test_exported_loaded_and_trained(name: str, sampler: str, tmp_path: Path) -> None:
    """Bit for bit, as the same way of decoding; and it overfits a batch with residual inputs."""
    first = load_model(checkpoint(tmp_path / "one", name, sampler))
    first.save_pretrained(tmp_path / "two")
    again = load_model(tmp_path / "two")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("two", "one"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert type(first) is type(again) and first.info == again.info
    assert overfit(again, 240, 60) < 0.2


def test_the_name_decides_where_config_json_does_not(tmp_path: Path) -> None:
    for name, sees_all in (("Qwen3-0.6B-diffusion-mdlm-v0.1", True), ("Qwen3-0.6B-diffusion-bd3lm-v0.1", False)):
        directory = checkpoint(tmp_path / name, "qwen3", "bd3lm")
        config = json.loads((directory / "config.json").read_text())
        del config["block_size"]
        (directory / "config.json").write_text(json.dumps(config))
        model = load_model(directory)
        assert model.whole_canvas == sees_all and model.info.block_length == 32


TRAINED = [
    (name, case)
    for name in BACKBONES
    for case in STORED[name]["train"]
    if not case.get("right_shift_logits") and not case["attention_mask_given"]
]


@pytest.mark.parametrize(("name", "case"), TRAINED, ids=[f"{n}-{c['name']}" for n, c in TRAINED])
def test_losses(name: str, case: dict[str, Any], load: Any) -> None:
    """dLLM's `scheduler` weight 1 / (t + 1e-6): over the maskable tokens of the batch (`token`) where blocks are, as
    SDAR, and over each sample's own (`sequence`) elsewhere, as LLaDA. dLLM's default is `token` for both."""
    v, stem = vectors(name), case["name"]
    model = load(name, case["trainer"]).train()
    masked = v[f"{stem}_masked"].bool()
    batch = TrainingBatch(
        input_ids=v[f"{stem}_input_ids"],
        labels=v[f"{stem}_labels"],
        noisy_ids=v[f"{stem}_noisy_ids"],
        masked=masked,
        p_mask=v[f"{stem}_t"] + 1e-6,
        block_length=case.get("block_size", 4),
    )
    loss = training_loss(model, batch)
    want = case["losses"]["scheduler_token" if case["trainer"] == "bd3lm" else "scheduler_sequence"]
    assert loss.item() == pytest.approx(want, rel=1e-5)
    model.zero_grad()
    loss.backward()
    if case["trainer"] == "bd3lm":
        gradient = model.backbone.model.norm.weight.grad
        torch.testing.assert_close(gradient, v[f"{stem}_grad_norm_weight"], rtol=1e-3, atol=2e-5)
    model.eval()
