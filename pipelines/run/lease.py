"""A lease on a run directory: one job at a time, by a file with a heartbeat.

Each job has a file of its own, <run>/lease-<owner>.json, whose name nobody else writes. To take the lease, a job

1. waits until the files of other jobs have been silent for TAKEOVER_S: their jobs were killed;
2. writes its own file, then lists all files. If another job's file is there, or a silent one has changed, it removes
   its own, waits for a random time and begins again. Otherwise it holds the lease, and removes the silent files.

Of jobs that start together at most one gets past step 2, however slow each is: each writes before it lists, so the
last one to write sees the files of the others. All that this needs of the storage is that a list shows the writes that
were done before it. That holds on disks, NFS, S3 and GCS. Conditional puts are not needed, which pyarrow does not have.

The holder rewrites its file every HEARTBEAT_S. If it was silent too long, for example because its machine slept,
another job removes its file and holds the lease. It notices at its next beat, and before it writes a manifest, and must
stop. Clocks of machines are never compared.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.retries import hasty

HEARTBEAT_S = 3.0
TAKEOVER_S = 12.0  # four missed beats
_WATCH_S = 0.25
_PAUSE_S = 1.0  # the longest random pause
_BYTES = 1024
_Leases = dict[str, dict[str, Any]]  # file name -> content


def read_lease(run_directory: str) -> dict[str, Any] | None:
    """The content of the run's lease file, None without one."""
    return next(iter(_leases(run_directory).values()), None)


def describe_lease(lease: dict[str, Any]) -> str:
    """Job, process, host and start of the holder."""
    job = f"job {lease['job']}, " if lease.get("job") else ""
    return f"{job}process {lease.get('pid')} on {lease.get('host')}, since {lease.get('since')}"


def _leases(run_directory: str) -> _Leases:
    found = {}
    for path in storage.list_files(run_directory, ".json"):
        if (name := storage.basename(path)).startswith("lease"):  # lease.json is that of older releases
            content = _content(path)
            if content is not None:
                found[name] = content
    return found


def _content(path: str) -> dict[str, Any] | None:
    """Of a lease's file; None: removed meanwhile, or not ours."""
    for last in (False, False, True):
        try:
            content = storage.read_json(path)
            return content if isinstance(content, dict) else {}
        except (FileNotFoundError, UserError):
            return None
        except OSError:  # what S3 says of a file that is removed between its opening and its reading
            if not storage.exists(path):
                return None
            if last:  # otherwise it is there again: another process has written it anew
                raise
    return None


class Lease:
    """Exclusive use of a run directory between acquire() and release(): `with Lease(directory).acquire(): ...`.

    on_lost: called once with the reason, in the heartbeat's thread, when another job has taken the lease.
    """

    def __init__(self, run_directory: str, on_lost: Callable[[str], None] | None = None) -> None:
        self.run_directory = run_directory
        self.on_lost = on_lost
        self.lost: str | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._content = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": submission_id(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "beat": 0,
            "holds": False,
        }
        self._replaced: set[str] = set()  # files of the killed jobs before this one
        self._name = f"lease-{self._content['owner']}.json"
        self._path = storage.join(run_directory, self._name)

    def acquire(self, say: Callable[[str], None] = lambda text: None) -> Lease:
        """Take the lease, after waiting for a silent holder. Raises UserError when a living job holds it."""
        while True:
            silent = self._wait_for_silence(say)
            self._beat()
            found = _leases(self.run_directory)
            if found.pop(self._name, None) and all(silent.get(name) == lease for name, lease in found.items()):
                break
            storage.remove(self._path)
            time.sleep(random.uniform(0, _PAUSE_S))
        self._content["holds"] = True
        self._beat()
        self._replaced = set(silent)
        for name in found:
            storage.remove(storage.join(self.run_directory, name))
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Remove the lease file. Safe to call twice and from any thread."""
        self._ended.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
        with hasty():
            storage.remove(self._path)

    def check(self) -> None:
        """Raise UserError when another job has taken the lease. Call it before every write."""
        if self._thread:
            self._look()
        if self.lost:
            raise UserError(self.lost)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _others(self) -> _Leases:
        return {name: content for name, content in _leases(self.run_directory).items() if name != self._name}

    def _wait_for_silence(self, say: Callable[[str], None]) -> _Leases:
        """The files of killed jobs, which did not change for TAKEOVER_S."""
        seen = self._others()
        if not seen:
            return {}
        say(f"{self.run_directory} is leased to {_describe(seen)}; waiting {TAKEOVER_S:.0f} s for a heartbeat")
        deadline = time.monotonic() + TAKEOVER_S
        while time.monotonic() < deadline:
            time.sleep(_WATCH_S)
            current = self._others()
            for name, content in current.items():
                if name in seen and content != seen[name]:
                    raise UserError(self._refusal(content))
            if current.keys() != seen.keys():  # one has ended, or begins
                return self._wait_for_silence(say) if current else {}
        say("no heartbeat: taking over the run")
        return seen

    def _refusal(self, holder: dict[str, Any]) -> str:
        stop = f"`ray job stop {holder['job']}`" if holder.get("job") else f"`kill {holder.get('pid')}`"
        return (
            f"run {self.run_directory} is in use by {describe_lease(holder)}; wait for it, stop it ({stop}), "
            "or give this job its own run with --set name=NAME"
        )

    def _beat(self) -> None:
        self._content["beat"] = int(str(self._content["beat"])) + 1
        # Always the same size, so that a reader who has just asked for the size is not disturbed.
        storage.write_bytes(self._path, json.dumps(self._content).ljust(_BYTES).encode())

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            # Whatever goes wrong once, the next beat is tried. The storage may not answer for a while; the job then
            # writes nothing either, and finds out in check() if another has taken over.
            with suppress(Exception), hasty():
                self._look()
                if self.lost:
                    return
                self._beat()

    def _look(self) -> None:
        """Note it if another job has taken the lease."""
        found = _leases(self.run_directory)
        here = found.pop(self._name, None)
        holders = {name: c for name, c in found.items() if c.get("holds") and name not in self._replaced}
        if (here and not holders) or self._ended.is_set() or self.lost:
            return
        event = f"was taken over by {_describe(holders)}" if holders else "was removed"
        self.lost = f"the lease on {self.run_directory} {event}; this job stops"
        if self.on_lost:
            self.on_lost(self.lost)


def _describe(leases: _Leases) -> str:
    return " and ".join(describe_lease(lease) for lease in leases.values())


def submission_id() -> str | None:
    """The id for `ray job stop`, when this process is the entrypoint of a submitted job."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return os.environ.get("RAY_JOB_ID")
