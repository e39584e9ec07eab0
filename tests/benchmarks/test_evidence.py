"""The experiment at small size: its plan, its rows, that it resumes, and its report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from rcd_core import load_model
from rcd_core.errors import UserError
from rcd_core.ops.reduce import Feedback, Reduced, Table, reduce_greedy
from rcd_core.signals import ReferenceSignals
from rcd_core.tasks import MASK_TEXT
from rcd_core.training import own_signals
from rcd_core.training.data.examples import ExampleSource
from tests.benchmarks.evidence import __main__ as evidence
from tests.benchmarks.evidence.feedback import SoftMask, feedback
from tests.benchmarks.evidence.plan import Plan, load_plan
from tests.benchmarks.evidence.predict import predict
from tests.benchmarks.evidence.report import report
from tests.benchmarks.evidence.run import Runner, cells
from tests.benchmarks.evidence.tasks import find_task
from tests.benchmarks.evidence.world import World

PLAN = Path(__file__).parent / "evidence" / "second.yaml"
GOLDEN = Path(__file__).parents[1] / "golden"


def small(tmp_path: Path, arms: tuple[str, ...] = ("seqd", "rcd", "rounds")) -> Plan:
    """6x6 Sudoku with a few methods, whose models learn nothing in two steps."""
    raw = yaml.safe_load(PLAN.read_text())
    e = raw["experiments"]["sudoku6"]
    e |= {"num_train": 64, "num_test": 24, "thresholds": [0.2, 0.9], "replicates": [[0, 0], [1, 0]]}
    e["arms"] = list(arms)
    e.pop("later", None)  # all of them in every replicate
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
    e["target"], e["references"] = sizes, {"small": e["references"]["small"] | {"model": sizes}}
    for train in (e["base_train"], e["second_train"], e["references"]["small"]["train"]):
        train |= {"steps": 2, "batch_size": 8}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"arms": raw["arms"], "experiments": {"sudoku6": e}}))
    return load_plan(path)


def test_every_plan_can_be_read() -> None:
    for path in PLAN.parent.glob("*.yaml"):
        plan = load_plan(path)
        assert all(list(cells(plan, [name], 1)) for name in plan.experiments)


def test_the_tasks_of_the_measure_differ_in_what_counts() -> None:
    rows = "123456" * 6  # each row has all digits, each column one of them six times
    latin, shuffles, walk = (find_task(name) for name in ("latin", "shuffles", "walk"))
    assert shuffles.grade("#" + MASK_TEXT * 36, "#" + rows, "") and not latin.grade(
        "#" + MASK_TEXT * 36, "#" + rows, ""
    )
    assert not shuffles.grade("#" + MASK_TEXT * 36, "#" + "123455" * 6, "")
    for task in (latin, shuffles, walk):
        problem = task.problem(task.synthetic(0, "train", 0))
        assert task.grade(problem.prompt, problem.response, problem.answer)
        assert not task.grade(problem.prompt, problem.response[:-1] + "9", problem.answer)
        assert len(problem.prompt.replace(MASK_TEXT, ".")) == len(problem.response) == 37
    unique = find_task("unique")
    rows_of_it = [unique.synthetic(i, "train", 0) for i in range(20)]
    for row in rows_of_it:
        cells = [i for i, digit in enumerate(row["question"]) if digit == "."]
        for cell in cells:  # no digit but the answer's leaves a solution
            seen = {row["question"][other] for unit in unique._units_of[cell] for other in unique._units[unit]}
            for digit in set("123456") - {row["answer"][cell]} - seen:
                assert not unique._solutions(row["question"][:cell] + digit + row["question"][cell + 1 :])
        assert unique.problem(row)
    lengths, places = ([int(c) for c in problem.response[start::2]] for start in (1, 2))
    assert places == [sum(lengths[: i + 1]) % 6 for i in range(18)]


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("dominoes", "12" * 18, "121212" * 5 + "121233"),
        ("dominoes", ("3" * 6 + "4" * 6) * 3, ("3" * 6 + "4" * 6) * 2 + "4" * 6 + "3" * 6),
        ("dominoes", "121212" * 5 + "121212", "312123" + "412121" + "121212" * 4),
        ("binary", ("121212" + "212121") * 3, ("121212" + "212121") * 2 + "121212" + "212112"),
        ("binary", ("112212" + "221121") * 3, ("112212" + "221121") * 2 + "222111" + "111222"),
        ("binary", ("121212" + "212121") * 3, "121212" * 3 + "212121" * 3),  # three below each other
        ("sorted", "112233" * 6, "112233" * 5 + "112232"),  # the last column falls, and the last row
        ("sorted", "111111" * 3 + "666666" * 3, "666666" + "111111" * 5),
        ("halves", "123456" * 3 + "11" + "01" * 8, "123455" * 3 + "11" + "01" * 8),
        ("halves", "654321" * 3 + "551022" + "02" * 6, "654321" * 3 + "551022" + "02" * 5 + "03"),
    ],
)
def test_boards_of_further_tasks(name: str, valid: str, invalid: str) -> None:
    task = find_task(name)
    canvas = "#" + MASK_TEXT * 36
    assert task.grade(canvas, "#" + valid, "") and not task.grade(canvas, "#" + invalid, "")
    for index in range(50):
        problem = task.problem(task.synthetic(index, "train", 0))
        assert task.grade(problem.prompt, problem.response, problem.answer)
        assert len(problem.prompt.replace(MASK_TEXT, ".")) == len(problem.response) == 37


def test_bases_can_be_trained_before_any_method(tmp_path: Path) -> None:
    runner = Runner(tmp_path, torch.device("cpu"), 1e18, lambda text: None)
    (cell, *_) = cells(small(tmp_path), ["sudoku6"], 1)
    assert runner.base(cell).num_parameters() > 0 and not list(tmp_path.glob("sudoku6/*.npz"))
    assert [path.name for path in (tmp_path / "sudoku6").iterdir()] == ["base0"]


def test_an_unknown_key_of_the_plan_is_refused(tmp_path: Path) -> None:
    raw = yaml.safe_load(PLAN.read_text())
    raw["arms"]["seqd"]["stepz"] = 3
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match="stepz"):
        load_plan(tmp_path / "bad.yaml")


def test_rows_in_memory_are_those_of_the_files(tmp_path: Path) -> None:
    world = World(small(tmp_path).experiments["sudoku6"])
    e = world.examples
    parts = [slice(a, b) for a, b in zip(e.offsets, e.offsets[1:], strict=False)]
    table = pa.table(
        {
            "example_id": e.example_ids,
            "input_ids": [e.input_ids[part].tolist() for part in parts],
            "labels": [e.labels[part].tolist() for part in parts],
        }
    )
    pq.write_table(table, tmp_path / "examples.parquet")
    mine = world.rows(7)
    files = ExampleSource([str(tmp_path / "examples.parquet")], mine.noise)
    for g in range(3 * len(parts)):
        a, b = mine.row(g), files.row(g)
        assert (a.index, a.example_id, a.draw) == (b.index, b.example_id, b.draw)
        for name in ("input_ids", "labels", "masked", "p"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_it_goes_on_where_it_stopped_and_reports_whole_replicates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, said = small(tmp_path), []
    for run in ("one", "two"):
        runner = Runner(tmp_path / run, torch.device("cpu"), 1e18, said.append)
        todo = list(cells(plan, ["sudoku6"], 2))
        for cell in todo[: 4 if run == "one" else None]:  # one: the first replicate and one arm of the second
            runner.run(cell)
    found = [sorted(p.name for p in (tmp_path / run / "sudoku6").glob("*.npz")) for run in ("one", "two")]
    assert len(found[0]) == 4 and len(found[1]) == 6
    for name in found[0]:
        with np.load(tmp_path / "one" / "sudoku6" / name) as a, np.load(tmp_path / "two" / "sudoku6" / name) as b:
            names = [n for n in a.files if not n.startswith("fact.")]
            assert names and all(np.array_equal(a[n], b[n]) for n in names)
    predict(plan, ["sudoku6"], tmp_path / "one", tmp_path)
    lines = json.loads((tmp_path / "predict.json").read_text())
    assert [(line["base"], set(line["gains"])) for line in lines] == [(0, {"rcd", "rounds"}), (1, set())]
    assert lines[0]["predictions"] > 0 and {"at_90", "at_best"} == set(lines[0]["gains"]["rounds"])
    capsys.readouterr()
    before = len(said)
    for cell in todo:
        runner.run(cell)
    assert len(said) == before  # finished cells are skipped
    late = Runner(tmp_path / "late", torch.device("cpu"), 0.0, said.append)
    late.run(todo[0])
    assert not (tmp_path / "late").exists()

    report(plan, ["sudoku6"], tmp_path / "one", tmp_path / "written")
    assert "1 replicate," in capsys.readouterr().out
    result = json.loads((tmp_path / "written" / "results.json").read_text())["sudoku6"]
    assert result["replicates"] == [[0, 0]] and (tmp_path / "written" / "sudoku6.png").exists()
    arms = {(arm["arm"], arm["start"]): arm for arm in result["arms"]}
    assert set(arms) == {("seqd", "none"), ("rcd", "zero"), ("rcd", "reference"), ("rounds", "zero")}
    with np.load(tmp_path / "one" / "sudoku6" / "base0.seed0.rcd.small.npz") as data:
        tokens, passes, asked = (data[f"reference.{n}"].sum(1) for n in ("tokens", "denoise", "reference"))
        assert data["reference.reference"].all() and not data["zero.reference"].any()
    paper = tokens / passes
    counted = np.array(arms["rcd", "reference"]["tokens_per_pass"])
    weights = (tokens / counted - passes) / asked  # of a model as large, which predicts a whole block at once
    assert np.all(counted < paper) and np.all((weights > 1.0) & (weights < 2.0))
    assert arms["seqd", "none"]["gains"][0]["mean"] in (None, 0.0)

    report(plan, ["sudoku6"], tmp_path / "elsewhere", tmp_path / "written")  # counts what was reported before
    assert "1 replicate," in capsys.readouterr().out
    assert json.loads((tmp_path / "written" / "results.json").read_text())["sudoku6"] == result
    arguments = ["run", "--output", tmp_path / "elsewhere", "--plan", tmp_path / "plan.yaml", "--replicates", "1"]
    monkeypatch.setattr("sys.argv", ["evidence", *map(str, arguments), "--done", str(tmp_path / "written")])
    assert evidence.main() == 0 and not (tmp_path / "elsewhere").exists()


def test_later_replicates_have_the_methods_that_the_first_one_leaves(tmp_path: Path) -> None:
    plan = small(tmp_path)
    experiment = replace(plan.experiments["sudoku6"], later=("seqd", "rounds"))
    found = cells(replace(plan, experiments={"sudoku6": experiment}), ["sudoku6"], 2)
    assert [(cell.base, cell.arm.name) for cell in found] == [
        *((0, name) for name in ("seqd", "rcd", "rounds")), (1, "seqd"), (1, "rounds"),
    ]  # fmt: skip


@pytest.mark.parametrize("arm", ["self_norm", "soft_masked", "loopholing"])
def test_other_ways_to_feed_back_train_and_decode(tmp_path: Path, arm: str) -> None:
    (cell,) = cells(small(tmp_path, (arm,)), ["sudoku6"], 1)
    Runner(tmp_path, torch.device("cpu"), 1e18, lambda text: None).run(cell)
    with np.load(tmp_path / f"{cell.name}.npz") as found:
        assert np.isfinite(found["fact.train_loss"]) and found["zero.denoise"].min() >= 1


@torch.no_grad()
def test_other_ways_to_feed_back_are_as_described() -> None:
    model = load_model(GOLDEN / "sdar_tiny")
    table = model.embedding.weight
    logits = torch.randn(6, len(table), generator=torch.Generator().manual_seed(0)) * 3
    signals = ReferenceSignals.from_logits(logits, k=len(table))
    settings = Feedback("learned", math.log(3), 1.0, 1.0, 3)
    with feedback("restored_norm"):
        deltas = [
            signals.soft_embedding(table),
            reduced(logits, replace(settings, rule="fixed", top_k=len(table)), table).delta,
        ]
    for delta in deltas:
        torch.testing.assert_close(
            delta.norm(dim=-1), torch.softmax(logits, -1) @ table.norm(dim=-1), atol=1e-2, rtol=0
        )
    plain = torch.softmax(logits, -1) @ table
    assert (
        torch.cosine_similarity(deltas[0], plain).min() > 0.999 and (deltas[0].norm(dim=-1) > plain.norm(dim=-1)).all()
    )

    mask = SoftMask()
    top, ids = torch.softmax(logits, -1).topk(3)
    q = top / top.sum(-1, keepdim=True)
    entropy = -(q * q.log()).sum(-1)
    with feedback("soft_masked"):
        found = reduced(logits, settings, table, mask)
        own = own_signals.encoded(model, torch.randn(6, table.shape[1]), 3)
    torch.testing.assert_close(found.delta, (q[..., None] * table[ids]).sum(1))
    torch.testing.assert_close(found.alpha, 0.5 * torch.sigmoid(6.67 * (0.75 - entropy)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.confidence, top[:, 0])  # of the whole prediction
    torch.testing.assert_close(own.topk_logprobs.float().exp().sum(-1), torch.ones(6), atol=1e-3, rtol=0)
    assert not own.tail_mass.any()


def reduced(logits: torch.Tensor, settings: Feedback, table: torch.Tensor, learned: Any = None) -> Reduced:
    return reduce_greedy(logits, len(table) - 1, settings, Table(table, learned))


def test_it_needs_neither_ray_nor_pyarrow() -> None:
    code = "import sys; sys.modules.update(ray=None, pyarrow=None); import tests.benchmarks.evidence.run"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PLAN.parents[3])
