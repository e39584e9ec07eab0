"""A Ray head on this machine: started on ports of its own, found again, and ended to the last process.

`ray stop` would end every Ray of the user. Here each head gets a random token in its environment, which all its
descendants inherit, orphans too; `down` ends exactly the processes that carry it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rcd_core.errors import UserError

RAY = str(Path(sys.executable).parent / "ray")
TOKEN = "RCD_LOCAL_HEAD"  # the environment variable that marks every process of a head
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 30
JOB_STOP_S = 10  # Ray's default of 3 s between SIGTERM and SIGKILL is short for closing training workers


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running local head. `token` marks its processes; `dashboard` is the address that jobs are submitted to."""

    token: str
    dashboard: str
    agent: str  # runs the jobs, and is ready last
    gcs: str
    temp_dir: str

    @classmethod
    def load(cls, state: Path) -> Head | None:
        try:
            return cls(**json.loads(state.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{state} is damaged ({error}); end the head by hand and delete the file") from None

    def save(self, state: Path) -> None:
        partial = state.with_suffix(".tmp")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(state)

    def processes(self) -> list[psutil.Process]:
        """Every live process started by this head, orphans included: the token is inherited from parent to child."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(TOKEN) == self.token:
                    found |= {process, *process.children(recursive=True)}
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and p.pid != os.getpid()]

    def answers(self) -> bool:
        """Whether it takes jobs."""
        try:
            request("GET", self.agent + "/api/local_raylet_healthz")
            request("GET", self.dashboard + "/api/jobs/")
        except OSError:
            return False
        return True


def request(method: str, url: str, timeout_s: float = 10.0) -> bytes:
    """One call to the head's REST API (jobs, Serve); OSError when it does not answer or answers with an error."""
    # A proxy configured in the environment must not be asked for a loopback address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method=method), timeout=timeout_s) as response:
        return bytes(response.read())


def up(state: Path, dashboard_port: int) -> Head:
    """Start a head and wait until it takes jobs, or return the live one. UserError: what stands in the way."""
    if head := Head.load(state):
        if head.answers():
            print(f"using the local Ray head at {head.dashboard}", flush=True)
            return head
        if head.processes():
            raise UserError(f"the local Ray head does not answer at {head.dashboard}; run: make down")
        _forget(state, head)
    if not port_is_free(dashboard_port):
        raise UserError(
            f"port {dashboard_port} is taken by another program, and the Ray dashboard needs it; "
            f"choose another: make demo DASHBOARD_PORT={dashboard_port + 1}"
        )
    state.parent.mkdir(parents=True, exist_ok=True)
    log = state.with_suffix(".log")
    head = _launch(state, log, dashboard_port)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while not head.answers():
            if time.monotonic() > deadline or not head.processes():
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise UserError(f"the local Ray head did not start; its log {log} ends:\n{tail}")
            time.sleep(0.2)
    except BaseException:
        down(state)
        raise
    print(f"started a local Ray head at {head.dashboard} (stop it with: make down)", flush=True)
    return head


def _launch(state: Path, log: Path, dashboard_port: int) -> Head:
    # Not under $TMPDIR: the path of a Unix socket inside must stay below 104 characters.
    temp_dir = tempfile.mkdtemp(prefix="rcd-", dir="/tmp")
    token = secrets.token_hex(8)
    names = ["port", "node-manager-port", "object-manager-port", "ray-client-server-port", "runtime-env-agent-port"]
    names += ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", f"--temp-dir={temp_dir}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # any free ones
    command += [f"--num-cpus={max(4, os.cpu_count() or 1)}", f"--object-store-memory={400 * 1024**2}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    head = Head(
        token=token,
        dashboard=f"http://127.0.0.1:{dashboard_port}",
        agent=f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}",
        gcs=f"127.0.0.1:{ports['port']}",
        temp_dir=temp_dir,
    )
    head.save(state)  # before it starts, so that `down` finds it whatever happens next
    # A session of its own: the terminal's Ctrl-C is for the job, not for the head.
    with open(log, "wb") as output:
        subprocess.Popen(
            command,
            env=_head_environment(token),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return head


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    env["NO_PROXY"] = env["no_proxy"] = ",".join(filter(None, [env.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    # Otherwise Ray asks for a token, or not, depending on what was started on this machine before. It is loopback only.
    env["RAY_AUTH_MODE"] = "disabled"
    return env


def _head_environment(token: str) -> dict[str, str]:
    env = environment()
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])  # a job's `python`
    env[TOKEN] = token
    env["SPT_NOENV"] = "1"  # keeps setproctitle, which Ray's workers call, from overwriting the token
    env["RAY_JOB_STOP_WAIT_TIME_S"] = str(JOB_STOP_S)
    env["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # the coming default; unset, each driver prints a warning
    # Despite its name the one switch by which Ray leaves 127.0.0.1 as it is, instead of taking the outward address.
    env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    env["PYTHONUNBUFFERED"] = "1"  # a job's output goes to a file: show it as it comes
    return env


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:  # all held at once, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def port_is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def stop_job(head: Head, job: str, client: subprocess.Popen[bytes] | None = None) -> bool:
    """Stop `job` and wait for its end; False when `client`, its submitter, ended without submitting it."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    asked = False
    while time.monotonic() < deadline:
        try:
            status = json.loads(request("GET", f"{head.dashboard}/api/jobs/{job}"))["status"]
            if status in ("SUCCEEDED", "FAILED", "STOPPED"):
                return True
            if not asked:
                request("POST", f"{head.dashboard}/api/jobs/{job}/stop")
                asked = True
        except urllib.error.HTTPError as error:  # 404: still being uploaded
            if error.code == 404 and (client is None or client.poll() is not None):
                return False
        except OSError:
            raise UserError(f"the local Ray head no longer answers at {head.dashboard}; run: make down") from None
        time.sleep(0.2)
    raise UserError(f"job {job} did not stop within {STOP_TIMEOUT_S} s; end everything with: make down")


def down(state: Path) -> None:
    """End the head of `state` with all its processes: jobs first, then SIGTERM, then SIGKILL. Nothing to do is fine."""
    head = Head.load(state)
    if head is None:
        print("no local Ray head is running")
        return
    with contextlib.suppress(OSError, ValueError, UserError):
        for job in json.loads(request("GET", head.dashboard + "/api/jobs/")):
            if job["submission_id"] and job["status"] in ("PENDING", "RUNNING"):
                stop_job(head, job["submission_id"])
        request("DELETE", head.dashboard + "/api/serve/applications/", timeout_s=STOP_TIMEOUT_S)
    # In rounds, because a process may start another between the listing and the signal.
    for sig, grace_s in ((signal.SIGTERM, 8.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 3.0), (signal.SIGKILL, 3.0)):
        processes = head.processes()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(sig)  # psutil refuses when the pid has been given to another process
        psutil.wait_procs(processes, timeout=grace_s)
    if left := head.processes():
        raise UserError(f"processes {sorted(p.pid for p in left)} of the local Ray head did not end; kill them by hand")
    _forget(state, head)
    print("the local Ray head and all its processes have ended")


def _forget(state: Path, head: Head) -> None:
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    state.unlink(missing_ok=True)
