"""A lease on a run directory: one job at a time, by a file with a heartbeat.

The holder rewrites <run>/lease.json every few seconds. Another job watches the file: if the beat changes, the holder is
alive and the job fails; if not, the holder was killed and the job takes over. Clocks are never compared. A holder that
finds another owner in the file, for example after its machine slept, has lost the lease and must stop.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from rcd_core.errors import UserError
from rcd_core.io import storage

HEARTBEAT_S = 3.0
TAKEOVER_S = 12.0  # four missed beats
_WATCH_S = 0.25
_SETTLE_S = 1.0


def read_lease(run_directory: str) -> dict[str, Any] | None:
    """The content of the run's lease file, None without one."""
    try:
        lease = storage.read_json(storage.join(run_directory, "lease.json"))
    except FileNotFoundError:
        return None
    return lease if isinstance(lease, dict) else None


def describe_lease(lease: dict[str, Any]) -> str:
    """Job, process, host and start of the holder."""
    job = f"job {lease['job']}, " if lease.get("job") else ""
    return f"{job}process {lease.get('pid')} on {lease.get('host')}, since {lease.get('since')}"


class Lease:
    """Exclusive use of a run directory between acquire() and release(): `with Lease(directory).acquire(): ...`.

    on_lost: called once with the reason, in the heartbeat's thread, when another job has taken the lease.
    """

    def __init__(self, run_directory: str, on_lost: Callable[[str], None] | None = None) -> None:
        self.run_directory = run_directory
        self.on_lost = on_lost
        self.lost: str | None = None
        self._path = storage.join(run_directory, "lease.json")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._content = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": submission_id(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "beat": 0,
        }

    def acquire(self, say: Callable[[str], None] = lambda text: None) -> Lease:
        """Take the lease, after waiting for a silent holder. Raises UserError when a living job holds it."""
        taken_over = self._wait_for_silence(say)
        self._beat()
        if taken_over:  # the old holder may only have slept: give it time to write
            time.sleep(_SETTLE_S)
        if self._holder() != self._content["owner"]:
            raise UserError(self._refusal(read_lease(self.run_directory) or {}))
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Remove the lease file unless another job owns it. Safe to call twice and from any thread."""
        self._ended.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
        if self.lost is None and self._holder() == self._content["owner"]:
            storage.remove(self._path)

    def check(self) -> None:
        """Raise UserError when another job has taken the lease. Call it before every write."""
        if self.lost:
            raise UserError(self.lost)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _holder(self) -> str | None:
        lease = read_lease(self.run_directory)
        return lease.get("owner") if lease else None

    def _wait_for_silence(self, say: Callable[[str], None]) -> bool:
        """False: no job held the lease. True: its holder was silent for TAKEOVER_S."""
        first = read_lease(self.run_directory)
        if first is None:
            return False
        say(f"{self.run_directory} is leased to {describe_lease(first)}; waiting {TAKEOVER_S:.0f} s for a heartbeat")
        deadline = time.monotonic() + TAKEOVER_S
        while time.monotonic() < deadline:
            time.sleep(_WATCH_S)
            current = read_lease(self.run_directory)
            if current is None:
                return False
            if current != first:
                raise UserError(self._refusal(current))
        say("no heartbeat: taking over the run")
        return True

    def _refusal(self, holder: dict[str, Any]) -> str:
        stop = f"`ray job stop {holder['job']}`" if holder.get("job") else f"`kill {holder.get('pid')}`"
        return (
            f"run {self.run_directory} is in use by {describe_lease(holder)}; wait for it, stop it ({stop}), "
            "or give this job its own run with --set name=NAME"
        )

    def _beat(self) -> None:
        self._content["beat"] = int(str(self._content["beat"])) + 1
        storage.write_json(self._path, self._content)

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                holder = read_lease(self.run_directory)
                if holder is not None and holder.get("owner") == self._content["owner"]:
                    self._beat()
                    continue
            except (OSError, UserError):
                continue  # transient storage error: a takeover will be noticed at the next beat
            if self._ended.is_set():
                return
            event = f"was taken over by {describe_lease(holder)}" if holder else "was removed"
            self.lost = f"the lease on {self.run_directory} {event}; this job stops"
            if self.on_lost:
                self.on_lost(self.lost)
            return


def submission_id() -> str | None:
    """The id for `ray job stop`, when this process is the entrypoint of a submitted job."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return os.environ.get("RAY_JOB_ID")
