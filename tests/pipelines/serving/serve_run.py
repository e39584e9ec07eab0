"""A finished run with tiny random models, for the tests that serve it."""

from __future__ import annotations

import io
import re
import socket
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipelines import serve
from pipelines.recipe.load import parse_recipe
from pipelines.run.directory import RunDirectory, StageContext
from rcd_core import ModelConfig, new_model
from rcd_core.families.base import CheckpointInfo
from rcd_core.text.tokenizer import mask_token_id, stop_token_ids, train_tokenizer

BLOCK = 8
CANVAS = "12<|MASK|>4<|MASK|><|MASK|>78" * 2
SIZES = {"num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32, "max_positions": 1024}
START = {"family": "sdar", "hidden_size": 16, "num_layers": 2, **SIZES}
SMALLER = {"family": "sdar", "hidden_size": 8, "num_layers": 1, **SIZES}


@cache
def tokenizer() -> Any:
    return train_tokenizer(["digits 123456 and words"] * 4, 300)


def save_model(directory: Path, sizes: dict[str, Any], seed: int) -> None:
    info = CheckpointInfo(
        mask_token_id=mask_token_id(tokenizer()),
        eos_token_ids=stop_token_ids(tokenizer()),
        pad_token_id=tokenizer().pad_token_id,
        block_length=BLOCK,
    )
    new_model(ModelConfig(**sizes), vocab_size=len(tokenizer()), info=info, seed=seed).save_pretrained(
        directory, tokenizer()
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def metrics(context: StageContext) -> dict[str, float]:
    """The metrics of the model tiny-rcd, by name without `rcd_`."""
    text = httpx.get(serve.endpoint(context.recipe) + "/metrics", timeout=30, trust_env=False).text
    samples = re.findall(r'^rcd_(\w+)\{model="tiny-rcd"\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def serve_context(
    storage: Path, sizes: dict[str, Any] | None = None, resources: dict[str, Any] | None = None, **deploy: Any
) -> StageContext:
    """A run whose stages before deploy are done, with random models. sizes: override START for target and baseline.
    resources, deploy: keys of the recipe's sections."""
    start = {**START, **(sizes or {})}
    raw = {
        "name": "tiny",
        "storage": str(storage),
        "block_length": BLOCK,
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 1, "num_test": 1},
        "reference": {"start": SMALLER, "train": {"steps": 1, "batch_size": 1}},
        "base": {"start": start, "train": {"steps": 1, "batch_size": 1}},
        "target": {"train": {"steps": 1, "batch_size": 1}},
        "signals": {"top_k": 16},
        "resources": resources or {},
        "deploy": {
            "port": free_port(),
            "model_id": "tiny-rcd",
            "baseline": True,
            "decode": {"max_new_tokens": 16},
            **deploy,
        },
    }
    recipe = parse_recipe(raw)
    run = RunDirectory(recipe.run_directory)
    test = pa.table({"prompt": [CANVAS], "answer": ["12345678" * 2]})
    (Path(run.path) / "prepare" / "test").mkdir(parents=True)
    pq.write_table(test, Path(run.path) / "prepare" / "test" / "part-00000.parquet")
    for seed, (name, config) in enumerate({"target": start, "baseline": start, "reference": SMALLER}.items()):
        save_model(Path(run.stage_directory(name)) / "model", config, seed)
    for name in ("prepare", "target", "baseline", "reference"):
        run.finish(name, {"stage": name}, {"test": ["part-00000.parquet"]}, datetime.now().astimezone(), 0.0)
    return StageContext(
        recipe=recipe,
        run=run,
        stage="deploy",
        key="key-1",
        inputs=("prepare", "target", "reference", "baseline"),
        console=Console(file=io.StringIO(), width=60),
    )
