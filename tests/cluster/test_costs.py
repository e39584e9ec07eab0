"""The planned figures in cluster/README.md are those that the planners print."""

from __future__ import annotations

import re

import pytest

from pipelines.cli import main as cli
from pipelines.cli import plan, plan_signals
from tests.benchmarks.scaling import Assumptions
from tests.benchmarks.scaling import table as scaling_table
from tests.cluster.files import CLUSTER

TARGET = "hidden_size: 4096, num_layers: 36, num_heads: 32, intermediate_size: 12288"
REFERENCE = "hidden_size: 2048, num_layers: 28, num_heads: 16, intermediate_size: 6144"
SIZES = [
    *("--set", f"target.start={{family: sdar, {TARGET}, num_kv_heads: 8, head_dim: 128}}"),
    *("--set", f"reference.start={{family: sdar, {REFERENCE}, num_kv_heads: 8, head_dim: 128}}"),
]
TRAIN = ["train", "plan", "--recipe", "cluster-sdar-8b", *SIZES, "--vocab_size", "151936"]
TRAIN += ["--examples", "100000", "--example_tokens", "3000"]
SIGNALS = ["signals", "plan", "--recipe", "cluster-sdar-8b", *SIZES, "--set", "tokenizer={vocab_size: 151936}"]
SIGNALS += ["--set", "data.num_train=100000", "--set", "data.max_length=3008"]
SIGNALS += ["--reference-params", "2031739904", "--target-params", "8190735360"]
PEAK = {"H100": 989, "L40S": 362, "L4": 121}  # TFLOP/s, bf16 dense


def table() -> dict[str, list[str]]:
    rows = re.findall(r"^\| (\w+) \| .* (\|(?: \d+ \|){3}) (.*) \|$", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    return {stage: [*re.findall(r"\d+", hours), fewest] for stage, hours, fewest in rows}


@pytest.mark.parametrize("device", PEAK)
def test_hours_and_fewest_gpus(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # tables are not wrapped
    for module in (plan, plan_signals):
        monkeypatch.setattr(module, "device_time", lambda hours: f"{hours:.1f} hours")  # never days
    column = list(PEAK).index(device)
    assert cli.main([*TRAIN, "--device", device]) == 0
    planned = capsys.readouterr().out
    hours = [8 * float(found) for found in re.findall(r"([\d.]+) hours on 8 x", planned)]
    fewest = re.findall(r"recipe: fsdp2 .*?(\d+) │$", planned, re.MULTILINE)
    assert cli.main([*SIGNALS, "--peak-tflops", str(PEAK[device])]) == 0
    signals = capsys.readouterr().out
    assert "106,135.3 MB" in signals
    (signal_hours,) = re.findall(r"reference: .* = ([\d.]+) hours on one device", signals)
    rows = table()
    # Printed to a tenth of an hour of eight GPUs, and whole GPU hours in the table.
    for stage, found, printed in (
        ("reference", hours[0], 8),
        ("signals", float(signal_hours), 1),
        ("target", hours[1], 8),
    ):
        assert int(rows[stage][column]) == pytest.approx(found, abs=0.5 + 0.05 * printed), stage
    assert rows["baseline"][:3] == rows["target"][:3]
    for stage, count in zip(("reference", "target"), fewest, strict=True):
        assert f"{count} {device}" in rows[stage][3].split(", ")


def test_limits_of_scale() -> None:
    assert scaling_table(Assumptions()) in (CLUSTER / "README.md").read_text()
