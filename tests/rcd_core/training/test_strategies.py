"""DDP, FSDP2 and DeepSpeed train the same model, packed or not, and resume from their checkpoints bit by bit."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rcd_core import UserError, load_model
from rcd_core.noise import NoiseSettings
from rcd_core.training import optimizers
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.settings import LoraSettings, ResidualSettings, TrainSettings
from rcd_core.training.strategies import read_progress
from tests.rcd_core.training.helpers import BLOCK, GOLDEN, spawn, write_examples

NOISE = NoiseSettings(draws=2)
RESIDUAL = ResidualSettings(source="online", dropout=0.25)


def settings(**changes: Any) -> TrainSettings:
    plain: dict[str, Any] = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "log_every": 2, "checkpoint_every": 2}
    return TrainSettings(**{**plain, **changes})


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_examples(tmp_path_factory.mktemp("examples"), 24)


def run(
    examples: str, s: TrainSettings, family: str = "sdar", residual: ResidualSettings = RESIDUAL, **options: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    torch.set_num_threads(1)
    model = load_model(GOLDEN / f"{family}_tiny").requires_grad_(True)
    if options.pop("tied", False):
        model.backbone.lm_head.weight, model.config.tie_word_embeddings = model.embedding.weight, True
    reference = load_model(GOLDEN / "rcd" / f"{family}_ref_tiny") if residual.source == "online" else None
    logged: list[dict[str, float]] = []
    checkpoint = options.pop("checkpoint", lambda step, save: None)
    callbacks = Callbacks(logged.append, checkpoint)
    source = ExampleSource([examples], NOISE)
    return train(model, source, s, residual, BLOCK, callbacks, reference=reference, noise=NOISE, **options), logged


def worker(rank: int, out: Path, examples: str, s: TrainSettings, options: dict[str, Any]) -> None:
    # Each rank writes to its own directory, as under Ray Train; `launch` merges them.
    parts = out / f"rank{rank}"
    weights, _ = run(examples, s, checkpoint=lambda step, save: save(parts / str(step)), **options)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in weights.items()}, out / "weights.safetensors")


def launch(out: Path, examples: str, s: TrainSettings, world: int = 2, **options: Any) -> dict[str, torch.Tensor]:
    """Train with so many workers; returns the weights and leaves the checkpoints in out/checkpoints."""
    out.mkdir()
    spawn(worker, world, out, examples, s, options)
    for parts in out.glob("rank*"):
        shutil.copytree(parts, out / "checkpoints", dirs_exist_ok=True)
    return load_file(out / "weights.safetensors")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The difference is at most 0.5 % of what training changed. Single weights may differ by more, because Adam
    amplifies rounding where gradients are near 0."""
    start = load_model(GOLDEN / "sdar_tiny").backbone.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        changed = (b[name] - start.get(name, 0.0)).norm()  # added networks start at 0
        assert (a[name] - b[name]).norm() <= 5e-3 * changed, name


@pytest.fixture(scope="module")
def alone(examples: str) -> dict[str, torch.Tensor]:
    return run(examples, settings())[0]


def test_packing_and_recomputation_change_rounding_only(examples: str, alone: dict[str, torch.Tensor]) -> None:
    packed = {"pack_length": 24}
    modes = [{"activation_checkpointing": mode} for mode in (True, "selective")]
    for changes in (packed, {**packed, "micro_batch_size": 1}, *modes):
        close(run(examples, settings(**changes))[0], alone)


def test_low_precision_passes_train_nearly_the_same(
    examples: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """bf16 passes over fp32 weights: what training changes is nearly the same."""
    start = load_model(GOLDEN / "sdar_tiny").backbone.state_dict()
    changed = torch.cat([(alone[n] - start[n]).flatten() for n in alone])
    low = settings(dtype="bfloat16")
    for weights in (run(examples, low)[0], launch(tmp_path / "low", examples, replace(low, strategy="fsdp2"))):
        assert all(w.dtype == torch.float32 for w in weights.values())
        off = torch.cat([(weights[n] - alone[n]).flatten() for n in alone])
        assert 0 < off.norm() < 0.3 * changed.norm()


MUON: dict[str, Any] = {"optimizer": "muon", "muon_learning_rate": 0.01}


def test_muon_trains_the_layers_matrices_and_resumes_exactly(examples: str, tmp_path: Path) -> None:
    """And follows the schedule of AdamW's rate, which trains the rest."""
    s = settings(**MUON, schedule="linear", warmup=0.0)
    whole, logged = run(examples, s, checkpoint=lambda step, save: save(tmp_path / str(step)))
    resumed, _ = run(examples, s, resume=tmp_path / "2")
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    start = load_model(GOLDEN / "sdar_tiny").backbone.state_dict()
    moved = {n: (whole[n] - start[n]).norm() / whole[n].numel() ** 0.5 for n in whole}
    faster, _ = run(examples, replace(s, muon_learning_rate=0.04))
    for name in whole:
        more = (faster[name] - start[name]).norm() / faster[name].numel() ** 0.5 / moved[name]
        assert (more > 3) == (".layers." in name and whole[name].ndim == 2), name
    assert logged[-1]["learning_rate"] == pytest.approx(1e-3 / 3)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_muon_of_many_matrices_is_torch_s(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one optimiser's state in the other."""
    monkeypatch.setattr(optimizers, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (1, 3)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    small, whole = optimizers.Muon(ours, lr=0.02, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for step in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one) if (step, one.shape) != (1, (1, 3)) else None
            other.grad = one.grad
        if step == 2:
            small.load_state_dict(deepcopy(whole.state_dict()))
        small.step()
        whole.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - 1).abs().max() > 0.02
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("changes", [{"strategy": "deepspeed"}, {"lora": LoraSettings()}])
def test_muon_is_refused_where_it_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"train\.optimizer is muon"):
        settings(**MUON, **changes)


@pytest.mark.drill  # two pairs of processes
def test_muon_under_fsdp2(examples: str, tmp_path: Path) -> None:
    """Newton-Schulz in bf16 rounds otherwise on shards: what training changes is nearly the same."""
    alone, _ = run(examples, settings(**MUON))
    s = settings(**MUON, strategy="fsdp2")
    whole = launch(tmp_path / "whole", examples, s)
    start = load_model(GOLDEN / "sdar_tiny").backbone.state_dict()
    changed = torch.cat([(alone[n] - start[n]).flatten() for n in alone])
    off = torch.cat([(whole[n] - alone[n]).flatten() for n in alone])
    assert off.norm() < 0.1 * changed.norm()
    resumed = launch(tmp_path / "resumed", examples, s, resume=tmp_path / "whole" / "checkpoints" / "2")
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


@pytest.mark.drill  # two pairs of processes
def test_fsdp2_trains_what_one_process_trains_and_resumes_exactly(
    examples: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Ranks with unequal numbers of packed micro-batches; one checkpoint read by fsdp2 and by a single process."""
    s = settings(strategy="fsdp2", pack_length=24, micro_batch_size=1)
    whole = launch(tmp_path / "whole", examples, s)
    close(whole, alone)
    checkpoint = tmp_path / "whole" / "checkpoints" / "2"
    resumed = launch(tmp_path / "resumed", examples, s, resume=checkpoint)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    close(run(examples, settings(), resume=checkpoint)[0], alone)
    with pytest.raises(UserError, match=r"train\.strategy fsdp2, .*deepspeed"):
        read_progress(checkpoint, "deepspeed")


@pytest.mark.drill  # four processes, twice
def test_sharded_within_groups_it_trains_the_same_and_resumes_exactly(
    examples: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Two replicas of two shards each; their checkpoint is read by one process, too."""
    s = settings(strategy="fsdp2", shard_size=2, micro_batch_size=1)
    whole = launch(tmp_path / "whole", examples, s, world=4)
    close(whole, alone)
    checkpoint = tmp_path / "whole" / "checkpoints" / "2"
    resumed = launch(tmp_path / "resumed", examples, s, world=4, resume=checkpoint)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    close(run(examples, settings(), resume=checkpoint)[0], alone)


@pytest.mark.drill  # two more pairs of processes
@pytest.mark.parametrize("source", ["self", "loopholing"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_a_model_that_runs_several_times(source: Any, tied: bool, examples: str, tmp_path: Path) -> None:
    """Embedding and head run several times in a step. They are units of their own, or one parameter of the root."""
    residual = ResidualSettings(source=source)
    alone, _ = run(examples, settings(), residual=residual, tied=tied)
    close(launch(tmp_path / "two", examples, settings(strategy="fsdp2"), residual=residual, tied=tied), alone)


@pytest.mark.drill  # compiles
def test_compiled_layers_train_the_same(examples: str, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """With checkpointing outside, alone and in shards."""
    s = settings(compile=True, activation_checkpointing=True)
    close(run(examples, s)[0], alone)
    close(launch(tmp_path / "two", examples, replace(s, strategy="fsdp2")), alone)


def test_what_cannot_see_into_compiled_layers_is_refused() -> None:
    for changes in ({"strategy": "deepspeed"}, {"activation_checkpointing": "selective"}):
        with pytest.raises(UserError, match=r"train\.compile is true"):
            settings(compile=True, **changes)


def test_groups_of_shards_are_equal() -> None:
    assert [settings(strategy="fsdp2", shard_size=n).shards(8) for n in (None, 2, 8, 16)] == [8, 2, 8, 8]
    with pytest.raises(UserError, match=r"train\.shard_size is 3.* 8 workers"):
        settings(strategy="fsdp2", shard_size=3).shards(8)
    with pytest.raises(UserError, match=r"train\.shard_size is 2.*ddp"):
        settings(strategy="ddp", shard_size=2)


@pytest.mark.drill  # one more pair of processes
def test_offloaded_shards_train_the_same(examples: str, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    s = settings(strategy="fsdp2", pack_length=24, micro_batch_size=1, cpu_offload=True)
    close(launch(tmp_path / "offloaded", examples, s), alone)


@pytest.mark.drill  # two more pairs of processes
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_learned_alpha_is_trained_with_the_model(strategy: Any, examples: str, tmp_path: Path) -> None:
    """Its weights are sharded and saved like the others and close to those of one process."""
    residual = replace(RESIDUAL, alpha="learned")
    alone, _ = run(examples, settings(), residual=residual)
    weights = launch(tmp_path / "two", examples, settings(strategy=strategy), residual=residual)
    names = [name for name in alone if name.startswith("learned_alpha.")]
    assert len(names) == 4 and weights.keys() == alone.keys()
    for name in names:
        assert alone[name].any()
        torch.testing.assert_close(weights[name], alone[name], atol=1e-4, rtol=1e-3)


@pytest.mark.drill  # needs the extra `deepspeed`, and builds C++ code the first time
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1},
        {"stage": 2},
        {"stage": 3},
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ],
    ids=["1", "2", "3", "2 offload", "3 offload"],
)
def test_deepspeed_trains_what_one_process_trains_and_resumes_exactly(
    zero: dict[str, Any], examples: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    if not shutil.which("g++"):
        pytest.skip("DeepSpeed builds its CPU communication with a C++ compiler; there is none")
    s = settings(strategy="deepspeed", deepspeed={"zero_optimization": zero})
    whole = launch(tmp_path / "whole", examples, s)
    close(whole, alone)
    resumed = launch(tmp_path / "resumed", examples, s, resume=tmp_path / "whole" / "checkpoints" / "2")
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
