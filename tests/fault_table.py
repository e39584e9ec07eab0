"""Collects the results of the tests of faults into a Markdown table: `pytest -m faults -s`.

    @pytest.mark.faults("a worker node removed", "signals")
    def test_...(fault_table: FaultTable) -> None:
        ...
        fault_table.add("the other node computed its unfinished shards", "the same bytes", recovery_s=...)

Each test adds at least one row, even if it fails. tests/README.md shows the table of one run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil
import pytest

from pipelines.ray_cluster.hardware import cpu_model

_HEADER = ("fault", "stage", "what happened", "recovery (s)", "result")
_FAULT, _ROW = "fault", "fault_row"  # names in the user_properties of a test's reports, which xdist forwards


@dataclass(frozen=True, kw_only=True)
class FaultTable:
    """Adds the rows of one test; its marker names fault and stage."""

    item: pytest.Item

    def add(self, happened: str, result: str, recovery_s: float | None = None, stage: str | None = None) -> None:
        """recovery_s: seconds from the fault, or from the next start of the same command, to the first work that is
        done again; None if it was not timed. stage: if it differs from the marker's."""
        fault, marked = _marked(self.item)
        row = Row(fault=fault, stage=stage or marked, happened=happened, recovery_s=recovery_s, result=result)
        self.item.user_properties.append((_ROW, asdict(row)))


@dataclass(frozen=True, kw_only=True)
class Row:
    fault: str
    stage: str
    happened: str
    recovery_s: float | None
    result: str

    def cells(self) -> tuple[str, ...]:
        recovery = "" if self.recovery_s is None else f"{self.recovery_s:.1f}"
        return (self.fault, self.stage, self.happened, recovery, self.result)


@pytest.fixture
def fault_table(request: pytest.FixtureRequest) -> FaultTable:
    return FaultTable(item=request.node)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults(fault, stage): a fault in a stage; run by `make test-faults`")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("faults"):
        item.user_properties.append((_FAULT, _marked(item)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "faults" in config.option.markexpr and (rows := list(_rows(terminalreporter.stats))):
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join(markdown(rows)))


def markdown(rows: list[Row]) -> Iterator[str]:
    """Equal rows, of one test with several parameters, are one."""
    for cells in (_HEADER, ("---",) * len(_HEADER), *dict.fromkeys(row.cells() for row in rows)):
        yield f"| {' | '.join(cells)} |"
    yield f"\n{hardware()}"


def hardware() -> str:
    import ray

    memory = psutil.virtual_memory().total / 1024**3
    return f"{cpu_model()}, {os.cpu_count()} cores, {memory:.0f} GiB; Ray {ray.__version__}, all nodes on this machine."


def _rows(stats: dict[str, list[pytest.TestReport]]) -> Iterator[Row]:
    failed = [report for kind in ("failed", "error") for report in stats.get(kind, [])]
    for report in stats.get("passed", []):
        if report.nodeid not in {one.nodeid for one in failed}:  # its teardown may have failed
            rows = [Row(**value) for name, value in report.user_properties if name == _ROW]
            yield from rows or _bare(report, "passed")
    for report in failed:
        yield from _bare(report, "FAILED")


def _bare(report: pytest.TestReport, result: str) -> Iterator[Row]:
    """The row of a test that added none."""
    for name, value in report.user_properties:
        if name == _FAULT:
            fault, stage = value
            yield Row(fault=fault, stage=stage, happened=report.nodeid, recovery_s=None, result=result)


def _marked(item: pytest.Item) -> tuple[str, str]:
    marker = item.get_closest_marker("faults")
    if marker is None or len(marker.args) != 2:
        raise pytest.UsageError(f"{item.nodeid}: fault_table needs @pytest.mark.faults(fault, stage)")
    fault, stage = marker.args
    return str(fault), str(stage)
