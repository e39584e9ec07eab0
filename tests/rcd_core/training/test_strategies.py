"""DDP, FSDP2 and DeepSpeed train the same model, packed or not, and go on from their checkpoints bit by bit.

Each case is two processes with gloo on CPU, as under torchrun.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from rcd_core import UserError, load_model
from rcd_core.noise import NoiseSettings
from rcd_core.residual import ResidualSettings
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.settings import TrainSettings

GOLDEN = Path(__file__).parents[2] / "golden"
BLOCK = 4
NOISE = NoiseSettings(draws=2)
RESIDUAL = ResidualSettings(source="online", dropout=0.25)


def settings(**changes: Any) -> TrainSettings:
    plain: dict[str, Any] = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "log_every": 2, "checkpoint_every": 2}
    return TrainSettings(**{**plain, **changes})


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of one to five blocks: packing gives the two workers different numbers of packed rows."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 490, n * BLOCK).tolist() for n in generator.integers(2, 6, 24)]
    lists = pa.list_(pa.int32())
    table = {
        "example_id": [f"{i:03d}" for i in range(len(ids))],
        "input_ids": pa.array(ids, lists),
        "labels": pa.array([[-100] * BLOCK + row[BLOCK:] for row in ids], lists),
    }
    path = str(tmp_path_factory.mktemp("examples") / "part.parquet")
    pq.write_table(pa.table(table), path)
    return path


def run(
    examples: str, s: TrainSettings, family: str = "sdar", residual: ResidualSettings = RESIDUAL, **options: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    torch.set_num_threads(1)
    model = load_model(GOLDEN / f"{family}_tiny").requires_grad_(True)
    reference = load_model(GOLDEN / "rcd" / f"{family}_ref_tiny") if residual.source == "online" else None
    logged: list[dict[str, float]] = []
    checkpoint = options.pop("checkpoint", lambda step, save: None)
    callbacks = Callbacks(logged.append, checkpoint)
    source = ExampleSource([examples], NOISE)
    return train(model, source, s, residual, BLOCK, callbacks, reference=reference, noise=NOISE, **options), logged


def worker(
    rank: int, world: int, port: int, out: str, examples: str, s: TrainSettings, options: dict[str, Any]
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    # Each rank writes to a directory of its own, as under Ray Train; they are merged afterwards.
    parts = Path(out) / f"rank{rank}"
    weights, logged = run(examples, s, checkpoint=lambda step, save: save(parts / str(step)), **options)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in weights.items()}, Path(out) / "weights.safetensors")
        torch.save([line["loss"] for line in logged], Path(out) / "losses.pt")
    dist.barrier()
    dist.destroy_process_group()


def launch(out: Path, examples: str, s: TrainSettings, world: int = 2, **options: Any) -> dict[str, torch.Tensor]:
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (world, port, str(out), examples, s, options), nprocs=world)
    for rank in range(world):
        if (out / f"rank{rank}").exists():
            shutil.copytree(out / f"rank{rank}", out / "checkpoints", dirs_exist_ok=True)
    return load_file(out / "weights.safetensors")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The difference is five thousandths of what training has changed: Adam makes much of rounding where gradients are
    next to nothing, so single numbers may differ by more."""
    start = load_model(GOLDEN / "sdar_tiny").backbone.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 5e-3 * (b[name] - start[name]).norm(), name


@pytest.fixture(scope="module")
def alone(examples: str) -> dict[str, torch.Tensor]:
    return run(examples, settings())[0]


def test_packing_and_recomputation_change_rounding_only(examples: str, alone: dict[str, torch.Tensor]) -> None:
    for changes in (
        {"pack_length": 24},
        {"pack_length": 24, "micro_batch_size": 1},
        {"activation_checkpointing": True},
    ):
        close(run(examples, settings(**changes))[0], alone)


def test_low_precision_passes_train_nearly_the_same(
    examples: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """bf16 passes over fp32 weights: what training changes is the same to a few hundredths of it."""
    start = load_model(GOLDEN / "sdar_tiny").backbone.state_dict()
    changed = torch.cat([(alone[n] - start[n]).flatten() for n in alone])
    low = settings(dtype="bfloat16")
    for found in (run(examples, low)[0], launch(tmp_path / "low", examples, replace(low, strategy="fsdp2"))):
        assert all(w.dtype == torch.float32 for w in found.values())
        off = torch.cat([(found[n] - alone[n]).flatten() for n in alone])
        assert 0 < off.norm() < 0.3 * changed.norm()


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
    offloaded = launch(tmp_path / "offloaded", examples, replace(s, cpu_offload=True))
    close(offloaded, alone)
    with pytest.raises(UserError, match=r"train\.strategy fsdp2, .*deepspeed"):
        from rcd_core.training.strategies import read_progress

        read_progress(checkpoint, "deepspeed")


@pytest.mark.drill  # two more pairs of processes
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_learned_alpha_is_trained_with_the_model(strategy: Any, examples: str, tmp_path: Path) -> None:
    """Its few weights are sharded and saved like the others: as many as one process has, close to those."""
    residual = replace(RESIDUAL, alpha="learned")
    alone, _ = run(examples, settings(), residual=residual)
    found = launch(tmp_path / "two", examples, settings(strategy=strategy), residual=residual)
    names = [name for name in alone if name.startswith("learned_alpha.")]
    assert len(names) == 4 and found.keys() == alone.keys()
    for name in names:
        assert alone[name].any()
        torch.testing.assert_close(found[name], alone[name], atol=1e-4, rtol=1e-3)


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
