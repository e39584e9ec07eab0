"""Shared by the tests of training: example files, and processes that train together over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GOLDEN = Path(__file__).parents[2] / "golden"
BLOCK = 4


def write_examples(directory: Path, count: int) -> str:
    """`count` rows of two to five blocks; the first block is the prompt. Packing gives two workers different numbers of
    packed rows."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 490, n * BLOCK).tolist() for n in generator.integers(2, 6, count)]
    lists = pa.list_(pa.int32())
    columns = {
        "example_id": [f"{i:03d}" for i in range(count)],
        "input_ids": pa.array(ids, lists),
        "labels": pa.array([[-100] * BLOCK + row[BLOCK:] for row in ids], lists),
    }
    path = str(directory / "part.parquet")
    pq.write_table(pa.table(columns), path)
    return path


def spawn(worker: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run worker(rank, *arguments) in `world` processes of one gloo group, as under torchrun."""
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_in_group, (world, port, worker, arguments), nprocs=world)


def _in_group(rank: int, world: int, port: int, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", **{k: str(v) for k, v in variables.items()}}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    worker(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
