"""Experiment trackers beside TensorBoard: Weights & Biases, MLflow and trackio.

The driver sends them what rank 0 has logged. Address, credentials and offline mode are the tool's own (WANDB_MODE,
MLFLOW_TRACKING_URI, TRACKIO_DIR). A problem of a tracker is said once and never ends a training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

from rcd_core.noise import hash_key

Line = Mapping[str, float]


class Run(Protocol):
    """A run of a tool: one per stage."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class Tracker:
    """Opens the tool's run at the first line. Steps that a restart runs again are not sent twice.

    say: tells the user why the tool gets nothing more.
    """

    def __init__(
        self, tool: str, project: str, name: str, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """name: of the tool's run. settings: what it shows as the run's configuration."""
        self.tool, self.project, self.name, self.settings, self.say = tool, project, name, settings, say
        self._run: Run | None = None
        self._step = 0
        self._failed = False

    def update(self, lines: list[dict[str, float]]) -> None:
        """Send the lines after the last update. lines: all so far."""
        new = [line for line in lines if line["step"] > self._step]
        if not new or self._failed:
            return
        try:
            if self._run is None:
                self._run = _OPEN[self.tool](self.project, self.name, self.settings)
            for line in new:
                self._run.log({f"train/{k}": v for k, v in line.items() if k != "step"}, int(line["step"]))
                self._step = int(line["step"])
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        if self._run is None or self._failed:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self.say(f"{self.tool} gets no more metrics ({' '.join(str(error).split())[:300]}); the training goes on")


class _Wandb:
    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        # The same run after a restart of the job; wandb itself drops the steps that it has.
        own = f"{hash_key('wandb', project, name):016x}"
        wandb = import_module("wandb")
        self._run = wandb.init(project=project, name=name, id=own, resume="allow", config=dict(settings))

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        self._client = import_module("mlflow").MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self._id = self._client.create_run(number, run_name=name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._id, key, value)

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=step)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        self._tool = import_module("trackio")
        self._tool.init(project=project, name=name, resume="allow", config=dict(settings), embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        self._tool.log(values, step=step)

    def finish(self) -> None:
        self._tool.finish()


_OPEN: dict[str, Callable[[str, str, Mapping[str, Any]], Run]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
