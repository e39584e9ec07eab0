"""The ranks of tensor parallelism: processes that each hold a part of every large weight, and compute in step.

`Ranks` itself is one process that holds whole weights; its collectives do nothing. Each collective must be called by
all ranks, in the same order and with the same shapes.

Shapes: R ranks, N positions, V vocabulary.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rcd_core.errors import UserError

PASS_TIMEOUT_S = 600.0  # for a collective of a pass: compilation and captures may hold up one rank
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
_IDLE = timedelta(days=3650)  # a server without requests; a lost rank closes its connections, which ends the wait


class Ranks:
    rank, size = 0, 1
    failed = False  # a rank is lost, or in the midst of a step that others gave up

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank: (R, *x.shape)."""
        return x[None]

    def agree(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place."""
        return x

    def share(self, value: Any) -> Any:
        """Rank 0's value, which must be small and can be pickled."""
        return value

    def vocabulary(self, vocab_size: int) -> range:
        """The ids whose rows of the embedding table and the head this rank holds. The last rank may hold fewer."""
        count = -(-vocab_size // self.size)
        return range(self.rank * count, min(vocab_size, (self.rank + 1) * count))

    def whole(self, logits: Tensor, vocab_size: int) -> Tensor:
        """(..., V / R) logits of this rank's ids -> (..., V)."""
        if self.size == 1:
            return logits
        count = -(-vocab_size // self.size)
        parts = self.gather(F.pad(logits, (0, count - logits.shape[-1])))
        return parts.movedim(0, -2).flatten(-2)[..., :vocab_size]


ALONE = Ranks()


class ProcessRanks(Ranks):
    """Ranks of torch.distributed: of the process group if there is one, else of a new one. device_type: where the
    tensors of collectives are, "cuda" (NCCL) or "cpu" (gloo). store: torch.distributed's, where the processes meet;
    None: as the environment variables of torchrun say."""

    def __init__(self, rank: int, size: int, device_type: str, store: Any = None) -> None:
        self.rank, self.size = rank, size
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device_type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=PASS_TIMEOUT_S),
            )
        self._control = dist.new_group(backend="gloo", timeout=_IDLE)

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        _gather(parts.flatten(0, 1), x)
        return parts

    def agree(self, x: Tensor) -> Tensor:
        dist.broadcast(x, 0)
        return x

    def share(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, 0, group=self._control, device=torch.device("cpu"))
        return box[0]

    def close(self) -> None:
        dist.destroy_process_group()


def torchrun_ranks(size: int, device: str) -> Ranks:
    """The ranks of this process's torchrun. Raises UserError if they are not `size`."""
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != size:
        raise UserError(
            f"tensor_parallel is {size}, but this is one of {found} process(es); start them with "
            f"torchrun --nproc-per-node {size} --no-python rcd ..., or leave tensor_parallel out"
        )
    if size == 1:
        return ALONE
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return ProcessRanks(int(os.environ["RANK"]), size, torch.device(device).type)
