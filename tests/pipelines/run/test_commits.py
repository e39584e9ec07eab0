"""What a run reads from the hub: the commit is asked once, is part of keys and manifests, and is what stages load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.data.hub import hub_files
from pipelines.recipe.load import parse_recipe
from pipelines.run.commits import pinned
from pipelines.run.directory import RunDirectory
from pipelines.run.driver import main
from pipelines.run.keys import differences
from pipelines.run.stages import stages_of
from pipelines.serving.description import at_commits, parse_description
from rcd_core import UserError, load_model
from rcd_core.io import storage
from rcd_core.io.hub import cached_snapshot, commit_of
from rcd_core.text.tokenizer import load_tokenizer, train_tokenizer
from tests.hub_server import Hub, hub_server

GOLDEN = Path(__file__).parents[2] / "golden"
MODEL, DATA = "owner/sdar-b4", "hf://owner/rows"
STAGES = "reference,target"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model and a data set, and an empty cache of its client."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server() as hub:
        hub.add(MODEL, files_of(GOLDEN / "sdar_tiny"))
        hub.add("owner/reference", files_of(GOLDEN / "rcd" / "sdar_ref_tiny"))
        hub.add("owner/rows", {"train.jsonl": b"{}", "test.jsonl": b"{}"})
        yield hub


def write_recipe(directory: Path, model: str = MODEL, **changes: Any) -> Path:
    """A run that trains nothing, so that its models need no cluster."""
    raw: dict[str, Any] = {
        "name": "run",
        "storage": str(directory),
        "block_length": 4,
        "data": {"task": "qa", "train": None, "test": DATA},
        "tokenizer": {"path": model},
        "target": {"start": model, "train": None},
        "reference": {"start": "owner/reference", "train": None},
        "baseline": False,
        **changes,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(recipe: Path, *more: str) -> int:
    return main(["--recipe", str(recipe), "--stages", STAGES, *more])


def stored(directory: Path, stage: str, name: str = "run") -> dict[str, Any]:
    manifest = RunDirectory(str(directory / name)).manifest(stage)
    assert manifest is not None
    return manifest


def test_a_run_keeps_its_commits_when_the_hub_moves(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, first = write_recipe(tmp_path), hub.commit(MODEL)
    assert run(recipe) == 0
    made = stored(tmp_path, "target")
    assert made["material"]["hub"] == {MODEL: first} and made["summary"]["checkpoint"] == f"{MODEL}@{first}"
    second = hub.add(MODEL, files_of(GOLDEN / "rcd" / "sdar_ref_tiny"))
    assert run(recipe, "--redo", "reference") == 0  # the target's commit is that of the run
    assert stored(tmp_path, "target") == made
    assert run(recipe, "--set", "name=other") == 0
    other = stored(tmp_path, "target", "other")
    assert other["material"]["hub"] == {MODEL: second} and other["key"] != made["key"]
    here, there = (load_model(one["summary"]["checkpoint"]) for one in (made, other))
    assert here.num_parameters() == load_model(GOLDEN / "sdar_tiny").num_parameters() and here.info.block_length == 4
    assert there.name.endswith(second)


def test_a_given_revision_is_honoured(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit(MODEL)
    hub.add(MODEL, {"config.json": b"{}"})
    assert run(write_recipe(tmp_path, f"{MODEL}@{first}")) == 0
    assert stored(tmp_path, "target")["summary"]["checkpoint"] == f"{MODEL}@{first}"
    assert commit_of(MODEL, "main") == hub.commit(MODEL) != first == commit_of(MODEL, first)
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    commit = hub.add("owner/tokenizer", files_of(tmp_path / "tokenizer"))
    hub.add("owner/tokenizer", {"tokenizer.json": b"moved"})
    assert load_tokenizer(f"owner/tokenizer@{commit}").get_vocab() == tokenizer.get_vocab()


def test_manifests_without_a_commit_stay_valid(hub: Hub, tmp_path: Path) -> None:
    """As an older release wrote them: only what the recipe says is compared."""
    recipe = write_recipe(tmp_path)
    assert run(recipe) == 0
    path = storage.join(str(tmp_path / "run" / "target"), "manifest.json")
    old = storage.read_json(path)
    del old["material"]["hub"]
    storage.write_json(path, old)
    storage.remove(storage.join(str(tmp_path / "run" / "target"), "key.json"))
    hub.add(MODEL, {"config.json": b"{}"})
    assert run(recipe) == 0 and storage.read_json(path) == old
    assert run(recipe, "--set", "target.start=owner/reference", "--set", "tokenizer.path=owner/reference") == 2


def test_two_known_commits_differ() -> None:
    material: dict[str, Any] = {"recipe": {}, "outside": {}, "inputs": {}, "schema": 2}
    old, new = ({**material, "hub": {MODEL: commit * 40}} for commit in "ab")
    (line,) = differences(old, new)
    assert MODEL in line and "aaaa" in line and "bbbb" in line
    assert not differences(old, {**new, "hub": {MODEL: None}}) and not differences(material, new)


def test_offline_the_cached_commit_counts(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants, snapshot_download

    commit = hub.commit(MODEL)
    load_model(MODEL)  # downloads it
    rows = hub.commit("owner/rows")
    snapshot_download("owner/rows", repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(write_recipe(tmp_path), "--stages", "target") == 0
    assert stored(tmp_path, "target")["material"]["hub"] == {MODEL: commit}
    assert load_model(f"{MODEL}@{commit}").info.block_length == 4
    snapshot = cached_snapshot("owner/rows", None, "dataset")
    assert hub_files(DATA, "test", "data.test") == [f"{snapshot}/test.jsonl"] and snapshot and snapshot.name == rows
    assert run(write_recipe(tmp_path)) == 2, "the reference was never downloaded"
    assert "reference.start" in capsys.readouterr().err


def test_data_and_served_models_are_read_at_their_commit(hub: Hub, tmp_path: Path) -> None:
    raw = yaml.safe_load(write_recipe(tmp_path).read_text())
    raw["data"]["test"] = [f"{DATA}:test", f"{DATA}:train?revision=main"]
    raw["deploy"] = {"start": "zero", "models": {MODEL.split("/")[1]: {"checkpoint": MODEL}}}
    recipe, commit, rows = parse_recipe(raw), hub.commit(MODEL), hub.commit("owner/rows")
    prepare = stages_of(recipe)["prepare"]
    assert prepare.outside == {"data.test": tuple(raw["data"]["test"]), "tokenizer.path": MODEL}
    at = pinned(recipe, {MODEL: commit, **dict.fromkeys(raw["data"]["test"], rows)})
    assert at.data.test == (f"{DATA}:test?revision={rows}", f"{DATA}:train?revision={rows}")
    assert at.deploy.models["sdar-b4"].checkpoint == at.tokenizer.path == f"{MODEL}@{commit}"
    hub.add("owner/rows", {"moved.jsonl": b"{}"})
    (file,) = hub_files(at.data.test[1], "test", "data.test")
    assert file == f"hf://datasets/owner/rows@{rows}/train.jsonl"
    described = at_commits(parse_description({"models": {"m": {"checkpoint": MODEL}, "n": {"checkpoint": "/n"}}}))
    assert [model.checkpoint for model in described.models.values()] == [f"{MODEL}@{commit}", "/n"]
    with pytest.raises(UserError, match="owner/none"):
        at_commits(parse_description({"models": {"m": {"checkpoint": "owner/none"}}}))
    json.dumps(at.model_dump(mode="json"))
