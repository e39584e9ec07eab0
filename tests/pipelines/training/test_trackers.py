"""Trackers, each in its own offline mode where it is installed; and tools that fail."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe.inputs import check_inputs
from pipelines.recipe.load import load_recipe
from pipelines.training import trackers
from pipelines.training.trackers import Tracker
from rcd_core.errors import UserError

ROOT = Path(__file__).parents[3]
LINES = [{"step": float(n), "loss": 2.0 / n, "grad_norm": 1.0} for n in range(1, 6)]


class Tool:
    """Remembers what it gets, and fails at a step."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing, self.got, self.finished = failing, list[tuple[int, dict[str, float]]](), False

    def __call__(self, project: str, name: str, settings: Mapping[str, Any]) -> Tool:
        self.opened = project, name, dict(settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.failing:
            raise OSError("its server\nis gone")
        self.got.append((step, values))

    def finish(self) -> None:
        self.finished = True


def tracker(tool: Tool, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Tracker:
    monkeypatch.setitem(trackers._OPEN, "wandb", tool)
    return Tracker("wandb", "rcd", "demo/target", {"target.train.steps": 5}, said.append)


def test_every_step_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tool, said = Tool(), list[str]()
    t = tracker(tool, monkeypatch, said)
    t.update([])
    assert not hasattr(tool, "opened"), "a training that logs nothing opens no run"
    t.update(LINES[:2])
    t.update(LINES[:1])  # a restart from before step 2
    t.update(LINES)
    t.close()
    assert [step for step, _ in tool.got] == [1, 2, 3, 4, 5] and tool.finished and not said
    assert tool.got[1][1] == {"train/loss": 1.0, "train/grad_norm": 1.0}
    assert tool.opened == ("rcd", "demo/target", {"target.train.steps": 5})


def test_a_tool_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tool, said = Tool(failing=3), list[str]()
    t = tracker(tool, monkeypatch, said)
    for count in (2, 4, 5):
        t.update(LINES[:count])
    t.close()
    assert [step for step, _ in tool.got] == [1, 2] and not tool.finished
    (line,) = said
    assert "wandb" in line and "its server is gone" in line


def test_a_tool_that_is_missing_is_named_before_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("sudoku-reference", ["trackers=[mlflow]", f"storage={tmp_path}"])
    monkeypatch.setattr("pipelines.recipe.inputs.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackers has 'mlflow'.*rcd-ray\[mlflow\]"):
        check_inputs(recipe)


SEND = """
import sys
from pipelines.training.trackers import Tracker
from tests.pipelines.training.test_trackers import LINES
said = []
t = Tracker(sys.argv[1], "rcd-test", "demo/target", {"target.train.steps": 5}, said.append)
t.update(LINES[:3]); t.update(LINES); t.close()
assert not said, said
"""


def send(tool: str, tmp_path: Path, **environment: str) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install 'rcd-ray[{tool}]'")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", SEND, tool]
    own = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wandb_offline(tmp_path: Path) -> None:
    send("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    (stored,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = stored.read_bytes()
    assert b"train/loss" in content and b"target.train.steps" in content


READ_MLFLOW = """
import mlflow
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("rcd-test").experiment_id])
losses = client.get_metric_history(run.info.run_id, "train/loss")
print(run.info.run_name, run.info.status, run.data.params, [(m.step, m.value) for m in losses])
"""


def test_mlflow_in_a_database(tmp_path: Path) -> None:
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/runs.db"}
    send("mlflow", tmp_path, **store)
    done = subprocess.run(
        [sys.executable, "-c", READ_MLFLOW], env={**os.environ, **store}, capture_output=True, text=True, timeout=300
    )
    losses = [(int(line["step"]), line["loss"]) for line in LINES]
    assert done.stdout.strip() == f"demo/target FINISHED {{'target.train.steps': '5'}} {losses}", done.stderr


def test_trackio_on_this_machine(tmp_path: Path) -> None:
    send("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    assert list((tmp_path / "trackio").rglob("rcd-test*"))
