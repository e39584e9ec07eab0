"""`rcd up` and `rcd down`: start and stop a local Ray head that takes jobs."""

from __future__ import annotations

from pipelines.cli.flags import DownFlags, UpFlags
from pipelines.ray_cluster.local import STATE, start_head, stop_head, submit_command


def up(flags: UpFlags) -> int:
    """Start a local Ray head, or reuse the running one, and print its addresses and how to submit a job."""
    head = start_head(flags.state or STATE, flags.dashboard_port, flags.port)
    print(f"Ray head at {head.gcs}, dashboard at {head.dashboard}. Stop it with: rcd down")
    print(f"Submit a job with: {submit_command(head, flags.port)}")
    return 0


def down(flags: DownFlags) -> int:
    """Stop the local Ray head and every process that it started."""
    stopped = stop_head(flags.state or STATE)
    print("stopped the local Ray head and all its processes" if stopped else "no local Ray head is running")
    return 0
