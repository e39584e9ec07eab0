"""cluster/grafana/alerts.yaml, by Prometheus' own promtool: each rule fires on what it is for, and only then."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.files import CLUSTER

ALERTS = CLUSTER / "grafana" / "alerts.yaml"
TARGET = '{application="rcd", deployment="Target", replica="r"}'
HTTP = 'ray_serve_num_http_requests_total{{application="rcd", route="/v1/completions", status_code="{}"}}'
STAGE = 'ray_rcd_stage_idle_seconds{{run="demo", stage="{}"}}'
# Alert -> (series that make it fire, series that do not): one sample a minute, for forty minutes.
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "RcdRequestsWait": (
        {f"ray_rcd_queue_seconds_total{TARGET}": "0+3600x40", f"ray_rcd_admitted_total{TARGET}": "0+60x40"},
        {f"ray_rcd_queue_seconds_total{TARGET}": "0+600x40", f"ray_rcd_admitted_total{TARGET}": "0+60x40"},
    ),
    "RcdQueueStands": (
        {f"ray_rcd_queue_length{TARGET}": "3x40", f"ray_rcd_admitted_total{TARGET}": "7x40"},
        {f"ray_rcd_queue_length{TARGET}": "3x40", f"ray_rcd_admitted_total{TARGET}": "7+1x40"},
    ),
    "RcdRequestsRefused": ({HTTP.format(429): "0+6x40"}, {HTTP.format(429): "6x40", HTTP.format(200): "0+6x40"}),
    "RcdErrors": (
        {HTTP.format(500): "0+3x40", HTTP.format(200): "0+60x40"},
        {HTTP.format(500): "3x40", HTTP.format(200): "0+60x40"},
    ),
    "RcdPassesFail": ({f"ray_rcd_failed_total{TARGET}": "0x10 0+1x30"}, {f"ray_rcd_failed_total{TARGET}": "5x40"}),
    "RcdReferenceFails": (
        {f"ray_rcd_reference_failures_total{TARGET}": "0+1x40"},
        {f"ray_rcd_reference_failures_total{TARGET}": "5x40"},
    ),
    "RcdStageStalled": ({STAGE.format("signals"): "0+60x40"}, {STAGE.format("signals"): "600x40"}),
}
pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (package prometheus)")


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True)


def fires(tmp_path: Path, alert: str, series: dict[str, str]) -> bool:
    """At the end of the series. promtool compares what fires with nothing, and names what it got."""
    test: dict[str, Any] = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [{"eval_time": "39m", "alertname": alert, "exp_alerts": []}],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = promtool("test", "rules", str(tmp_path / "test.yaml"))
    out = done.stdout + done.stderr
    assert ("SUCCESS" in out) != ("FAILED" in out), out
    assert "FAILED" not in out or f'alertname="{alert}"' in out or f"alertname:{alert}" in out, out
    return "FAILED" in out


def test_the_rules_are_valid() -> None:
    done = promtool("check", "rules", str(ALERTS))
    assert done.returncode == 0 and f"{len(CASES)} rules found" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_on_what_it_is_for(alert: str, tmp_path: Path) -> None:
    bad, good = CASES[alert]
    assert fires(tmp_path, alert, bad) and not fires(tmp_path, alert, good)


@pytest.mark.parametrize("stage", ["prepare", "calibrate", "deploy"])
def test_stages_that_report_no_parts_do_not_count_as_stalled(stage: str, tmp_path: Path) -> None:
    assert not fires(tmp_path, "RcdStageStalled", {STAGE.format(stage): "0+60x40"})
