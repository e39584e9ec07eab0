"""`rcd evaluate` on checkpoints: a run that trains nothing, its report, and what it says of a settings file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main as cli
from pipelines.cli.evaluate import recipe_of, resources_of
from pipelines.cli.flags import EvaluateFlags
from pipelines.recipe.load import load_recipe, parse_recipe
from pipelines.recipe.settings_files import provenance, read_settings, settings_names
from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.errors import UserError
from rcd_core.tasks import get_task
from rcd_core.text.encoding import Encoder
from rcd_core.text.tokenizer import load_tokenizer
from tests.pipelines.serving.serve_run import SMALLER, START, save_model

LAUNCHED = {"ray.io/node-group": "head"}  # a label of launchers' nodes


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target, baseline and reference, tiny and random."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for seed, (name, sizes) in enumerate((("target", START), ("baseline", START), ("reference", SMALLER))):
        save_model(directory / name, sizes, seed)
    return directory


@pytest.fixture
def flags(checkpoints: Path, tmp_path: Path) -> list[str]:
    rows = [{"question": f"words and digits {i}", "answer": str(i)} for i in range(5)]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [f"--{name}={checkpoints / name}" for name in ("target", "baseline")]
    return [*models, "--task=qa", f"--test={test}", f"--output={tmp_path / 'out'}", "--set=decode.max_new_tokens=16"]


def test_from_checkpoints_to_the_report(
    ray_cluster: str, checkpoints: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers are the library's to prompts in the target's chat template; the same command decodes nothing again, and
    another one is refused."""
    more = [f"--reference={checkpoints / 'reference'}", "--residual_off", "--thresholds", "0.5"]
    assert cli.main(["evaluate", *flags, *more]) == 0
    made = tmp_path / "out" / "evaluate"
    results = json.loads((made / "results.json").read_text())
    names = ["seqd", "target/zero", "target/reference", "residual_off"]
    assert [arm["name"] for arm in results["arms"]] == names and results["num_problems"] == 5
    assert results["thresholds"] == [0.5] and results["settings_file"] is None
    assert all((made / name).stat().st_size for name in ("results.parquet", "pareto.png", "report.html"))
    encoder = Encoder(get_task("qa"), load_tokenizer(checkpoints / "target"), 8, 1024, None)
    decoder = Decoder(load_model(checkpoints / "target"))
    problems = [get_task("qa").problem(json.loads(line)) for line in (tmp_path / "test.jsonl").open()]
    prompts = [encoder.test(problem).prompt_ids for problem in problems]
    settings = DecodeSettings(residual=True, start="zero", confidence_threshold=0.5, max_new_tokens=16)
    texts = [
        encoder.tokenizer.decode(g.token_ids, skip_special_tokens=True) for g in decoder.generate(prompts, settings)
    ]
    rows = pq.read_table(made / "results.parquet").to_pylist()
    found = [row["completion"] for row in rows if row["arm"] == "target/zero"]
    assert sorted(found) == sorted(texts)
    capsys.readouterr()
    assert cli.main(["evaluate", *flags, *more]) == 0
    assert "0 of 5 stages to run" in " ".join(capsys.readouterr().out.split())  # a long path wraps the line
    assert cli.main(["evaluate", *flags, *more[:-1], "0.9"]) == 2
    assert "evaluate.thresholds: [0.5] there, [0.9] now" in capsys.readouterr().err


def options(*words: str) -> EvaluateFlags:
    _, bound, _ = cli.make_app().parse_args(["evaluate", *words], exit_on_error=False, print_error=False)
    return bound.arguments["options"]


def test_the_command_line_as_a_recipe(
    checkpoints: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse_recipe(recipe_of(options(*flags, "--samples=3", "--set=decode.temperature=0.5", "--seed=4")))
    assert recipe.run_directory == str(tmp_path / "out") and recipe.seed == 4
    assert recipe.block_length == 8 and recipe.data.max_length == 1024  # the checkpoint's own
    assert recipe.evaluate.starts == ("zero",) and recipe.reference is None
    assert recipe.evaluate.samples == 3 and recipe.evaluate.decode.temperature == 0.5
    assert recipe.residual("target") is None and recipe.checkpoint("baseline") == str(checkpoints / "baseline")
    warm = recipe_of(options(*flags, f"--reference={checkpoints / 'reference'}"))
    assert parse_recipe(warm).evaluate.starts == ("zero", "reference")
    alone = parse_recipe(recipe_of(options(*flags[1:])))
    plain = alone.residual("target")
    assert alone.baseline is False and plain is not None and not plain.feeds_back
    given = parse_recipe(recipe_of(options(*flags, "--settings=paper-sdar-b64", "--thresholds=0.9")))
    assert given.block_length == 64 and given.evaluate.decode.denoising_steps == 64
    assert "note: paper-sdar-b64 has blocks of 64 tokens" in capsys.readouterr().err
    for source, noted in (("self", False), (None, True)):
        config = json.loads((checkpoints / "target" / "config.json").read_text())
        config["rcd"] = {**config.get("rcd", {}), "source": source}
        (checkpoints / "target" / "config.json").write_text(json.dumps(config))
        recipe_of(options(*flags))
        assert ("rcd.source" in capsys.readouterr().err) == noted, "a plain model is no RCD target"
    found = provenance(given)
    assert found and found["changed"] == ["thresholds", "decode.max_new_tokens"]
    assert cli.main(["evaluate", *flags, "--dry_run"]) == 0
    assert "data:" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_further_tasks(checkpoints: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for file in files:
        file.write_text('{"question": "1 + 1?", "answer": "2"}')
    flags = [f"--target={checkpoints / 'target'}", f"--output={tmp_path / 'out'}", "--task=qa", f"--test={files[0]}"]
    also = [f"--also=math500={files[1]}", f"--also=math500={files[2]}", "--also=chain=synthetic", "--num_examples=3"]
    recipe = parse_recipe(recipe_of(options(*flags, *also)))
    assert recipe.evaluate.tasks["math500"].test == (str(files[1]), str(files[2]))
    assert recipe.for_task("chain").data.test == ("synthetic",) and recipe.for_task("chain").data.num_test == 3
    assert recipe.for_task("chain").data.max_length == recipe.data.max_length


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task=qa", "--test=TEST", "--output=/tmp/x", "--target=/x", "--also=math500"], "--also is 'math500'"),
        (["--task=qa", "--test=TEST", "--output=/tmp/x", "--url=http://x", "--model=m", "--also=qa=/q"], "--also goes"),
        (["--task=qa", "--test=TEST", "--output=/tmp/x", "--url=http://x", "--model=m", "--dry_run"], "--dry_run goes"),
        (["--task=qa", "--test=TEST", "--output=/tmp/x", "--url=http://x", "--model=m", "--deterministic"], "--determ"),
        (
            [
                "--task=qa",
                "--test=TEST",
                "--output=/tmp/x",
                "--url=http://x",
                "--model=m",
                "--reference_flops_weight=-3",
            ],
            "--reference_flops_weight is -3",
        ),
        (["--task=qa"], "--test, --output"),
        (["--task=qa", "--test=TEST", "--output=/tmp/x"], "--target nor --baseline"),
        (["--task=qa", "--test=TEST", "--output=/tmp/x", "--target=/none"], "'/none'"),
        (["--task=qa", "--test=TEST", "--output=/tmp/x", "--target=/x", "--model=m"], "--url"),
        (
            ["--task=qa", "--test=TEST", "--output=/tmp/x", "--target=/x", "--settings=paper-sdar-64"],
            "paper-sdar-b64",
        ),
    ],
)
def test_mistakes(words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """TEST stands for a file that exists."""
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    assert cli.main(["evaluate", *(word.replace("TEST", f"{tmp_path}/test.jsonl") for word in words)]) == 2
    assert says in capsys.readouterr().err


# -- settings files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings_names())
def test_shipped_settings_are_a_section_of_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the task; what they leave open is said, and unchanged they are known as such."""
    settings = read_settings(name)
    assert settings.source and settings.unpublished and len(settings.sha256) == 64
    for task in ("gsm8k", "minerva_math", "aime24", "aime25", "humaneval"):
        raw = {"settings": name, "run_code": True}
        base = ["data.test_task=" + task, f"evaluate={json.dumps(raw)}", f"block_length={settings.block_length}"]
        recipe = load_recipe("sudoku-reference", [*base, "data.pad_multiple=null", "data.max_length=1024"])
        found = provenance(recipe)
        assert found and found["changed"] == [] and found["sha256"] == settings.sha256
        aime = task in ("aime24", "aime25") and "sdar" in name
        assert (recipe.evaluate.samples, recipe.evaluate.decode.temperature) == ((16, 0.6) if aime else (1, 0.0))
    assert cli.main(["evaluate", "--list_settings"]) == 0
    said = capsys.readouterr().out
    assert name in said and settings.source in said


def test_the_papers_recipes_use_the_papers_settings() -> None:
    for name, file in (
        ("sdar-8b-b32", "paper-sdar-b32"),
        ("sdar-4b-b64", "paper-sdar-b64"),
        ("llada-8b", "paper-llada"),
    ):
        found = provenance(load_recipe(name))
        assert found and found["name"] == file and found["changed"] == []
    found = provenance(load_recipe("sdar-4b-b64", ["evaluate.decode.temperature=0.6", "evaluate.starts=[reference]"]))
    assert found and found["changed"] == ["starts", "decode.temperature"]
    with pytest.raises(UserError, match="paper-llada, paper-sdar"):
        load_recipe("sudoku-reference", ["evaluate.settings=../recipes/demo"])


# -- without a cluster ------------------------------------------------------------------------------------------------


@pytest.mark.drill
def test_a_ray_of_its_own_on_loopback_that_ends_with_it(flags: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "pipelines.cli.main", "evaluate", *flags, "--thresholds", "0.9"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ran:
        seen: set[psutil.Process] = set()
        outside: set[str] = set()
        while ran.poll() is None:
            for process in _children(ran.pid):
                seen.add(process)
                outside |= _listening(process) - {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
            time.sleep(1)
        said = ran.stdout.read().decode() if ran.stdout else ""
    assert ran.returncode == 0, said
    assert (tmp_path / "out" / "evaluate" / "report.html").exists()
    assert seen and not outside
    gone, alive = psutil.wait_procs(seen, timeout=10)
    assert gone and not alive


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _listening(process: psutil.Process) -> set[str]:
    """Addresses on which a process takes connections."""
    try:
        return {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    except psutil.Error:
        return set()


@pytest.mark.parametrize(
    ("given", "nodes", "expected"),
    [
        ({}, [(8, 0, {})], (1, 7, 0.0)),
        ({"actors": 2}, [(8, 0, {})], (2, 3, 0.0)),
        ({}, [(8, 0, LAUNCHED)], (1, 1, 1.0)),
        ({"actors": 4}, [(8, 0, LAUNCHED)], (4, 1, 1.0)),
        ({"gpus": 0}, [(8, 0, LAUNCHED)], (1, 7, 0.0)),
        ({"gpus": 2}, [(8, 0, {})], (1, 1, 2.0)),
        ({}, [(8, 0, LAUNCHED), (96, 8, LAUNCHED)], (8, 1, 1.0)),
        ({"gpus": 4}, [(8, 0, {}), (96, 8, {})], (2, 1, 4.0)),
        ({"actors": 16}, [(96, 8, {})], (16, 1, 0.5)),
    ],
)
def test_what_it_asks_of_a_cluster(
    given: dict[str, Any], nodes: list[tuple[int, int, dict[str, str]]], expected: tuple[int, int, float]
) -> None:
    """On a cluster that adds nodes, a GPU is asked for also while no node has one."""
    listed = [{"Resources": {"CPU": cpus, "GPU": gpus}, "Labels": labels} for cpus, gpus, labels in nodes]
    assert tuple(resources_of(EvaluateFlags(**given), listed).values()) == expected


def test_a_gpu_that_this_machine_lacks_is_not_waited_for() -> None:
    nodes = [{"Resources": {"CPU": 8, "GPU": 1}, "Labels": {}}]
    assert resources_of(EvaluateFlags(gpus=1), nodes, alone=True)["gpus_per_worker"] == 1
    with pytest.raises(UserError, match="--gpus is 2, this machine has 1"):
        resources_of(EvaluateFlags(gpus=2), nodes, alone=True)
