"""The local Ray head behind `rcd up` and `rcd down`.

`ray stop` would stop every Ray of the user. Here each head gets a random token in its environment. All its descendants
inherit the token, orphans too, and `stop_head` ends exactly the processes that carry it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
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

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".rcd" / "local.json"
TOKEN = "RCD_LOCAL_HEAD"  # the environment variable that marks every process of a head
_RAY = str(Path(sys.executable).parent / "ray")
DASHBOARD_PORT = 8265
_LARGEST_PORT = 65535
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 30
_STORE_BYTES = (400 << 20, 16 << 30)  # bounds of the object store
_STORE_SHARE = 0.1  # of the memory: blocks of Ray Data are in it; models and their workers need the rest
_KEPT_BYTES = 256 << 20  # most memory that a process keeps after it was freed
JOB_STOP_S = 10  # between SIGTERM and SIGKILL; Ray's default of 3 s is too short to close training workers
_RAY_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # set, they override --address of `ray job submit`


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running local head.

    token: marks its processes. dashboard: the URL that takes jobs. agent: the URL of the process that runs jobs, which
    is ready last. gcs: the address for RAY_ADDRESS.
    """

    token: str
    dashboard: str
    agent: str
    gcs: str
    temp_dir: str

    @classmethod
    def load(cls, state: Path) -> Head | None:
        try:
            return cls(**json.loads(state.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{state} is damaged ({error}); stop the head by hand and delete the file") from None

    def save(self, state: Path) -> None:
        partial = state.with_suffix(".tmp")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(state)

    def processes(self) -> list[psutil.Process]:
        """Every live process that this head started, orphans included."""
        processes: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(TOKEN) == self.token:
                    processes |= {process, *process.children(recursive=True)}
        return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and p.pid != os.getpid()]

    def answers(self) -> bool:
        """Whether the head takes jobs."""
        try:
            request("GET", self.agent + "/api/local_raylet_healthz")
            request("GET", self.dashboard + "/api/jobs/")
        except OSError:
            return False
        return True


def request(method: str, url: str, timeout_s: float = 10.0) -> bytes:
    """Call the head's REST API (jobs, Serve). Raises OSError when there is no answer or an HTTP error."""
    # Loopback addresses must bypass a proxy that the environment configures.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method=method), timeout=timeout_s) as response:
        return bytes(response.read())


def start_head(state: Path = STATE, dashboard_port: int | None = None, endpoint_port: int | None = None) -> Head:
    """Start a head and wait until it takes jobs, or return the running one.

    state: file that remembers the head. dashboard_port: DASHBOARD_PORT unless given. endpoint_port: where a job will
    serve. Raises UserError when a port is none or taken, the running head has another one, or the head does not start.
    """
    for name, port in (("--dashboard-port", dashboard_port), ("--port", endpoint_port)):
        if port is not None and not 1 <= port <= _LARGEST_PORT:
            raise UserError(f"{name} is {port}; it must be 1 to {_LARGEST_PORT}")
    if head := Head.load(state):
        if head.answers():
            if dashboard_port and head.dashboard != _dashboard(dashboard_port):
                raise UserError(
                    f"--dashboard-port is {dashboard_port}, but the local Ray head runs at {head.dashboard}; "
                    "use its port, or stop it with `rcd down`"
                )
            if endpoint_port is not None:
                _check_endpoint_port(head, endpoint_port)
            return head
        if head.processes():
            raise UserError(f"the local Ray head does not answer at {head.dashboard}; run `rcd down`, then try again")
        _forget(state, head)
    dashboard_port = dashboard_port or DASHBOARD_PORT
    if endpoint_port == dashboard_port:
        raise _same_port(dashboard_port)
    if not _port_is_free(dashboard_port):
        raise UserError(
            f"--dashboard-port {dashboard_port} is in use by another program; choose another: "
            f"rcd up --dashboard-port {dashboard_port + 1}, or make demo DASHBOARD_PORT={dashboard_port + 1}"
        )
    if endpoint_port is not None and not _port_is_free(endpoint_port):
        raise _port_in_use(endpoint_port)
    state.parent.mkdir(parents=True, exist_ok=True)
    log = state.with_suffix(".log")
    head, launched = _launch(state, log, dashboard_port)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while not head.answers():
            if time.monotonic() > deadline or launched.poll() is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise UserError(f"the local Ray head did not start; its log {log} ends with:\n{tail}")
            time.sleep(0.2)
    except BaseException:
        stop_head(state)
        raise
    return head


def _check_endpoint_port(head: Head, port: int) -> None:
    """Raise UserError unless `port` is free or held by this head, for an endpoint that an earlier job deployed."""
    if head.dashboard == _dashboard(port):
        raise _same_port(port)
    if _port_is_free(port):
        return
    for process in head.processes():
        with contextlib.suppress(psutil.Error):
            if any(c.laddr and c.laddr.port == port for c in process.net_connections("tcp")):
                return
    raise _port_in_use(port)


def _same_port(port: int) -> UserError:
    return UserError(f"--port is {port}, which is the dashboard's; choose another, as in make demo PORT={port + 1}")


def _port_in_use(port: int) -> UserError:
    return UserError(f"--port {port} is in use by another program; choose another, as in make demo PORT={port + 1}")


def submit_command(head: Head, port: int | None = None) -> str:
    """The shell command that submits the demo to this head from the current directory and environment.

    port: of the HTTP endpoint, the recipe's unless given.
    """
    changes = [f"-u {name}" for name in _RAY_ADDRESSES if name in os.environ]
    changes += ["NO_PROXY=127.0.0.1"] if urllib.request.getproxies().get("http") else []
    changes += ["RAY_AUTH_MODE=disabled"] if "RAY_AUTH_MODE" in os.environ else []
    words = ["env", *changes] if changes else []
    words += ["ray" if shutil.which("ray") == _RAY else shlex.quote(_RAY), "job submit --address", head.dashboard]
    words += ["--working-dir", "." if Path.cwd() == ROOT else shlex.quote(str(ROOT))]
    words += ["-- python pipelines/full.py --recipe demo", *([f"--set deploy.port={port}"] if port else [])]
    return " ".join(words)


def _launch(state: Path, log: Path, dashboard_port: int) -> tuple[Head, subprocess.Popen[bytes]]:
    """The process lives as long as the head. `Head.processes` may not find it yet: the environment of a new program
    cannot be read at once."""
    # Not under $TMPDIR: the path of a Unix socket inside must stay below 104 characters.
    temp_dir = tempfile.mkdtemp(prefix="rcd-", dir="/tmp")
    token = secrets.token_hex(8)
    names = ["port", "node-manager-port", "object-manager-port", "ray-client-server-port", "runtime-env-agent-port"]
    names += ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [_RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", f"--temp-dir={temp_dir}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # any free ones
    command += [f"--num-cpus={max(4, os.cpu_count() or 1)}", f"--object-store-memory={_object_store_bytes()}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    head = Head(
        token=token,
        dashboard=_dashboard(dashboard_port),
        agent=f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}",
        gcs=f"127.0.0.1:{ports['port']}",
        temp_dir=temp_dir,
    )
    head.save(state)  # before it starts, so that stop_head can find it if this process is killed
    # In its own session, so that Ctrl-C in the terminal does not reach the head.
    with open(log, "wb") as output:
        launched = subprocess.Popen(
            command,
            env=_head_environment(token),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return head, launched


def _object_store_bytes() -> int:
    """A share of the machine's memory within bounds, and no more than fits into shared memory, where Ray keeps it."""
    smallest, largest = _STORE_BYTES
    size = min(largest, int(_STORE_SHARE * psutil.virtual_memory().total))
    with contextlib.suppress(OSError):  # macOS has no /dev/shm
        size = min(size, int(0.9 * shutil.disk_usage("/dev/shm").free))
    return max(smallest, size)


def _dashboard(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def environment() -> dict[str, str]:
    """The environment for Ray's programs that talk to the local head."""
    env = {k: v for k, v in os.environ.items() if k not in _RAY_ADDRESSES}
    env["NO_PROXY"] = env["no_proxy"] = ",".join(filter(None, [env.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    env["RAY_AUTH_MODE"] = "disabled"  # the default depends on tokens in the user's home; this head is on loopback
    return env


def _head_environment(token: str) -> dict[str, str]:
    env = environment()
    # A job's `python` is this environment's.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env[TOKEN] = token
    env["SPT_NOENV"] = "1"  # keeps setproctitle, which Ray's workers call, from overwriting the token
    env["RAY_JOB_STOP_WAIT_TIME_S"] = str(JOB_STOP_S)
    env["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # Ray's next default; unset, each driver prints a warning
    # Despite its name, this makes Ray keep 127.0.0.1 instead of the outward address.
    env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    env["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process per training; no node of this head is ever drained
    env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # how late the end of a training is seen
    # A process keeps what it frees: in a virtual machine, to get it again took 6 to 8 % of a training step.
    env |= {"MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES), "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES)}
    env["PYTHONUNBUFFERED"] = "1"  # a job's output goes to a file: do not buffer it
    return env


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:  # all open at once, so that the ports differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _port_is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def stop_job(head: Head, job: str) -> None:
    """Stop a submitted job and wait until it has ended. Raises UserError after STOP_TIMEOUT_S."""
    with contextlib.suppress(urllib.error.HTTPError):  # it has ended already
        request("POST", f"{head.dashboard}/api/jobs/{job}/stop")
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if json.loads(request("GET", f"{head.dashboard}/api/jobs/{job}"))["status"] not in ("PENDING", "RUNNING"):
            return
        time.sleep(0.2)
    raise UserError(f"job {job} did not stop within {STOP_TIMEOUT_S} s")


def stop_head(state: Path = STATE) -> bool:
    """Stop the head's jobs, then end all its processes: SIGTERM first, then SIGKILL. False when no head is known.

    Raises UserError when a process cannot be ended.
    """
    head = Head.load(state)
    if head is None:
        return False
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
                process.send_signal(sig)  # psutil refuses when another process has got the pid
        psutil.wait_procs(processes, timeout=grace_s)
    if left := head.processes():
        raise UserError(f"cannot stop processes {sorted(p.pid for p in left)} of the local Ray head; kill them by hand")
    _forget(state, head)
    return True


def _forget(state: Path, head: Head) -> None:
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    state.unlink(missing_ok=True)
