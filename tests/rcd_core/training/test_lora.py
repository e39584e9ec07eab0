"""Adapters: only they are trained, merged they are the same model, switched off they are the base."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from rcd_core import UserError, load_model, training_loss
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.lora import adapters_off, add_adapters, export_adapter, merged
from rcd_core.training.objective import reference_signals
from rcd_core.training.settings import LoraSettings, ResidualSettings, SignalRule, TrainSettings
from tests.rcd_core.training.helpers import BLOCK, GOLDEN, spawn, write_examples

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
LORA = LoraSettings(rank=4, alpha=8.0)
ONLINE = ResidualSettings(source="online", dropout=0.25)
NOISE = NoiseSettings(draws=2)


def settings(**changes: Any) -> TrainSettings:
    plain: dict[str, Any] = {"steps": 8, "batch_size": 6, "learning_rate": 1e-2, "log_every": 4, "checkpoint_every": 3}
    return TrainSettings(**{**plain, "lora": LORA, **changes})


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_examples(tmp_path_factory.mktemp("examples"), 20)


def run(
    examples: str, s: TrainSettings, family: str = "sdar", residual: ResidualSettings = ONLINE, **options: Any
) -> tuple[DiffusionModel, dict[str, torch.Tensor], list[Any]]:
    """(the model with its adapters, the weights that train returns, log lines)."""
    torch.set_num_threads(1)
    model = load_model(GOLDEN / f"{family}_tiny").requires_grad_(True)
    logged: list[Any] = []
    callbacks = Callbacks(logged.append, options.pop("checkpoint", lambda step, save: None))
    if residual.source == "online" and "reference" not in options:
        options["own_reference"] = True
    noise = options.pop("noise", NOISE)
    source = ExampleSource([examples], noise)
    weights = train(model, source, s, residual, BLOCK, callbacks, noise=noise, **options)
    return model, weights, logged


def loss_of(model: DiffusionModel, examples: str) -> torch.Tensor:
    """With residual inputs, on four rows."""
    source = ExampleSource([examples], NOISE)
    ids = {"mask_token_id": model.mask_token_id, "pad_token_id": 500, "block_length": BLOCK}
    batch, _ = collate([source.row(index) for index in range(4)], **ids)
    other = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    with torch.no_grad():
        return training_loss(model, batch, reference_signals(other, batch, SignalRule()))


def test_only_adapters_are_trained_and_merged_they_are_the_same_model(examples: str) -> None:
    before = load_model(GOLDEN / "sdar_tiny")
    model, weights, logged = run(examples, settings(steps=30))
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert {name.rpartition(".lora_")[1] or name for name in weights} == {".lora_", "mask_shift"}
    for name, tensor in before.backbone.state_dict().items():
        inside = name.removesuffix(".weight") + ".base_layer.weight"
        kept = model.backbone.state_dict()
        assert torch.equal(kept.get(name, kept.get(inside)), tensor), "the base is frozen"
    assert weights["mask_shift"].abs().max() > 0
    whole = merged(load_model(GOLDEN / "sdar_tiny"), weights, LORA)
    model.eval()
    torch.testing.assert_close(loss_of(whole, examples), loss_of(model, examples), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(loss_of(whole, examples), loss_of(before, examples), rtol=1e-2)


def test_adapters_off_is_the_base(examples: str) -> None:
    model, _, _ = run(examples, settings())
    ids = torch.randint(0, 490, (2, 12), generator=torch.Generator().manual_seed(0))
    base = load_model(GOLDEN / "sdar_tiny")
    with torch.no_grad():
        with adapters_off(model):
            assert torch.equal(model.logits(ids, 4), base.logits(ids, 4)) and model.mask_shift is None
        assert not torch.allclose(model.logits(ids, 4), base.logits(ids, 4), atol=1e-3)
    assert model.mask_shift is not None and model.mask_shift.requires_grad


def test_the_base_in_memory_is_as_good_a_reference_as_a_second_copy(examples: str) -> None:
    _, own, _ = run(examples, settings())
    _, copy, _ = run(examples, settings(), reference=load_model(GOLDEN / "sdar_tiny"))
    assert own.keys() == copy.keys() and all(torch.equal(own[name], copy[name]) for name in own)


def test_the_base_in_memory_is_as_good_a_teacher_as_a_second_copy(examples: str) -> None:
    """D2F's distillation: the adapters learn, under blocks, what the base predicts from the whole canvas."""
    noise = NoiseSettings(block_length=BLOCK, layout="d2f")
    plain = ResidualSettings(source="none", dropout=0.0)
    s = settings(distill=True, loss_weight="inverse_t_mean")
    found = []
    for options in ({"own_reference": True}, {"reference": load_model(GOLDEN / "llada_tiny")}):
        _, weights, _ = run(examples, s, "llada", plain, noise=noise, **options)
        found.append(weights)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("residual", [ONLINE, ResidualSettings(source="self", alpha="learned", alpha_scale=2.0)])
def test_checkpoints_are_small_and_a_resumed_training_is_the_same(
    examples: str, tmp_path: Path, residual: ResidualSettings, dropout: float
) -> None:
    """Whatever numbers the process has drawn before."""
    s = settings(lora=replace(LORA, dropout=dropout))
    _, whole, _ = run(examples, s, residual=residual)
    torch.manual_seed(5)
    run(examples, s, residual=residual, checkpoint=lambda step, save: save(tmp_path / str(step)))
    torch.manual_seed(6)
    _, resumed, _ = run(examples, s, residual=residual, resume=tmp_path / "6")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(name.startswith("learned_alpha") for name in whole) == residual.learns_alpha
    stored: Any = FileSystemReader(tmp_path / "6").read_metadata().state_dict_metadata
    stored = [name for name in stored if not name.startswith("optimizer.param_groups")]
    assert all(".lora_" in name or "mask_shift" in name or "learned_alpha" in name for name in stored), "not the base"


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_an_adapter_directory_is_a_checkpoint(
    examples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("RCD_CACHE", str(tmp_path / "cache"))
    _, weights, _ = run(examples, settings(), family)
    base = str(GOLDEN / f"{family}_tiny")
    whole = merged(load_model(base), weights, LORA)
    whole.info.rcd = {"alpha": "normalized_entropy", "residual_temperature": 1.0, "block_length": BLOCK}
    export_adapter(tmp_path / "adapter", whole, weights, LORA, base)
    loaded = load_model(tmp_path / "adapter")
    first, second = whole.state_dict(), loaded.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first) and loaded.info.rcd == whole.info.rcd
    again = load_model(tmp_path / "adapter")  # from the cache
    assert len(list((tmp_path / "cache" / "merged").glob("*/adapter"))) == 1 and again.info == loaded.info

    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load_model(base).backbone, str(tmp_path / "adapter")).merge_and_unload()
    names = [name for name in first if "embed_tokens" not in name]
    own = {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert all(torch.allclose(own[name], first[name], atol=1e-6) for name in names)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("base_model_name_or_path", None, "base_model_name_or_path"),
        ("base_model_name_or_path", "/nowhere/base", "/nowhere/base"),
        ("use_dora", True, "use_dora"),
        ("peft_type", "IA3", "peft_type"),
    ],
)
def test_what_cannot_be_merged_is_named(
    examples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, named: str
) -> None:
    monkeypatch.setenv("RCD_CACHE", str(tmp_path / "cache"))
    model = load_model(GOLDEN / "sdar_tiny")
    add_adapters(model, LORA)
    weights = {n.removeprefix("backbone."): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    export_adapter(tmp_path / "adapter", model, weights, LORA, str(GOLDEN / "sdar_tiny"))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UserError, match=named):
        load_model(tmp_path / "adapter")
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: str(GOLDEN / "sdar_tiny")}))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCD_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "adapter"
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(GOLDEN / "sdar_tiny")}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = {f"{stem}A.weight": torch.ones(2, 7), f"{stem}B.weight": torch.ones(64, 2)}
    save_file(weights, directory / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"q_proj.*base_model_name_or_path"):
        load_model(directory)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(UserError, match=r"train\.lora.*deepspeed"):
        settings(strategy="deepspeed")
    with pytest.raises(UserError, match=r"train\.lora\.rank"):
        LoraSettings(rank=0)
    with pytest.raises(UserError, match=r"train\.lora\.modules.*'c_attn'.*q_proj"):
        add_adapters(load_model(GOLDEN / "sdar_tiny"), LoraSettings(modules=("c_attn",)))


def _worker(rank: int, examples: str, out: Path, strategy: Any) -> None:
    parts = out / f"rank{rank}"
    s = settings(strategy=strategy)
    s = TrainSettings(**{**vars(s), "batch_size": 8})
    _, weights, _ = run(examples, s, checkpoint=lambda step, save: save(parts / str(step)))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "weights.safetensors")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_workers_train_the_same_adapters(examples: str, tmp_path: Path, strategy: str) -> None:
    spawn(_worker, 2, examples, tmp_path, strategy)
    several = load_file(tmp_path / "weights.safetensors")
    _, one, _ = run(examples, settings(batch_size=8))
    assert several.keys() == one.keys()
    for name, tensor in one.items():
        assert (several[name] - tensor).norm() <= 5e-3 * tensor.norm() + 1e-5, name
    assert sorted(os.listdir(tmp_path / "rank0")) == ["3", "6"]
