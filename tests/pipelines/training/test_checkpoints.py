"""A downloaded checkpoint frees the disk once it is loaded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from pipelines.training.checkpoints import Checkpoints
from rcd_core.io import storage
from rcd_core.training.strategies import PROGRESS
from tests.s3_server import s3_server


def test_a_checkpoint_of_a_bucket_is_deleted_once_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with s3_server("bucket"):
        progress = json.dumps({"step": 7, "strategy": "ddp"}).encode()
        for name, content in ((PROGRESS, progress), (".metadata", b"index"), ("__0_0.distcp", b"weights")):
            storage.write_bytes(f"s3://bucket/run/state/{name}", content)
        checkpoints = Checkpoints.__new__(Checkpoints)  # without a training, whose ranks its name is made of
        checkpoints.stage, checkpoints._stack = "target", contextlib.ExitStack()
        directory, step = checkpoints.take_over("s3://bucket/run/state")
        assert step == 7 and (directory / "__0_0.distcp").read_bytes() == b"weights"
        assert tmp_path in directory.parents
        checkpoints.loaded()
        assert not directory.exists()
        assert storage.exists("s3://bucket/run/state/__0_0.distcp")
