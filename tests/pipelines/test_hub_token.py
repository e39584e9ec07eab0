"""A token of the driver's environment opens gated data and tokenizers for all workers, and is written nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from rcd_core.text.tokenizer import train_tokenizer
from tests.conftest import ROOT
from tests.hub_server import Hub, hub_server
from tests.pipelines.calibration_run import SIZES, TRAIN
from tests.pipelines.test_prepare import problem
from tests.pipelines.test_prepare_hub import parquet

GATED = "hf_" + "gated" * 8


def prepare(tmp_path: Path, token: str | None) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose environment is the only one with a token."""
    recipe = {
        "name": "gated",
        "storage": str(tmp_path / "runs"),
        "block_length": 8,
        "tokenizer": {"path": "o/model"},
        "data": {"task": "gsm8k", "train": "hf://o/data", "test": "hf://o/data:test", "num_validation": 2},
        **{section: {"start": SIZES, "train": TRAIN} for section in ("base", "reference")},
        "target": {"train": TRAIN},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")} | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-m", "pipelines.prepare", "--recipe", str(tmp_path / "recipe.yaml"), "--verbose"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def add_gated(hub: Hub, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer((row["question"] for row in map(problem, range(12))), 300).save_pretrained(tokenizer)
    hub.add("o/model", {path.name: path.read_bytes() for path in tokenizer.iterdir()})
    rows = [problem(i) for i in range(12)]
    hub.add("o/data", {"train-0.parquet": parquet(rows), "test.parquet": parquet(rows[:2])})
    hub.tokens = {"o/model": GATED, "o/data": GATED}


def written(*roots: Path) -> list[Path]:
    files = [path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5
    return [path for path in files if GATED.encode() in path.read_bytes()]


def test_workers_have_the_driver_s_token_and_nothing_shows_it(ray_cluster: str, tmp_path: Path) -> None:
    assert "HF_TOKEN" not in os.environ
    with hub_server() as hub:
        add_gated(hub, tmp_path)
        done = prepare(tmp_path, GATED)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {name for name, _, _ in hub.read} == {"o/model", "o/data"}
    (manifest,) = (tmp_path / "runs").rglob("prepare/manifest.json")
    assert pq.read_table(manifest.parent / "train").num_rows == 10
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    assert GATED not in done.stdout + done.stderr
    assert written(tmp_path / "runs", session / "logs") == []
    environments = [str(job.get("RuntimeEnv", job)) for job in ray._private.state.jobs()]
    assert environments and not any(GATED in one for one in environments)


@pytest.mark.parametrize("token", [None, GATED[:-1] + "x"])
def test_a_missing_or_wrong_token_gets_one_message(ray_cluster: str, tmp_path: Path, token: str | None) -> None:
    with hub_server() as hub:
        add_gated(hub, tmp_path)
        failed = prepare(tmp_path, token)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "HF_TOKEN" in failed.stderr and "o/" in failed.stderr
    assert (token or GATED) not in failed.stdout + failed.stderr
