"""Checkpoints on disk for the tests: the golden ones, changed as a test needs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def checkpoint(directory: Path, source: str = "sdar_tiny", drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """A golden checkpoint in `directory` with a changed config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((GOLDEN / source / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    shutil.copy(GOLDEN / source / "model.safetensors", directory)
    return directory


def edit_config(directory: Path, **changes: Any) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def same_weights(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
