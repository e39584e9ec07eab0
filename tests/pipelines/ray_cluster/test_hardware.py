"""The device that a process computes on is the one it has asked Ray for, also where torch sees a GPU.

No GPU is needed: torch is made to say that there is one. Anything put on it would then fail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.evaluation.actor import DecodeActor, Method, Plan
from pipelines.evaluation.results import MethodInfo
from pipelines.ray_cluster.hardware import device_of
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.serving.description import describe
from pipelines.serving.graph import application
from pipelines.serving.http.guard import ApiLimits
from pipelines.signals.actor import SignalActor
from pipelines.signals.plan import make_job
from rcd_core import DecodeSettings, UserError
from rcd_core.io import storage
from tests.pipelines.calibration_run import run_job
from tests.pipelines.ray_cluster.pretended_gpu import show_gpu
from tests.pipelines.signal_run import context
from tests.pipelines.test_job import Job


@pytest.fixture
def visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("visible_gpu")
def test_what_was_asked_for_decides() -> None:
    assert device_of(0) == device_of(0.0) == ("cpu", None)
    assert device_of(0.5) == device_of(1) == ("cuda", torch.bfloat16)
    assert device_of(None) == ("cuda", torch.bfloat16), "outside of Ray"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(None) == device_of(0) == ("cpu", None)
    with pytest.raises(UserError, match="gpus_per_worker"):
        device_of(1)


@pytest.mark.usefixtures("visible_gpu")
def test_signals_without_gpus_are_computed_on_the_cpu(prepared: Recipe) -> None:
    actor = SignalActor(make_job(context(prepared)))
    assert actor.model.device.type == "cpu" and actor.model_facts["compute_dtype"] == "float32"
    actor.compute(0)


@pytest.mark.usefixtures("visible_gpu")
def test_calibration_without_gpus_runs_on_the_cpu(tiny_models: Path, calibration: dict[str, Any]) -> None:
    assert run_job(tiny_models, gpus=0)["trials"] == calibration["trials"]


@pytest.mark.usefixtures("visible_gpu")
def test_answers_without_gpus_are_decoded_on_the_cpu(tiny_models: Path, tmp_path: Path) -> None:
    checkpoint, file = str(tiny_models / "target"), str(tmp_path / "test.parquet")
    columns = {"example_id": ["a"], "prompt_ids": [[1, 2]], "prompt": ["?"], "answer": ["1"]}
    pq.write_table(pa.table(columns), file)
    info = MethodInfo(
        name="a", title="a", model="target", baseline=None, start=None, block_length=37, trained_with=None
    )
    method = Method(info=info, checkpoint=checkpoint, reference=None, settings=DecodeSettings(block_length=37))
    plan = Plan(
        task="sudoku", grader="default", attention="auto", run_code=False, tokenizer=checkpoint, files=(file,),
        methods=(method,), pieces=(), samples=1, batch_size=1, threads=1, gpus=0, parts="", name="", flush_s=1.0,
    )  # fmt: skip
    actor = DecodeActor(plan)
    actor._load((checkpoint, None))
    model = actor.model
    assert model.device.type == "cpu" and model.dtype == torch.float32 and "bfloat16" not in actor.hardware


def test_replicas_get_what_their_deployment_asks_for() -> None:
    for gpus in (0, 1):
        made = application(
            describe(load_recipe("sudoku-reference", [f"resources.gpus_per_worker={gpus}"]), "/{}".format), ApiLimits()
        )
        for target in made._bound_deployment.init_args[0].values():
            deployment = target._bound_deployment
            assert deployment.init_args[1] == deployment.ray_actor_options["num_gpus"] == gpus / 2


@pytest.mark.drill
@pytest.mark.timeout(700)
def test_a_job_without_gpus_stays_on_the_cpu(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real Ray, whose workers believe that they have a GPU."""
    hook = {"worker_process_setup_hook": f"{show_gpu.__module__}.{show_gpu.__name__}"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": hook}))
    few = [f"{stage}.train.{key}=2" for stage in ("base", "reference", "target") for key in ("steps", "batch_size")]
    few += ["target.residual.source=signals", "target.residual.alpha_scale=null", "variants={}", "noise.draws=1"]
    few += ["calibrate=null", "baseline=false", "deploy.baseline=false"]
    few += ["data.num_train=64", "data.num_test=2", "evaluate.thresholds=[0.5]"]
    job = Job("sudoku-reference", "run", tmp_path, few)
    job.finish("--stages", "[!d]*", timeout=650)
    results = storage.read_json(storage.join(job.run.stage_directory("evaluate"), "results.json"))
    assert {device["dtype"] for device in results["hardware"]["devices"]} == {"float32"}
