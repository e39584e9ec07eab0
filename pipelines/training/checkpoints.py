"""Checkpoints of a training under Ray Train: written by every rank, uploaded in the background, read if complete.

Each rank writes its part to its node's disk and passes it to ray.train.report, which is a barrier. A checkpoint is
registered once all ranks have uploaded their parts, so an incomplete upload is never offered for resuming. Directories
are named by the step: the leftovers of a crash are overwritten when that step runs again, and all checkpoints are
removed when the stage is done.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyarrow.fs import FileType
from ray import train as ray_train
from ray.train import Checkpoint, CheckpointUploadMode
from torch.distributed.checkpoint.api import CheckpointException

from pipelines.training.faults import disk_full_error, is_disk_full
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.retries import patiently
from rcd_core.noise import hash_key
from rcd_core.training.strategies import PROGRESS


class Checkpoints:
    """This rank's part of the checkpoints of one stage. A context manager, which removes its scratch directory."""

    def __init__(self, stage: str, directory: str) -> None:
        self.stage = stage
        rank = ray_train.get_context().get_world_rank()
        # The same path for each run, stage and rank, so that the next worker removes a killed one's leftovers.
        self.scratch = Path(tempfile.gettempdir()) / f"rcd-{hash_key(directory, rank):016x}"
        self.suffix = ""
        self.uploading: Path | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Checkpoints:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._stack.close()
        if kind is None:  # after an error an upload may never end; the next worker removes the directory
            self._wait_for_upload()
            shutil.rmtree(self.scratch, ignore_errors=True)

    def resume(self) -> tuple[Path | None, int]:
        """(local directory of the last complete checkpoint or None, its finished steps). The same on all ranks.

        A checkpoint at a URI is downloaded once per node, until `loaded`.
        """
        for checkpoint in _newest_first():
            step = finished_steps(checkpoint)
            if step is not None:
                return Path(self._stack.enter_context(checkpoint.as_directory())), step
            # This step runs again, and its new checkpoint must not have the name of the damaged one.
            self.suffix = f"-{uuid.uuid4().hex[:8]}"
        return None, 0

    def take_over(self, path: str) -> tuple[Path, int]:
        """(local directory, finished steps) of a checkpoint that another stage left. UserError if it is damaged."""
        files, inner = storage.filesystem(path)
        checkpoint = Checkpoint(inner, files)
        step = finished_steps(checkpoint)
        if step is None:
            raise UserError(f"{self.stage}: the checkpoint {path} is damaged; run the round before again (--redo)")
        return Path(self._stack.enter_context(checkpoint.as_directory())), step

    def loaded(self) -> None:
        """What was downloaded is in memory: free the node's disk. The last rank of the node deletes it."""
        self._stack.close()

    def write(self, step: int, save: Callable[[Path], None]) -> None:
        """Save on all ranks, then upload in the background. One upload at a time, so that the local disk holds at most
        two checkpoints of this rank. Raises UserError for a full disk."""
        directory = self.scratch / f"{step:08d}"
        try:
            save(directory)
        except CheckpointException as error:  # a BaseException, which Ray would not handle as an error of the run
            cause = next(iter(error.failures.values()))[0]
            raise (disk_full_error(self.stage, cause) if is_disk_full(error) else RuntimeError(str(error))) from cause
        except (OSError, RuntimeError) as error:
            raise (disk_full_error(self.stage, error) if is_disk_full(error) else error) from None
        self._wait_for_upload()
        self.uploading = directory
        ray_train.report(
            {"step": step},
            checkpoint=Checkpoint.from_directory(str(directory)),
            checkpoint_dir_name=f"step-{step:08d}{self.suffix}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _wait_for_upload(self) -> None:
        """Ray deletes the directory after the upload; if the upload fails, Ray ends this worker."""
        while self.uploading is not None and self.uploading.exists():
            time.sleep(0.02)


def _newest_first() -> Iterator[Checkpoint]:
    """Asks the controller for older checkpoints only if the last one is damaged."""
    latest = ray_train.get_checkpoint()
    if latest is not None:
        yield latest
        others = [reported.checkpoint for reported in ray_train.get_all_reported_checkpoints()]
        yield from (c for c in reversed(others) if c.path != latest.path)


def finished_steps(checkpoint: Checkpoint) -> int | None:
    """Steps of a complete checkpoint, None if a file is missing. Rank 0 writes progress.json when its part is done;
    torch.distributed.checkpoint writes an index, DeepSpeed a directory."""
    files: Any = checkpoint.filesystem
    with contextlib.suppress(OSError, ValueError, KeyError):
        with patiently(files.open_input_stream)(f"{checkpoint.path}/{PROGRESS}") as stream:
            progress = json.loads(stream.read())
        index = "state" if progress["strategy"] == "deepspeed" else ".metadata"
        if files.get_file_info(f"{checkpoint.path}/{index}").type != FileType.NotFound:
            return int(progress["step"])
    return None
