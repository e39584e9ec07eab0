"""The training stages on real Ray: several workers give the weights of one, lost ones are replaced, errors are not
retried. The models are the golden ones, with a few thousand parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import train as train_stage
from pipelines.run.directory import run_stage
from pipelines.run.stages import stages_of
from pipelines.training.job import make_job
from pipelines.training.metrics import read_metrics
from pipelines.training.worker import EXPORTED, start_model, validation
from rcd_core import load_model
from rcd_core.errors import UserError
from rcd_core.text.tokenizer import load_tokenizer
from rcd_core.training.data.batches import collate_packed
from rcd_core.training.objective import reference_signals
from rcd_core.training.settings import LoraSettings
from tests.fault_table import FaultTable
from tests.pipelines.training_run import (
    BLOCK,
    GOLDEN,
    Killer,
    assert_close,
    checkpoint_steps,
    context,
    make_recipe,
    train_alone,
    weights,
)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Ray Train's controller checks its workers more often than every two seconds."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    yield
    patch.undo()


@pytest.mark.drill
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.timeout(280)
def test_a_killed_worker_is_replaced_without_changing_the_result(
    strategy: str, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers give the weights of one process; with one of them killed, the bits are the same."""
    settings = {"strategy": strategy, "validate_every": 8, "pack_length": 24}
    quiet = context(make_recipe(tmp_path, "quiet", train=settings, data={"num_validation": 6}))
    summary = train_stage.run(quiet)
    assert_close(weights(quiet), train_alone(quiet))
    assert [m["step"] for m in read_metrics(quiet.directory) if "validation_loss" in m] == [8, 16, 24]
    assert not (Path(quiet.directory) / "restarts.jsonl").exists()

    ctx = context(make_recipe(tmp_path, "killed", train=settings, data={"num_validation": 6}))
    ctx.run.begin("target", {})
    with Killer(ctx.directory, 9) as killer:
        again = train_stage.run(ctx)
    assert killer.killed_at and killer.killed_at < 24
    restarts = (Path(ctx.directory) / "restarts.jsonl").read_text().splitlines()
    assert len(restarts) == 1
    assert again == summary
    assert all(torch.equal(a, b) for a, b in zip(weights(quiet).values(), weights(ctx).values(), strict=True))
    assert [m["step"] for m in read_metrics(ctx.directory)] == list(range(1, 25)), "no step is logged twice"
    values = [[m["validation_loss"] for m in read_metrics(c.directory) if "validation_loss" in m] for c in (quiet, ctx)]
    assert values[0] == values[1] and len(set(values[0])) == 3

    # As after a kill before the manifest: nothing is trained again, and checkpoints are removed once it stands.
    monkeypatch.setattr(train_stage, "_fit", lambda *_: pytest.fail("trains again"))
    assert checkpoint_steps(Path(ctx.directory))
    assert run_stage(stages_of(ctx.recipe)["target"], ctx, {})["summary"] == summary
    assert not checkpoint_steps(Path(ctx.directory)) and not (Path(ctx.directory) / EXPORTED).exists()


@pytest.mark.drill
def test_an_error_of_the_run_is_not_retried_and_is_one_line(ray_cluster: str, tmp_path: Path) -> None:
    ctx = context(make_recipe(tmp_path, "nan", train={"learning_rate": 1e30}, target={"residual": {"source": "none"}}))
    with pytest.raises(UserError, match="loss or gradient is not finite at step") as caught:
        train_stage.run(ctx)
    assert "\n" not in str(caught.value) and "last good checkpoint" in str(caught.value)
    assert not (Path(ctx.directory) / "restarts.jsonl").exists(), "resources.max_failures is 3"


@pytest.mark.drill  # it waits for workers twice
@pytest.mark.parametrize("num_workers", [2, [2, 4]])
def test_workers_that_do_not_fit_fail_after_the_timeout(
    num_workers: int | list[int], ray_cluster: str, tmp_path: Path
) -> None:
    resources = {"num_workers": num_workers, "cpus_per_worker": 3, "timeout_s": 2}
    ctx = context(make_recipe(tmp_path, "roomy", train={"batch_size": 12}, resources=resources))
    with pytest.raises(UserError, match=r"no room .* within 2 s .* need 2 x \(CPU 3\)"):
        train_stage.run(ctx)


def test_held_out_rows_get_the_signals_of_the_reference(tmp_path: Path) -> None:
    """Each rank computes those of its rows; the batch does not matter."""
    ctx = context(make_recipe(tmp_path, "held", train={"validate_every": 8}, data={"num_validation": 6}))
    reference = str(GOLDEN / "rcd" / "sdar_ref_tiny")
    job = replace(make_job(ctx), signals={"reference_checkpoint": reference})
    model = start_model(job)
    held_out = validation(job, model, rank=1, world_size=2, dtype=None, device=model.device)
    assert held_out.num_rows == 6 and sorted(held_out.source.rows) == [1, 3, 5]
    rows = [held_out.source.row(g) for g in (1, 3, 5)]
    batch, signals = collate_packed([[row] for row in rows], mask_token_id=511, pad_token_id=0, block_length=BLOCK)
    together = reference_signals(load_model(reference), batch, job.signal_rule)
    assert signals is not None and len(signals.entropy) == sum(int(row.masked.sum()) for row in rows)
    torch.testing.assert_close(signals.entropy, together.entropy, atol=1e-5, rtol=1e-5)


# -- drills


@pytest.mark.drill
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.timeout(200)
def test_adapters_are_written_alone_and_merged(
    strategy: str, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("RCD_CACHE", str(tmp_path / "cache"))
    train = {"steps": 3, "checkpoint_every": 2, "strategy": strategy, "lora": {"rank": 2}}
    ctx = context(make_recipe(tmp_path, "lora", train=train))
    assert train_stage.run(ctx)["steps"] == 3
    before, after = load_file(GOLDEN / "sdar_tiny" / "model.safetensors"), weights(ctx)
    changed = {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {*LoraSettings().modules, "embed_tokens"}, "adapters and the mask token's embedding"
    alone = load_model(Path(ctx.directory) / "adapter")
    assert all(torch.equal(after[name], tensor) for name, tensor in alone.official_files()[1].items())
    assert alone.info.rcd["source"] == "self" and load_tokenizer(Path(ctx.directory) / "adapter").eos_token


@pytest.mark.drill
@pytest.mark.faults("a worker lost for good, its last checkpoint damaged", "target")
@pytest.mark.timeout(600)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    ray_cluster: str, tmp_path: Path, fault_table: FaultTable
) -> None:
    """A worker is lost without a retry left, and the last checkpoint lacks a file: the same bits in the end."""
    quiet = context(make_recipe(tmp_path, "quiet"))
    train_stage.run(quiet)
    ctx = context(make_recipe(tmp_path, "damaged", resources={"max_failures": 0}))
    lost = pytest.raises(UserError, match="lost more often than resources.max_failures 0")
    with Killer(ctx.directory, 14), lost:
        train_stage.run(ctx)
    complete = sorted(Path(ctx.directory).glob("ray/*/step-*/progress.json"))
    assert len(complete) >= 2
    complete[-1].unlink()
    train_stage.run(ctx)
    assert all(torch.equal(a, b) for a, b in zip(weights(quiet).values(), weights(ctx).values(), strict=True))
    fault_table.add("ended with one message; the same command resumed from the checkpoint before", "the same bits")


@pytest.mark.drill
@pytest.mark.faults("a full disk", "target")
@pytest.mark.timeout(600)
def test_after_a_full_disk_the_run_resumes(ray_cluster: str, tmp_path: Path, fault_table: FaultTable) -> None:
    ctx = context(make_recipe(tmp_path, "full", resources={"num_workers": 1}))
    second = Path(ctx.directory) / "ray" / ctx.key[:16] / "step-00000008"
    second.mkdir(parents=True)
    (second / "__0_0.distcp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left while a checkpoint was written"):
        train_stage.run(ctx)
    (second / "__0_0.distcp").unlink()
    train_stage.run(ctx)
    assert_close(weights(ctx), train_alone(ctx))
    fault_table.add(
        "ended with one message; the same command resumed from the last complete checkpoint", "the same model"
    )


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_an_elastic_run_uses_the_workers_that_fit(ray_cluster: str, tmp_path: Path) -> None:
    """The cluster fits one of two workers; then both, one of which is lost. The models are the same."""
    one = context(make_recipe(tmp_path, "one", resources={"num_workers": [1, 2], "cpus_per_worker": 3}))
    train_stage.run(one)
    two = context(make_recipe(tmp_path, "two", resources={"num_workers": [1, 2]}))
    with Killer(two.directory, 9) as killer:
        train_stage.run(two)
    assert killer.killed_at
    assert_close(weights(one), train_alone(one))
    assert_close(weights(two), weights(one))


@pytest.mark.drill  # needs the extra `deepspeed`, and builds C++ code the first time
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_resumes_after_a_killed_worker(stage: int, ray_cluster: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    settings = {"strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
    quiet, killed = (context(make_recipe(tmp_path, name, train=settings)) for name in ("quiet", "killed"))
    train_stage.run(quiet)
    assert_close(weights(quiet), train_alone(quiet))
    with Killer(killed.directory, 9) as killer:
        train_stage.run(killed)
    assert killer.killed_at
    assert all(torch.equal(a, b) for a, b in zip(weights(quiet).values(), weights(killed).values(), strict=True))
