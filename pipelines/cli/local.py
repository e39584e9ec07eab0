"""`rcd up` and `rcd down`: start and stop a local Ray head that takes jobs."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.ray_cluster.local import STATE, check_endpoint_port, start_head, stop_head, submit_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    if parser.prog.endswith("up"):
        parser.add_argument("--dashboard-port", type=int, help="port for jobs and the dashboard (default: 8265)")
        parser.add_argument("--port", type=int, help="port that the job's HTTP endpoint will use; it must be free")
    parser.add_argument("--state", type=Path, default=STATE, help="file that remembers the running head")


def run(options: argparse.Namespace) -> int:
    if options.command == "down":
        return down(options.state)
    return up(options.dashboard_port, options.port, options.state)


def up(dashboard_port: int | None = None, port: int | None = None, state: Path = STATE) -> int:
    """Start a local Ray head, or reuse the running one, and print its addresses and how to submit a job."""
    head = start_head(state, dashboard_port)
    if port is not None:
        check_endpoint_port(head, port)
    print(f"Ray head at {head.gcs}, dashboard at {head.dashboard}. Stop it with: rcd down")
    print(f"Submit a job with: {submit_command(head, port)}")
    return 0


def down(state: Path = STATE) -> int:
    """Stop the local Ray head and every process that it started."""
    print("stopped the local Ray head and all its processes" if stop_head(state) else "no local Ray head is running")
    return 0
