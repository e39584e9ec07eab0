"""Example files for the tests of training rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rcd_core.training.example_files import example, write


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """50 + 37 examples in chunks of 16."""
    return [
        write(tmp_path / "a.parquet", [example(i) for i in range(50)], 16),
        write(tmp_path / "b.parquet", [example(i) for i in range(50, 87)], 16),
    ]
