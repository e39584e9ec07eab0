"""T_res from a pair of checkpoints: by the stage on real Ray, by `rcd calibrate`, and as a page shows it."""

from __future__ import annotations

import io
import json
from datetime import datetime
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines import calibrate
from pipelines.calibration.inputs import held_out_problems
from pipelines.calibration.job import CalibrationJob, calibrate_model, store, synthetic_problems
from pipelines.cli import main as cli
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.report.calibration import html_page
from pipelines.run.directory import RunDirectory, StageContext
from pipelines.run.stages import stages_of
from rcd_core import DecodeSettings, UserError, load_model, new_model
from rcd_core.families.base import CheckpointInfo
from rcd_core.families.config import ModelConfig
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.io import storage
from rcd_core.tasks import get_task
from rcd_core.text.encoding import content_id
from rcd_core.text.tokenizer import load_tokenizer, mask_token_id, stop_token_ids, train_tokenizer

SIZES: dict[str, Any] = {
    "family": "sdar",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
}
TRAIN = {"steps": 1, "batch_size": 1}
NUM = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, the target surer of itself than the reference."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["#123456", "#654321"], 270)
    tokenizer.save_pretrained(directory / "tokenizer")
    tokenizer = load_tokenizer(directory / "tokenizer")
    for seed, name in enumerate(("target", "baseline", "reference")):
        rcd = {"alpha": "normalized_entropy", "start": "zero"} if name == "target" else {}
        ids = mask_token_id(tokenizer), stop_token_ids(tokenizer), tokenizer.pad_token_id
        model = new_model(
            ModelConfig(**SIZES), vocab_size=len(tokenizer), info=CheckpointInfo(*ids, 37, rcd), seed=seed
        )
        for parameter in model.parameters():
            parameter.data *= 1.5 if name == "reference" else 2.0
        model.save_pretrained(directory / name, tokenizer)
    return directory


def job(models: Path, **changes: Any) -> CalibrationJob:
    given: dict[str, Any] = {
        "stage": "target",
        "checkpoint": str(models / "target"),
        "reference": str(models / "reference"),
        "calibrated": True,
        "tokenizer": str(models / "tokenizer"),
        "task": "sudoku",
        "num_examples": NUM,
        "decode": DecodeSettings(policy="low_confidence_static", denoising_steps=6),
        "max_length": 37,
    }
    return CalibrationJob(**{**given, **changes})


def run(models: Path, **changes: Any) -> dict[str, Any]:
    return calibrate_model(job(models, **changes), list(islice(synthetic_problems("sudoku", 0), NUM)))


@pytest.fixture(scope="module")
def found(models: Path) -> dict[str, Any]:
    return run(models)


def test_the_smallest_distance_wins_and_everything_is_told(found: dict[str, Any]) -> None:
    trials = found["trials"]
    best = min(trials, key=lambda trial: trial["distance"])
    assert found["residual_temperature"] == best["residual_temperature"] and found["distance"] == best["distance"]
    at_one = next(trial for trial in trials if trial["residual_temperature"] == 1.0)
    assert found["distance_uncalibrated"] == at_one["distance"] > best["distance"]
    assert all(trial["distance"] == trial["distance_decoding"] != trial["distance_training"] for trial in trials)
    assert all(trial["num_problems"] == NUM and 0 <= trial["accuracy_low"] <= trial["accuracy"] for trial in trials)
    for side in ("reference", "training", "before", "after"):
        assert sum(found["alphas"]["histograms"][side]) == pytest.approx(1.0, abs=1e-4)
    assert found["agreement"]["overall"]["positions"] > 100 and sum(found["staleness"]["positions"]) > 100
    assert found["discarded"]["overall"]["1"] < found["discarded"]["overall"]["20"]


def test_it_is_a_pure_function_and_the_match_matters(models: Path, found: dict[str, Any]) -> None:
    other = run(models, match="training")
    assert run(models)["trials"] == found["trials"]
    by_training = {t["residual_temperature"]: t["distance"] for t in other["trials"]}
    assert by_training[1.0] == next(t["distance_training"] for t in found["trials"] if t["residual_temperature"] == 1.0)
    assert other["match"] == "training" and min(by_training.values()) == other["distance"]


def test_alpha_of_the_reference_itself_is_matched_at_one(models: Path) -> None:
    """A target that is its own reference, with residuals that weigh next to nothing: T_res 1, distance 0."""
    itself = run(
        models, reference=str(models / "target"), decode=DecodeSettings(alpha="calibrated_entropy", alpha_scale=1e6)
    )
    assert itself["residual_temperature"] == 1.0 and itself["distance"] < 1e-9


def test_where_there_is_nothing_to_match(models: Path) -> None:
    alone = run(models, reference=None)
    assert alone["residual_temperature"] == 1.0 and "without a reference" in alone["nothing_to_match"]
    assert len(alone["trials"]) == 1 and "agreement" not in alone and "staleness" in alone
    fixed = run(models, decode=DecodeSettings(alpha="fixed", policy="low_confidence_static", denoising_steps=6))
    assert fixed["residual_temperature"] == 1.0 and "no temperature changes" in fixed["nothing_to_match"]


def test_a_reference_of_another_vocabulary_is_refused(models: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "sdar_tiny"
    with pytest.raises(UserError, match="the reference's vocab_size is"):
        run(models, reference=str(golden))


def test_a_stored_temperature_is_found_wherever_the_checkpoint_lies(
    models: Path, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCD_CACHE", str(tmp_path))
    uri = f"mock://{tmp_path.name}/model"
    storage.upload_dir(models / "target", uri)
    assert "calibration" not in load_model(uri).info.rcd
    store(uri, found)
    rcd = load_model(uri).info.rcd
    assert rcd["residual_temperature"] == found["residual_temperature"] != 1.0
    assert rcd["calibration"]["match"] == "decoding" and "trials" not in rcd["calibration"]


# -- the stage


def make_recipe(directory: Path, **sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "run",
        "storage": str(directory),
        "block_length": 37,
        "tokenizer": {"vocab_size": 270},
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 4, "num_test": 4},
        "base": {"start": SIZES, "train": TRAIN},
        "reference": {"start": SIZES, "train": TRAIN},
        "target": {"train": TRAIN},
        "calibrate": {"num_examples": NUM, "decode": {"policy": "low_confidence_static", "denoising_steps": 6}},
    }
    return parse_recipe({**raw, **sections})


def context(recipe: Recipe, models: Path) -> StageContext:
    """The stage's, with the models in place of trained ones."""
    run = RunDirectory(recipe.run_directory)
    inputs = stages_of(recipe)["calibrate"].inputs
    for name in inputs:
        if name != "prepare":
            storage.upload_dir(models / name, storage.join(run.stage_directory(name), "model"))
        run.finish(name, {"stage": name}, {"validation": []}, datetime.now().astimezone(), 0.0)
    storage.upload_dir(models / "tokenizer", storage.join(run.stage_directory("prepare"), "tokenizer"))
    console = Console(file=io.StringIO(), width=200)
    return StageContext(recipe=recipe, run=run, stage="calibrate", key="", inputs=inputs, console=console)


def test_the_stage_calibrates_every_target_and_stores_it(ray_cluster: str, models: Path, tmp_path: Path) -> None:
    ctx = context(make_recipe(tmp_path), models)
    assert ctx.inputs == ("prepare", "target", "baseline", "reference")
    summary = calibrate.run(ctx)
    found = storage.read_json(storage.join(ctx.directory, "calibration.json"))
    assert list(found) == ["target", "baseline"] and list(found["baseline"]) == ["discarded"]
    temperature = found["target"]["residual_temperature"]
    assert summary["fingerprint"] == summary["residual_temperatures"] == {"target": temperature}
    assert load_model(ctx.checkpoint("target")).info.rcd["residual_temperature"] == temperature
    assert not (Path(ctx.checkpoint("baseline")) / CALIBRATION_FILE).exists()
    calibrate.report(ctx)
    said = ctx.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"target: T_res {temperature:g}" in said and "report.html" in said
    assert "T_res" in (Path(ctx.directory) / "report.html").read_text()


def test_held_out_problems_of_files_are_those_that_prepare_held_out(models: Path, tmp_path: Path) -> None:
    rows = [get_task("sudoku").synthetic(i, "train", 0) for i in range(9)]
    ids = sorted(content_id(get_task("sudoku").problem(row)) for row in rows)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"question": "?", "answer": "?"}]))
    source = {"task": "sudoku", "train": str(data), "test": str(data), "num_validation": 4}
    recipe = make_recipe(tmp_path, data=source)
    ctx = context(recipe, models)
    held = Path(ctx.run.stage_directory("prepare")) / "validation"
    held.mkdir()
    pq.write_table(pa.table({"example_id": ids[:4]}), held / "part-00000.parquet")
    manifest = {"validation": ["part-00000.parquet"]}
    ctx.run.finish("prepare", {"stage": "prepare"}, manifest, datetime.now().astimezone(), 0.0)
    assert [content_id(problem) for problem in held_out_problems(ctx, 3)] == ids[:3]
    assert len(held_out_problems(ctx, 100)) == 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"task": "sudoku", "train": "/x.jsonl", "test": "/x.jsonl"}}, "data.num_validation is 0"),
        ({"calibrate": {"decode": {"residual_temperature": 0.9}}}, "residual_temperature is what calibrate chooses"),
        ({"calibrate": {"decode": {"residual_source": "reference"}}}, "no self-loop"),
    ],
)
def test_recipes_that_cannot_be_calibrated(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(tmp_path, **sections)


# -- the command and the page


def command(models: Path, *more: str) -> list[str]:
    fast = ["--policy", "low_confidence_static", "--denoising_steps", "6", "--num_examples", str(NUM)]
    return ["calibrate", "--task", "sudoku", "--data", "synthetic", *fast, *more]


def test_the_command_stores_and_reports(
    models: Path, found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    storage.upload_dir(models / "target", str(target))
    pair = ["--target", str(target), "--reference", str(models / "reference")]
    page = tmp_path / "page.html"
    assert cli.main(command(models, *pair, "--dry_run", "--report", str(page))) == 0
    assert float(capsys.readouterr().out) == found["residual_temperature"]
    assert not (target / CALIBRATION_FILE).exists() and "Self-residuals" in page.read_text()
    assert cli.main(command(models, *pair, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == found["trials"]
    assert load_model(target).info.rcd["residual_temperature"] == found["residual_temperature"]


def test_without_a_reference_the_command_tells_what_discarded_predictions_knew(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(models, "--target", str(models / "baseline"))) == 0
    assert capsys.readouterr().out.startswith("top 1: ")
    assert not (models / "baseline" / CALIBRATION_FILE).exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--residual_temperature", "1"], "--residual_temperature"),
        (["--num_examples", "0"], "--num_examples is 0"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--data", str(Path(__file__).parent / "x.jsonl"), "--field", "what=ever"], "--field what=ever"),
    ],
)
def test_refused_on_the_command_line(
    models: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(models, "--target", str(models / "target"), *more)) == 2
    assert message in capsys.readouterr().err


class Tags(HTMLParser):
    """Open tags, to see that every one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("img", "source", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_the_numbers(found: dict[str, Any]) -> None:
    calibration = {"target": found, "baseline": {"discarded": found["discarded"]}}
    page = html_page("<script>", calibration)
    tags = Tags()
    tags.feed(page)
    assert not tags.open and page.count("<picture>") >= 4 and page.count("<h2>") == 4
    assert f"T_res {found['residual_temperature']:g}" in page and f"{found['distance']:.4f}" in page
    assert f"{found['agreement']['by_progress']['js'][0]:.3f}" in page and "SeqD" in page
    assert "<script" not in page
    assert html_page("baseline", {"baseline": calibration["baseline"]}).count("<h2>") == 1
