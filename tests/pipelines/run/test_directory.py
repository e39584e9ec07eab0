"""Stage keys, run directories and the listing of runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.cli import main as cli
from pipelines.ray_cluster.connection import connect
from pipelines.ray_cluster.resources import wait_for_resources
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, StageContext, key_material
from pipelines.run.keys import differences, fingerprint, key_of
from pipelines.run.lease import Lease
from pipelines.run.plan import ancestors, make_plan, with_dependents
from pipelines.run.stages import stages_of
from rcd_core.errors import UserError
from rcd_core.io import storage


def keys(recipe: Recipe) -> dict[str, str]:
    """Key of every stage, as if each input's fingerprint were its key."""
    found: dict[str, str] = {}
    for name, stage in stages_of(recipe).items():
        found[name] = key_of(key_material(stage, recipe, found))
    return found


DEMO = load_recipe("sudoku-reference")
USED = {"calibrate", "evaluate", "deploy"}  # what decodes the targets
TRAINED = {"base", "reference", "signals", "target", "target-paper_alpha", "baseline", *USED}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("deploy.port=81", {"deploy"}),
        ("resources.num_workers=4", set()),
        ("target.train.log_every=1", set()),
        ("data.max_bad_rows=0.5", set()),
        ("evaluate.thresholds=[0.5]", {"evaluate"}),
        ("calibrate.num_examples=9", USED),
        ("variants.paper_alpha.dropout=0", {"target-paper_alpha", *USED}),
        ("target.residual.dropout=0", {"target", "target-paper_alpha", *USED}),
        ("target.train.learning_rate=1", {"target", "target-paper_alpha", "baseline", *USED}),
        ("signals.top_k=9", {"signals", "target-paper_alpha", *USED}),
        ("target.train.steps=1", TRAINED - {"base", "reference"}),
        ("base.train.steps=1", TRAINED - {"reference", "signals"}),
        ("noise.draws=9", TRAINED),
        ("data.num_test=1", TRAINED | {"prepare"}),
    ],
)
def test_a_change_reaches_exactly_what_depends_on_it(override: str, changed: set[str]) -> None:
    before, after = keys(DEMO), keys(load_recipe("sudoku-reference", [override]))
    assert {name for name in before if before[name] != after[name]} == changed


def test_stage_order_and_inputs() -> None:
    stages = stages_of(DEMO)
    order = "prepare base reference signals target target-paper_alpha baseline calibrate evaluate deploy"
    assert list(stages) == order.split()
    for name, stage in stages.items():
        assert all(list(stages).index(i) < list(stages).index(name) for i in stage.inputs)
    assert ancestors(stages, "signals") == ["prepare", "reference"]
    assert with_dependents(stages, ["baseline"]) == ["baseline", "calibrate", "evaluate", "deploy"]
    alone = stages_of(load_recipe("sudoku-reference", ["calibrate=null", "deploy.baseline=false"]))
    assert with_dependents(alone, ["baseline"]) == ["baseline", "evaluate"]
    assert "baseline" in stages["deploy"].inputs, "the playground compares with it"
    online = load_recipe("sudoku-reference", ["target.residual={source: online}", "variants={}"])
    assert "signals" not in stages_of(online) and "reference" in stages_of(online)["target"].inputs
    distilled = stages_of(load_recipe("sudoku-reference", ["target.train.distill=true"]))
    assert "reference" in distilled["target"].inputs and "reference" in distilled["baseline"].inputs


def test_without_a_use_for_it_there_is_no_reference() -> None:
    alone = ["target.residual={source: self}", "variants={}", "evaluate.starts=[zero]", "deploy.start=zero"]
    for reference in ([], ["reference=null"]):
        stages = stages_of(load_recipe("sudoku-reference", [*alone, *reference]))
        assert list(stages) == ["prepare", "base", "target", "baseline", "calibrate", "evaluate", "deploy"]
        assert stages["target"].inputs == ("prepare", "base")
    asked = stages_of(load_recipe("sudoku-reference", [*alone[:3], "deploy.start=reference"]))
    assert "reference" in asked["deploy"].inputs and "reference" not in asked["evaluate"].inputs


def test_a_checkpoint_from_outside_stands_for_training_and_enters_keys_by_content(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    sets = [f"reference.start={tmp_path}", "reference.train=null", f"tokenizer.path={tmp_path}"]
    recipe = load_recipe("sudoku-reference", sets)
    stage = stages_of(recipe)["reference"]
    assert not stage.needs_cluster and stage.inputs == ()
    before = keys(recipe)
    (tmp_path / "model.safetensors").write_text("[]")
    fingerprint.cache_clear()  # one look per process
    after = keys(recipe)
    assert before["reference"] != after["reference"] and before["signals"] != after["signals"]
    old, new = (key_material(stage, recipe, {}) for _ in range(2))
    old["outside"] = {}
    assert differences(old, new) == ["reference.start: the files have changed"]


@pytest.fixture(params=["local", "mock"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    path = (
        f"mock://{tmp_path.name}/runs/demo" if request.param == "mock" else str(tmp_path / "runs" / "sudoku-reference")
    )
    yield path
    storage.remove(path)


def test_run_directory_keeps_partial_results_of_its_key_only(directory: str) -> None:
    run, stages = RunDirectory(directory), stages_of(DEMO)
    material = key_material(stages["base"], DEMO, {"prepare": "p"})
    partial = storage.join(run.stage_directory("base"), "checkpoint")
    run.begin("base", material)
    storage.write_bytes(partial, b"x")
    run.begin("base", material)
    assert storage.exists(partial) and run.manifest("base") is None
    run.begin("base", {**material, "seed": 1})
    assert not storage.exists(partial)
    manifest = run.finish("base", material, {"rows": 3, "fingerprint": "abc"}, datetime.now().astimezone(), 1.5)
    assert run.manifest("base") == manifest
    assert manifest["key"] == key_of(material) and manifest["fingerprint"] == key_of("abc") != manifest["key"]
    assert manifest["summary"]["rows"] == 3 and manifest["seconds"] == 1.5


def test_a_run_directory_of_an_older_release_is_still_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files as written before the modules became packages: the stage is skipped, the lease is listed."""
    data: dict[str, Any] = {"task": "sudoku", "test_task": None, "train": "synthetic", "test": "synthetic"}
    data |= {"num_train": 32768, "num_test": 1024, "num_validation": 0, "fields": {}, "test_fields": None}
    data |= {"max_length": 37, "min_length": None, "pad_multiple": None}
    recipe = {**{f"data.{name}": value for name, value in data.items()}, "block_length": 37, "seed": 0}
    recipe |= {"tokenizer.path": None, "tokenizer.vocab_size": 320}
    material = {"stage": "prepare", "schema": 2, "recipe": recipe, "outside": {}, "inputs": {}}
    key = "c53e8ade8121f330b541a6709fad77c5d0114a5738a078a1f364d42c58233681"
    times = {"started": "2026-11-23T10:00:00+00:00", "seconds": 9.5, "created": "2026-11-23T10:00:09+00:00"}
    manifest = {"schema": 2, "stage": "prepare", "key": key, "fingerprint": "f", "material": material, "summary": {}}
    holder = {"owner": "o", "host": "h", "pid": 1, "job": "raysubmit_1", "since": "2026-11-23T10:00:00", "beat": 3}
    files = {"prepare/key.json": {"key": key, "material": material}, "prepare/manifest.json": manifest | times}
    for name, content in {**files, "lease.json": holder, "recipe.yaml": {}}.items():
        (tmp_path / "sudoku-reference" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sudoku-reference" / name).write_text(json.dumps(content))
    run, stages = RunDirectory(str(tmp_path / "sudoku-reference")), stages_of(DEMO)
    assert key_of(material) == key == run.partial_key("prepare")
    assert make_plan(DEMO, stages, run)["prepare"].action == "skip"
    assert cli.main(["runs", "--storage", str(tmp_path)]) == 0
    assert "raysubmit_1" in capsys.readouterr().out


def test_context_hands_out_inputs_and_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    inputs = ("base", "reference")
    context = StageContext(recipe=DEMO, run=run, stage="target", key="k", inputs=inputs, console=Console())
    with pytest.raises(UserError, match="target.* base"):
        context.input_dir("base")
    with pytest.raises(LookupError, match="no input 'signals'"):
        context.input("signals")
    now = datetime.now().astimezone()
    run.finish("base", {}, {}, now, 0)
    run.finish("reference", {}, {"checkpoint": "owner/name"}, now, 0)
    assert context.checkpoint("base") == str(tmp_path / "base" / "model")
    assert context.checkpoint("reference") == "owner/name"


def test_rcd_runs_lists_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["runs", "--storage", str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err
    assert cli.main(["runs", "--storage", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out
    run = RunDirectory(str(tmp_path / "sudoku-reference"))
    run.write_recipe(DEMO)
    run.finish("prepare", {}, {}, datetime.now().astimezone(), 0)
    run.begin("base", {})
    Lease(run.path)._beat()
    assert cli.main(["runs", "--storage", str(tmp_path)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "sudoku-reference" in line)
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[1:4] == ["sudoku-reference", "prepare", "base"] and "process" in cells[4]


def test_resources_are_waited_for_with_a_deadline(ray_cluster: str) -> None:
    said: list[str] = []
    connect()
    wait_for_resources([{"CPU": 1}] * 2, 5, "stage base", free=True, say=said.append)
    assert said == []
    with pytest.raises(UserError) as caught:
        wait_for_resources([{"CPU": 1, "GPU": 1}] * 2, 0.2, "stage base", say=said.append)
    message = str(caught.value)
    assert "no resources for stage base after 0.2 s: wanted 2 x (CPU 1, GPU 1); present CPU 4, GPU 0" in message
    assert len(said) == 1 and "waiting for resources for stage base" in said[0]
    with pytest.raises(UserError, match=r"wanted 1 x \(CPU 5\); present CPU 4 on 1 node"):
        wait_for_resources([{"CPU": 5}], 0, "stage base")


def test_who_holds_what_is_waited_for_is_said(ray_cluster: str) -> None:
    """A job's actor and placement group, and a replica by the name that Serve gives it."""
    connect()
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    @ray.remote(num_cpus=1)
    class Holder:
        def here(self) -> None:
            pass

    held = [Holder.remote(), Holder.options(name="SERVE_REPLICA::tiny#Target#abc").remote()]
    ray.get([one.here.remote() for one in held])
    group = placement_group([{"CPU": 1}] * 2)
    ray.get(group.ready())
    here = f"process {os.getpid()} on {ray.util.get_node_ip_address()}"
    try:
        with pytest.raises(UserError) as caught:
            _wait_until_held(60)
    finally:
        remove_placement_group(group)
        for one in held:
            ray.kill(one)
    message = str(caught.value)
    assert "present CPU 4 on 1 node(s), of which idle CPU 0; " in message
    assert f"; held by {here} (3 x CPU 1), the served application tiny (1 x CPU 1); stop what holds them" in message


def _wait_until_held(seconds: float) -> None:
    """The refusal for want of idle CPUs, once the task that holds them has started."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        wait_for_resources([{"CPU": 1}], 0, "stage base", free=True)
        time.sleep(0.1)
