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
from pipelines.training.faults import RetryLostWorkersOnly, is_disk_full, user_error
from rcd_core.errors import UserError


def full_disk() -> OSError:
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"0")
    return caught.value


def test_only_lost_workers_are_retried(tmp_path: Path) -> None:
    policy = RetryLostWorkersOnly("target", str(tmp_path))
    restarts = tmp_path / "restarts.jsonl"
    for errors, kind in (
        ({0: UserError("a row is bad"), 1: RayActorError()}, UserError),
        ({1: TypeError("a bug")}, TypeError),
        ({0: full_disk()}, UserError),
        ({0: CheckpointException("ranks", {0: (ValueError("odd"), None)})}, RuntimeError),  # type: ignore[dict-item]
    ):
        with pytest.raises(kind):
            policy.after_exception(None, errors)
        assert not restarts.exists()
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:31416")
    policy.after_exception(None, {0: RayActorError(), 1: TypeError("half a message")})
    policy.after_exception(None, {1: peer})
    assert [list(json.loads(line)["workers"]) for line in restarts.read_text().splitlines()] == [["0", "1"], ["1"]]


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
