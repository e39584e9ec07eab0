"""The local head behind `make demo` and `make down`, and jobs submitted to it as to any cluster.

python -m pipelines.ray_cluster.local up      start a head, or reuse the one that runs
python -m pipelines.ray_cluster.local demo    up, then `ray job submit` the demo recipe; Ctrl-C stops the job
python -m pipelines.ray_cluster.local submit -- python pipelines/full.py --recipe arithmetic
python -m pipelines.ray_cluster.local down    stop the job and end every process that the head started
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from pipelines.ray_cluster.local_head import RAY, Head, down, environment, port_is_free, stop_job, up
from rcd_core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".rcd" / "local.json"
NOISE = re.compile(rb"(INFO|WARNING) (packaging|working_dir|dashboard_sdk|sdk)\.py:\d+ -- ")


def _check_endpoint_port(head: Head, port: int) -> None:
    """UserError unless `port` is free or already held by this head (an endpoint deployed by an earlier job)."""
    if port_is_free(port):
        return
    for process in head.processes():
        with contextlib.suppress(psutil.Error):
            if any(c.laddr and c.laddr.port == port for c in process.net_connections("tcp")):
                return
    raise UserError(f"port {port} is taken by another program; choose another: make demo PORT={port + 1}")


class _Interrupted(Exception):
    pass


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def handler(signum: int, frame: FrameType | None) -> None:
        raise _Interrupted

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {s: signal.signal(s, handler) for s in watched}
    try:
        yield
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


def submit(head: Head, entrypoint: list[str]) -> int:
    """`ray job submit` with the repository as working directory; the job's exit code, or 130 when interrupted.

    An interrupt (SIGINT, SIGTERM, SIGHUP) stops the job itself and waits until it has stopped.
    """
    job = f"rcd-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    command = [RAY, "job", "submit", "--address", head.dashboard, "--submission-id", job, "--working-dir", "."]
    command += ["--", *entrypoint]
    print(f"$ {shlex.join(command)}", flush=True)
    client = None
    try:
        with _signals_raise():
            # A session of its own: it goes on streaming the job's last words while the job is being stopped.
            client = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, start_new_session=True
            )
            threading.Thread(target=_copy_without_noise, args=(client,), daemon=True).start()
            return client.wait()
    except _Interrupted:
        print("\nstopping the job ...", flush=True)
        stopped = stop_job(head, job, client)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if client:
                client.wait(5)
        print("the job has stopped; the head still runs, end it with: make down" if stopped else "no job was started")
        return 130
    finally:
        if client and client.poll() is None:
            client.kill()


def _copy_without_noise(client: subprocess.Popen[bytes]) -> None:
    """Pass on what `ray job submit` says on stderr, less its account of which files it packs."""
    for line in client.stderr or ():
        if not NOISE.search(line):
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ray_cluster.local",
        usage="%(prog)s {up,demo,submit,down} [options] [-- COMMAND OF THE JOB]",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("command", choices=("up", "demo", "submit", "down"))
    parser.add_argument("--port", type=int, default=8000, help="demo: the port of the HTTP endpoint")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="the port that jobs are submitted to")
    parser.add_argument("--state", type=Path, default=STATE, help="where the running head is remembered")
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    args, entrypoint = parser.parse_args(words[:cut]), words[cut + 1 :]
    try:
        if args.command == "down":
            down(args.state)
            return 0
        head = up(args.state, args.dashboard_port)
        if args.command == "up":
            return 0
        if args.command == "demo":
            _check_endpoint_port(head, args.port)
            script = ["python", "pipelines/full.py", "--recipe", "demo", "--set", f"deploy.port={args.port}"]
            return submit(head, [*script, *entrypoint])
        if not entrypoint:
            raise UserError("submit needs a command, for example: submit -- python pipelines/full.py --recipe demo")
        return submit(head, entrypoint)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
