"""Finished answers on disk, a line each as they come, so that a broken evaluation goes on with what is missing.

<directory>/settings.json     what the answers were asked for with; others are refused
<directory>/answers.jsonl     one JSON object per answer
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.run.keys import differences
from rcd_core.errors import UserError
from rcd_core.io import storage

Key = tuple[str, float | None, str, int]  # arm, threshold, example, sample
KEY = ("arm", "threshold", "example_id", "sample")


class AnswerLog:
    """material: as keys.differences compares it. UserError where the directory holds answers to something else."""

    def __init__(self, directory: str, material: Mapping[str, Any]) -> None:
        if storage.is_uri(directory):
            raise UserError(f"--output is {directory}; answers of an endpoint are appended to a file on a local disk")
        self.path = Path(directory, "answers.jsonl")
        settings = Path(directory, "settings.json")
        if settings.exists():
            lines = differences(json.loads(settings.read_text()), json.loads(json.dumps(material)))
            if lines:
                raise UserError(
                    "\n  ".join([f"--output {directory} holds answers to other settings:", *lines])
                    + "\nGive another --output, or restore the old settings."
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(str(settings), dict(material))
        self.rows = self._read()
        self._file = self.path.open("a", encoding="utf-8")

    def done(self) -> set[Key]:
        return {key_of_row(row) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """On disk when this returns, as far as this program can tell."""
        self.rows.append(row)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines, each answer once; a line that a kill has cut is taken away."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self.path.write_bytes(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        return list({key_of_row(row): row for row in rows}.values())


def key_of_row(row: Mapping[str, Any]) -> Key:
    arm, threshold, example_id, sample = (row[name] for name in KEY)
    return arm, threshold, example_id, sample
