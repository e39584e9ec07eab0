"""Failures of training workers: all are retried from the last checkpoint, but for those that would come again.

Ray Train retries (FailureConfig.max_failures). It calls a UserCallback in the controller after every failure, and an
exception raised there ends the run without a retry. Restarts are recorded in <stage>/restarts.jsonl for the driver.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)

from pipelines.run.messages import causes, is_full_disk
from rcd_core.errors import STEP_NOTE, UserError
from rcd_core.io import storage

LOST = (RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
_PEER_GONE = ("by peer", "Broken pipe", "NCCL error", "TCPStore")  # torch, where another rank's loss is seen first
WAITING = (InitializingState, RestartingState, ReschedulingState, SchedulingState)
logger = logging.getLogger(__name__)


class EndHopelessRuns(UserCallback):
    """Raises, which ends the run, for a UserError, a full disk, and an error that comes again at the same step.

    UserErrors include a device without memory: the same step would need it again.
    """

    def __init__(self, stage: str, directory: str) -> None:
        self.stage, self.path = stage, storage.join(directory, "restarts.jsonl")
        self.seen: set[tuple[str, ...]] = set()  # errors of the last failure

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        errors = list(worker_exceptions.values())
        for error in errors:
            if isinstance(error, UserError):
                raise error
        for error in errors:
            if is_disk_full(error):
                raise disk_full_error(self.stage, error)
        # A lost worker has no step, and the others may then fail in any way.
        lost = any(isinstance(error, LOST) for error in errors)
        kinds = {} if lost else {_kind(error): error for error in errors}
        if again := self.seen & kinds.keys():
            error = kinds[min(again)]
            raise error if isinstance(error, Exception) else RuntimeError(str(error))
        self.seen = set(kinds)
        self._record({rank: first_line(error) for rank, error in worker_exceptions.items()})

    def _record(self, workers: dict[int, str]) -> None:
        line = json.dumps({"time": round(time.time(), 1), "workers": workers})
        try:
            before = storage.read_bytes(self.path) if storage.exists(self.path) else b""
            storage.write_bytes(self.path, before + line.encode() + b"\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s); the training goes on", self.path, error)


class Deadline(ControllerCallback):
    """Ends a run whose workers cannot be placed within timeout_s. Ray Train would wait forever, at the start and after
    every loss. Checked on every state update of the controller, which comes at least every `attempt_s` seconds."""

    def __init__(self, stage: str, workers: str, timeout_s: float) -> None:
        self.stage, self.workers, self.timeout_s = stage, workers, timeout_s
        self.since: float | None = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if not isinstance(current_state, WAITING):
            self.since = None
            return
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.timeout_s:
            raise UserError(
                f"{self.stage}: no room for the training's workers within {self.timeout_s:g} s (resources.timeout_s), "
                f"which need {self.workers}; add nodes, lower resources.num_workers, or raise resources.timeout_s; the "
                "same command resumes from the last checkpoint"
            )
        if current_state is previous_state:  # too few resources for an elastic run: Ray retries without a pause
            time.sleep(0.5)


def attempt_s(timeout_s: float) -> float:
    """Seconds that one attempt to place the workers may take."""
    return min(60.0, max(1.0, timeout_s))


def _kind(error: BaseException) -> tuple[str, ...]:
    """Equal for errors of one type and message at the same step, which the training loop notes."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(STEP_NOTE)]
    return type(error).__name__, first_line(error), *notes


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk is the cause, even when torch or pyarrow wrap it."""
    return any(is_full_disk(cause) for cause in causes(error, contexts=True))


def disk_full_error(stage: str, error: BaseException) -> UserError:
    return UserError(
        f"{stage}: no space left while a checkpoint was written ({first_line(error)}); free space where the run and "
        "the workers' temporary directories (TMPDIR) are, or raise train.checkpoint_every; the same command resumes "
        "from the last complete checkpoint"
    )


def user_error(error: BaseException, stage: str, max_failures: int) -> BaseException:
    """The UserError for what fit() raised if the user can fix it; otherwise the error of the controller."""
    chain = list(causes(error, contexts=True))
    for cause in chain:
        if isinstance(cause, UserError):
            return cause
    for cause in chain:
        if isinstance(cause, InsufficientClusterResourcesError):
            return UserError(f"{stage}: {' '.join(str(cause).split())}")
    for cause in chain:
        if isinstance(cause, LOST) or any(text in first_line(cause) for text in _PEER_GONE):
            return UserError(
                f"{stage}: training workers were lost more often than resources.max_failures {max_failures} allows "
                f"(last error: {first_line(cause)}); check the nodes' memory and logs; the same command resumes from "
                "the last checkpoint"
            )
    return getattr(error, "controller_failure", None) or error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
