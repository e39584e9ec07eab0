"""What a job's driver and each of its worker processes do before they import much."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ASK = """
import gc, ray
from pipelines.ray_cluster.connection import connect

connect()
print(gc.get_threshold()[0], ray.get(ray.remote(lambda: (gc.isenabled(), gc.get_threshold()[0])).remote()))
"""


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_some"}])
def test_driver_and_workers_collect_garbage_rarely(ray_cluster: str, token: dict[str, str]) -> None:
    """In a process of its own, because this one has joined the cluster already."""
    command = [sys.executable, "-c", ASK]
    answer = subprocess.run(command, env=os.environ | token, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.stdout.splitlines()[-1] == "50000 (True, 50000)", answer.stdout + answer.stderr
