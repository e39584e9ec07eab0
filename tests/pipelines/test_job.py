"""The whole job on real Ray, as the command line runs it: from data to a served answer, killed and run again.

Tiny models and few steps: what is tested is the chain, not what the models learn.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.run.directory import RunDirectory
from tests.fault_table import FaultTable

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data"
FEW = [
    "base.train.steps=60",
    "base.train.checkpoint_every=20",
    "base.train.log_every=10",
    "base.train.batch_size=16",
    "reference.train.steps=8",
    "reference.train.batch_size=16",
    "target.train.steps=8",
    "target.train.batch_size=16",
    "signals.shard_mb=0.02",
    "target.residual.source=signals",
    "target.residual.alpha_scale=null",
]
SUDOKU = [*FEW, "data.num_train=256", "data.num_test=6", "evaluate.thresholds=[0.5, 0.9]", "variants={}"]
SUDOKU += ["calibrate=null"]  # test_calibrate.py has it
SUDOKU += ["deploy.start=reference"]  # so that answers go through all deployments


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Job:
    """full.py with a recipe, in a process of its own, on the session's cluster."""

    def __init__(self, recipe: str, name: str, storage: Path, settings: list[str]) -> None:
        self.port = free_port()
        changes = [*settings, f"name={name}", f"deploy.port={self.port}"]
        self.command = [sys.executable, str(ROOT / "pipelines" / "full.py"), "--recipe", recipe]
        self.command += ["--storage", str(storage), *(word for s in changes for word in ("--set", s))]
        self.run = RunDirectory(str(storage / name))

    def start(self, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *options],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(self, *options: str, code: int = 0, timeout: float = 800) -> str:
        process = self.start(*options)
        try:
            out = process.communicate(timeout=timeout)[0]
        finally:
            process.kill()  # changes nothing when it has ended
        assert process.returncode == code, out
        return out

    def summary(self, stage: str) -> dict[str, Any]:
        manifest = self.run.manifest(stage)
        assert manifest is not None, f"{stage} is not done"
        return dict(manifest["summary"])


@contextlib.contextmanager
def torn_down(job: Job) -> Iterator[None]:
    try:
        yield
    finally:
        job.finish("--teardown")


def ask(job: Job, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{job.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(json.loads(response.read()))


@pytest.mark.drill  # minutes; test_full.py has the same for a job whose stages do little
@pytest.mark.timeout(700)
def test_killed_in_the_middle_it_ends_with_the_same_artefacts(ray_cluster: str, tmp_path: Path) -> None:
    """Undisturbed base training against one whose driver gets SIGKILL after a checkpoint; then the rest of the job."""
    quiet = Job("sudoku-reference", "quiet", tmp_path, SUDOKU)
    quiet.finish("--stages", "prepare,base")

    job = Job("sudoku-reference", "killed", tmp_path, SUDOKU)
    process = job.start()
    metrics = Path(job.run.path) / "base" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and json.loads(metrics.read_text().splitlines()[-1])["step"] >= 30):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert job.run.manifest("base") is None

    out = job.finish()
    with torn_down(job):
        assert job.summary("prepare")["fingerprint"] == quiet.summary("prepare")["fingerprint"]
        assert job.summary("base") == quiet.summary("base"), "resumed = uninterrupted, to the last bit of the weights"
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert steps == list(range(10, 61, 10)), "no step is logged twice"
        check_signals(job)
        check_report(job, out)
        check_endpoint(job, out)
        again = job.finish()
        assert again.count("skipped") >= 7
        assert "is live already" in again
    with pytest.raises(OSError):
        ask(job, "/v1/completions", {})


@pytest.mark.drill
@pytest.mark.faults("the driver killed", "each")
@pytest.mark.timeout(2400)
def test_killed_in_every_stage_it_ends_with_the_same_artefacts(
    ray_cluster: str, tmp_path: Path, fault_table: FaultTable
) -> None:
    """SIGKILL to the driver a moment after each stage has begun; minutes long, so `make drill` runs it."""
    small = [*FEW, "data.num_train=256", "data.num_test=6", "evaluate.thresholds=[0.9]", "evaluate.starts=[zero]"]
    quiet, job = (Job("arithmetic", name, tmp_path, small) for name in ("quiet", "killed"))
    quiet.finish()
    quiet.finish("--teardown")
    stages = ("prepare", "base", "reference", "signals", "target", "baseline", "evaluate", "deploy")
    undone: dict[str, float] = {}  # stages in which a kill struck -> when the command was started again
    for stage in stages:
        process = job.start()
        begun = Path(job.run.stage_directory(stage)) / "key.json"
        deadline = time.monotonic() + 240
        while not begun.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)[0]
            time.sleep(0.05)
        time.sleep(4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed in {stage}, which was {'done' if job.run.manifest(stage) else 'not done'}")
        if job.run.manifest(stage) is None:
            undone[stage] = time.time()
    job.finish()
    with torn_down(job):
        for stage in stages[:-1]:
            found, wanted = ({**run.summary(stage), "reference_checkpoint": ""} for run in (job, quiet))
            assert found == wanted, stage  # but for the place where the run lies
    for stage in stages:
        if stage in undone:  # key.json is written when a stage begins, also when it goes on
            seconds = (Path(job.run.stage_directory(stage)) / "key.json").stat().st_mtime - undone[stage]
            fault_table.add("the same command resumed from what was complete", "the same artefacts", seconds, stage)
        else:
            fault_table.add("the stage was done already and was skipped", "the same artefacts", stage=stage)


def check_signals(job: Job) -> None:
    """The planned rows, each once, in several shards; rows carry all that training needs."""
    summary, directory = job.summary("signals"), Path(job.run.stage_directory("signals"))
    tables = [pq.read_table(directory / name) for name in summary["shards"]]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(tables) >= 3 and len(rows) == summary["rows"] == 8 * 16
    assert len({(r["example_id"], r["draw"]) for r in rows}) == len(rows)
    for row in rows:
        num_masked = len(row["masked_positions"])
        assert num_masked == len(row["num_kept"]) and max(row["num_kept"]) <= summary["top_k"]
        assert num_masked and len(row["topk_ids"]) == len(row["topk_logprobs"]) == sum(row["num_kept"])
        assert all(row["labels"][p] != -100 for p in row["masked_positions"])
    assert sum(len(r["masked_positions"]) for r in rows) == summary["masked_tokens"]


def check_report(job: Job, out: str) -> None:
    for stage in ("prepare", "base", "reference", "signals", "target", "baseline", "evaluate", "deploy"):
        assert re.search(rf"│ {stage} +│ (done|skipped)", out), out
    assert "SeqD" in out and "plot: " in out
    directory = Path(job.run.stage_directory("evaluate"))
    results = pq.read_table(directory / "results.parquet")
    assert results.num_rows == 6 * 2 * 3, "problems x thresholds x (SeqD, RCD zero, RCD reference)"
    assert (directory / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "SeqD" in (directory / "report.html").read_text()


def check_endpoint(job: Job, out: str) -> None:
    """The printed curl works as it stands, after the job has ended; chat answers any text."""
    line = next(line for line in out.splitlines() if line.startswith("curl "))
    words = shlex.split(line)
    prompt = json.loads(words[words.index("-d") + 1])["prompt"]
    answer = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout)
    text = answer["choices"][0]["text"]
    assert re.fullmatch(re.escape(prompt).replace(re.escape("<|MASK|>"), "(?s:.+?)"), text), (prompt, text)
    rcd = answer["rcd"]
    assert rcd["forwards"]["reference"] == 1, "deployed with a warm start"
    assert rcd["tokens_per_pass"] < rcd["tokens_per_forward"], "the reference says its size"
    body = {"model": "rcd-demo-baseline", "prompt": prompt, "infill": True}
    assert ask(job, "/v1/completions", body)["rcd"]["forwards"]["reference"] == 0, "SeqD is served beside"
    messages = [{"role": "user", "content": "héllo"}]
    chat = ask(job, "/v1/chat/completions", {"model": "rcd-demo", "messages": messages, "max_tokens": 8})
    assert chat["object"] == "chat.completion" and chat["usage"]["prompt_tokens"] > 0


needs_gsm8k = pytest.mark.skipif(
    not (GSM8K / "gsm8k_train.jsonl").exists(), reason="gsm8k_train.jsonl is not in ../shared/data"
)


@needs_gsm8k
@pytest.mark.timeout(900)
def test_gsm8k_from_local_files_to_a_served_answer(ray_cluster: str, tmp_path: Path) -> None:
    files = [f"data.{split}={GSM8K / f'gsm8k_{split}.jsonl'}" for split in ("train", "test")]
    small = ["data.num_train=600", "data.num_test=4", "baseline=false"]
    small += [f"resources.{name}=1" for name in ("num_workers", "signal_actors", "evaluate_actors")]
    small += ["evaluate.thresholds=[0.5]", "evaluate.starts=[zero]", "evaluate.decode.max_new_tokens=16"]
    job = Job("gsm8k", "gsm8k", tmp_path, [*FEW, "base.train.steps=8", *files, *small])
    out = job.finish()
    with torn_down(job):
        counts = job.summary("prepare")["counts"]
        assert counts["test"]["examples"] == 4 and counts["train"]["examples"] > 500
        line = next(line for line in out.splitlines() if line.startswith("curl "))
        answer = json.loads(subprocess.run(shlex.split(line), check=True, capture_output=True, text=True).stdout)
        assert answer["choices"][0] and answer["rcd"]["forwards"]["denoise"] > 0


BAD: list[tuple[list[str], str]] = [
    (["target.train.stepz=3"], "target.train.stepz"),
    (["data.train=data/train.jsonl"], "data.train"),
    (["data.train=/nowhere/train.jsonl"], "/nowhere/train.jsonl"),
    (["target.start=/nowhere/model"], "target.start"),
    (["target.train.batch_size=7"], "resources.num_workers 2"),
    (["resources.cpus_per_worker=64", "resources.timeout_s=1"], "CPU 64"),
]


@pytest.mark.parametrize(("settings", "named"), BAD, ids=[s[0] for s, _ in BAD])
def test_what_is_wrong_is_named_before_anything_starts(
    ray_cluster: str, tmp_path: Path, settings: list[str], named: str
) -> None:
    job = Job("sudoku-reference", "bad", tmp_path, [*SUDOKU, *settings])
    out = job.finish(code=2, timeout=60)
    message = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and named in out, out
    assert "Traceback" not in out
    assert not list(tmp_path.glob("bad/*/model")), "no stage has trained"
