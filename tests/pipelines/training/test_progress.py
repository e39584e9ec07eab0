"""metrics.jsonl, Ray's gauges, and TensorBoard while a training runs and at its end."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.run.directory import RunDirectory, StageContext
from pipelines.training import metrics, progress, trackers
from pipelines.training.metrics import MetricsLog, read_metrics
from pipelines.training.progress import LiveEvents, Progress, write_events
from rcd_core.io import storage
from tests.pipelines.training.test_trackers import Tool
from tests.pipelines.training_run import make_recipe
from tests.s3_server import s3_server


def test_metrics_go_to_file_and_gauges_and_a_resumed_run_drops_later_lines(tmp_path: Path) -> None:
    first = MetricsLog("demo", "target", str(tmp_path), 0, 0)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 0.5 * step, "loss_p0.25": 1.0})
    assert first.close() == ""
    assert first.gauges["loss_p0.25"].info["name"] == "rcd_train_loss_p0_25"
    assert first.gauges["loss"].info["default_tags"] == {"run": "demo", "stage": "target"}
    MetricsLog("demo", "target", str(tmp_path), 1, 2).log({"step": 9})
    second = MetricsLog("demo", "target", str(tmp_path), 0, 2)
    second.log({"step": 3, "loss": 7.0})
    second.flush()
    assert [(m["step"], m["loss"]) for m in read_metrics(str(tmp_path))] == [(1, 0.5), (2, 1.0), (3, 7.0)]


def losses(board: EventAccumulator) -> list[tuple[int, float]]:
    """(step, loss) that an open TensorBoard shows next."""
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")] if board.Tags()["scalars"] else []


@pytest.fixture(params=["local", "s3"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path)
    else:
        with s3_server("bucket"):
            yield "s3://bucket/stage"


def test_an_open_tensorboard_follows_a_run(directory: str) -> None:
    """Also across a restart, which repeats steps. Events of an interrupted job do not show."""
    path = storage.join(directory, "tensorboard")
    write_events(path, [{"step": 99, "loss": 9.0}])
    lines = [{"step": step, "loss": step / 8} for step in range(1, 8)]
    live = LiveEvents(path)
    live.update(lines[:3])
    board = EventAccumulator(path)
    assert losses(board) == [(1, 0.125), (2, 0.25), (3, 0.375)]
    live.update(lines[:2])  # resumed at step 2
    live.update(lines[:5])
    assert losses(board) == [(step, step / 8) for step in range(1, 6)]
    assert len(storage.list_files(path)) == 1, "it only grows"
    live.update(lines)
    live.close()
    assert losses(board) == [(step, step / 8) for step in range(1, 8)]


def test_a_running_stage_brings_its_board_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.02)
    recipe = make_recipe(tmp_path, "board")
    run, console = RunDirectory(recipe.run_directory), Console(file=io.StringIO())
    ctx = StageContext(recipe=recipe, run=run, stage="target", key="", inputs=(), console=console)
    path = Path(ctx.directory) / "tensorboard"
    log = MetricsLog("board", "target", ctx.directory, 0, 0)

    def shown(count: int) -> list[tuple[int, float]]:
        while not (path.exists() and len(events := losses(EventAccumulator(str(path)))) == count):
            time.sleep(0.05)
        return events

    with Progress(ctx, 8):
        log.log({"step": 1, "loss": 0.5})
        assert shown(1) == [(1, 0.5)]
        log.log({"step": 2, "loss": 0.25})
        assert shown(2) == [(1, 0.5), (2, 0.25)]
        # A restart whose metrics differ, as times do.
        again = MetricsLog("board", "target", ctx.directory, 0, 1)
        again.log({"step": 2, "loss": 0.75})
        again.flush()
    write_events(str(path), read_metrics(ctx.directory))
    assert losses(EventAccumulator(str(path))) == [(1, 0.5), (2, 0.75)], "in the end those of metrics.jsonl"


def test_the_recipes_trackers_get_every_line_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of the last seconds too; progress itself has not looked once."""
    tool = Tool()
    monkeypatch.setitem(trackers._OPEN, "wandb", tool)
    recipe = make_recipe(tmp_path, "board").model_copy(update={"trackers": ("wandb",)})
    run, console = RunDirectory(recipe.run_directory), Console(file=io.StringIO())
    ctx = StageContext(recipe=recipe, run=run, stage="target", key="", inputs=(), console=console)
    with Progress(ctx, 2):
        log = MetricsLog("board", "target", ctx.directory, 0, 0)
        for step in (1, 2):
            log.log({"step": step, "loss": 0.5})
        log.flush()
    assert tool.got == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.5})] and tool.finished
    project, name, settings = tool.opened
    assert (project, name) == ("rcd", "board/target") and settings["target.train.batch_size"] > 0


def written(directory: str) -> list[float]:
    return [line["step"] for line in read_metrics(directory)]


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once there is room again, whole lines follow."""
    log = MetricsLog("demo", "target", str(tmp_path), 0, 0)
    log.log({"step": 1, "loss": 0.5})
    log.flush()
    file = tmp_path / "metrics.jsonl"
    kept = file.rename(tmp_path / "kept")
    file.symlink_to("/dev/full")
    for step in (2, 3):
        log.log({"step": step, "loss": 0.5})
        log.flush()
    file.unlink()
    kept.rename(file)
    log.log({"step": 4, "loss": 0.25})
    assert "No space left" in log.close() and log.last["loss"] == 0.25
    assert written(str(tmp_path)) == [1, 4]
    assert len([record for record in caplog.records if "metrics.jsonl" in record.message]) == 1


def test_lines_in_a_bucket_go_to_parts_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that could not be put follow later; a restart drops later steps; the parts are joined in the end."""
    monkeypatch.setattr(metrics, "LINES_PER_PART", 3)
    refuse, directory = tmp_path / "refuse", "s3://bucket/stage"
    with s3_server("bucket", refuse):
        log = MetricsLog("demo", "target", directory, 0, 0)
        for step in range(1, 6):
            log.log({"step": step})
        log.flush()
        assert written(directory) == [1, 2, 3, 4, 5]
        refuse.touch()
        log.log({"step": 6})
        log.flush()
        refuse.unlink()
        assert log.close() == "" and written(directory) == [1, 2, 3, 4, 5, 6]
        assert len(storage.list_files(f"{directory}/metrics")) == 2

        log = MetricsLog("demo", "target", directory, 0, 4)
        log.log({"step": 5})
        assert log.close() == "" and written(directory) == [1, 2, 3, 4, 5]
        metrics.join_parts(directory)
        assert written(directory) == [1, 2, 3, 4, 5] and not storage.exists(f"{directory}/metrics")


def test_a_board_is_uploaded_in_files_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINES_PER_FILE", 3)
    lines = [{"step": step, "loss": step / 8} for step in range(1, 8)]
    with s3_server("bucket"):
        live = LiveEvents("s3://bucket/board")
        for count in (2, 4, 7):
            live.update(lines[:count])
        live.close()
        assert len(storage.list_files("s3://bucket/board")) == 2
        assert losses(EventAccumulator("s3://bucket/board")) == [(step, step / 8) for step in range(1, 8)]


def test_a_board_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    board = tmp_path / "file" / "board"
    board.parent.write_text("no directory")
    live = LiveEvents(str(board))
    lines = [{"step": step, "loss": step / 8} for step in range(1, 4)]
    live.update(lines[:2])
    board.parent.unlink()
    live.update(lines)
    live.close()
    assert losses(EventAccumulator(str(board))) == [(1, 0.125), (2, 0.25), (3, 0.375)]
