"""Which failures of training workers are retried, and when a checkpoint is complete. No cluster needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ray.exceptions import RayActorError
from ray.train import Checkpoint, ControllerError, WorkerGroupError
from torch.distributed.checkpoint.api import CheckpointException

from pipelines.training.checkpoints import finished_steps
from pipelines.training.faults import EndHopelessRuns, is_disk_full, user_error
from rcd_core.errors import STEP_NOTE, UserError


def full_disk() -> OSError:
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"0")
    return caught.value


def failed_at(step: int, error: Exception) -> Exception:
    error.add_note(f"{STEP_NOTE}{step}")
    return error


def test_some_failures_end_a_training_at_once(tmp_path: Path) -> None:
    for errors in ({0: UserError("a row is bad"), 1: RayActorError()}, {0: full_disk()}):
        with pytest.raises(UserError):
            EndHopelessRuns("target", str(tmp_path)).after_exception(None, errors)
    assert not (tmp_path / "restarts.jsonl").exists()


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error SLOW_DOWN during PutObject operation",
        "CUDA error: uncorrectable ECC error encountered",
        "Stale file handle",
        "a bug",
    ],
)
def test_any_other_failure_is_retried_and_ends_the_training_when_it_comes_again(text: str, tmp_path: Path) -> None:
    policy = EndHopelessRuns("target", str(tmp_path))
    policy.after_exception(None, {1: failed_at(7, RuntimeError(text))})
    policy.after_exception(None, {0: failed_at(9, RuntimeError(text))})  # it got further
    policy.after_exception(None, {0: failed_at(9, OSError("something else"))})
    lines = (tmp_path / "restarts.jsonl").read_text().splitlines()
    assert [json.loads(line)["workers"] for line in lines[:2]] == [{"1": text}, {"0": text}]
    with pytest.raises(OSError, match="something else"):
        policy.after_exception(None, {0: OtherError(), 1: failed_at(9, OSError("something else"))})


class OtherError(Exception):
    """Another rank's error in the same failure."""


def test_lost_workers_are_replaced_each_time(tmp_path: Path) -> None:
    policy = EndHopelessRuns("target", str(tmp_path))
    for _ in range(3):
        policy.after_exception(None, {0: RayActorError(), 1: failed_at(3, TypeError("half a message"))})
    assert len((tmp_path / "restarts.jsonl").read_text().splitlines()) == 3


def test_a_training_goes_on_when_its_restart_cannot_be_recorded(tmp_path: Path) -> None:
    (tmp_path / "restarts.jsonl").mkdir()
    EndHopelessRuns("target", str(tmp_path)).after_exception(None, {0: RayActorError()})


def test_the_user_error_behind_a_failure() -> None:
    bug = TypeError("a bug")
    assert user_error(ControllerError(bug), "target", 3) is bug
    assert str(user_error(ControllerError(UserError("train.steps")), "target", 3)) == "train.steps"
    lost = user_error(WorkerGroupError("long\ntext", {1: RayActorError(error_msg="it died")}), "target", 3)
    assert isinstance(lost, UserError) and "resources.max_failures 3" in str(lost) and "it died" in str(lost)


def test_a_full_disk_is_recognised_behind_torch_s_wrappers(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"w": torch.zeros(1 << 20)}, checkpoint_id=tmp_path, no_dist=True)
    assert is_disk_full(caught.value)
    assert is_disk_full(full_disk()) and not is_disk_full(OSError("something else"))


def test_a_checkpoint_without_all_its_files_is_not_complete(tmp_path: Path) -> None:
    for name in ("progress.json", ".metadata", "state"):
        (tmp_path / name).write_text('{"step": 7, "strategy": "fsdp2"}')
    checkpoint = Checkpoint.from_directory(str(tmp_path))
    assert finished_steps(checkpoint) == 7
    (tmp_path / ".metadata").unlink()
    assert finished_steps(checkpoint) is None
    (tmp_path / "progress.json").write_text('{"step": 7, "strategy": "deepspeed"}')
    assert finished_steps(checkpoint) == 7
    (tmp_path / "progress.json").write_text('{"step": 7, "str')
    assert finished_steps(checkpoint) is None
