"""What each worker process of a job does before it imports anything."""

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
print(ray.get(ray.remote(lambda: (gc.isenabled(), gc.get_threshold()[0])).remote()))
"""


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_some"}])
def test_workers_collect_garbage_rarely(ray_cluster: str, token: dict[str, str]) -> None:
    """In a process of its own, because this one has joined the cluster already."""
    command = [sys.executable, "-c", ASK]
    answer = subprocess.run(command, env=os.environ | token, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.stdout.splitlines()[-1] == "(True, 50000)", answer.stdout + answer.stderr
