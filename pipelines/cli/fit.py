"""`rcd fit`: what of a checkpoint fits, for decoding and for training, from its config.json alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table

from pipelines.cli.file_flags import FitFlags
from pipelines.cli.plan import STRATEGIES, known_config
from pipelines.run.messages import make_console
from rcd_core.decoding.memory import available_bytes, engine_memory
from rcd_core.errors import UserError
from rcd_core.families.files import read_json
from rcd_core.families.loading import checkpoint_directory, family_of
from rcd_core.io.hub import cached_snapshot, is_hub_id, split_hub_id
from rcd_core.training.plan import MEMORY, USABLE, ModelShape, memory, step_shape
from rcd_core.training.settings import TrainSettings

LENGTHS = (1024, 4096, 16384)
MOST_REQUESTS, MOST_ROWS = 512, 256
RANKS = (1, 2, 4, 8)
KEPT_IDS = 32  # of signals, the recipes' default
LABELLED = 1.0  # share of the tokens: an upper bound
CPU_SHARE = 0.5  # of the free memory, as the engine takes on a CPU


@dataclass(frozen=True)
class Released:
    """family: the class. config: transformers' configuration."""

    family: Any
    config: Any

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of_backbone(self.family.family, self.config)


def fit(flags: FitFlags) -> int:
    for name in ("gpus", "length", "block_length"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is {getattr(flags, name)}; it must be at least 1")
    found, console = read_released(flags.checkpoint), make_console()
    label, usable, card = _device(flags.device)
    dtype = torch.bfloat16 if card else torch.float32
    shape = found.shape
    console.print(
        f"{flags.checkpoint}: {found.family.family}, {shape.parameters:,} parameters, "
        f"{shape.parameters * dtype.itemsize / 1e9:,.1f} GB in {str(dtype).removeprefix('torch.')}",
        highlight=False,
    )
    console.print(f"{label}: {usable / 1e9:,.1f} GB usable. Planned from sizes, not measured.", highlight=False)
    console.print(_decoding_table(found, usable, dtype, flags.block_length, card))
    console.print("-: the model has fewer positions, or cannot be split so", highlight=False)
    if card is None:
        console.print("training is planned for GPUs; name one with --device", highlight=False)
    else:
        console.print(_training_table(shape, label, card, flags.gpus, flags.length))
    return 0


def read_released(checkpoint: str) -> Released:
    """From a directory, the hub's cache, or the sizes that ship with the package; nothing is downloaded."""
    where = Path(checkpoint)
    if "://" not in checkpoint and not where.is_dir() and is_hub_id(checkpoint):
        name, revision = split_hub_id(checkpoint)
        cached, config = cached_snapshot(name, revision), known_config(name)
        if cached is not None and (cached / "config.json").exists():
            config = read_json(cached / "config.json")
        if config is None:
            raise UserError(
                f"{checkpoint} is not in the hub's cache, and its sizes do not ship with this package; download its "
                f"config.json: hf download {name} config.json"
            )
    else:
        where = checkpoint_directory(checkpoint)
        config = read_json(where / "config.json")
    family = family_of(config, where)
    return Released(family, family.read_config(config, where, has_head=True))


def _device(name: str | None) -> tuple[str, float, float | None]:
    """(description, usable bytes, bytes of the card or None on a CPU)."""
    if name is not None:
        return name, USABLE * MEMORY[name], MEMORY[name]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.get_device_name(), min(float(free), USABLE * total), float(total)
    available = available_bytes(torch.device("cpu"))
    if available is None:
        raise UserError("the free memory of this machine is not known; name a GPU with --device")
    return "this machine's CPU", CPU_SHARE * available, None


def most_requests(
    found: Released, usable: float, dtype: torch.dtype, length: int, block_length: int, ranks: int, on_gpu: bool
) -> int | None:
    """Requests of `length` positions that decode at once on `ranks` devices of `usable` bytes each; None: the model
    cannot be split so, or has fewer positions."""
    c = found.config
    if length > c.max_position_embeddings or any(
        n % ranks for n in (c.num_attention_heads, c.intermediate_size, c.num_key_value_heads * max(1, ranks))
    ):
        return None
    own = copy.copy(c)
    own.num_attention_heads, own.intermediate_size = c.num_attention_heads // ranks, c.intermediate_size // ranks
    own.num_key_value_heads = max(1, c.num_key_value_heads // ranks)
    model: Any = SimpleNamespace(
        config=own,
        dtype=dtype,
        device=torch.device("cpu"),
        vocab_size=-(-c.vocab_size // ranks),
        whole_canvas=found.family.whole_canvas,
        loophole=None,
    )
    backend: Any = SimpleNamespace(on_device=True) if on_gpu else None
    left = usable - found.shape.parameters * dtype.itemsize / ranks

    def fits(count: int) -> bool:
        return engine_memory(model, count, length, block_length, backend=backend).total <= left

    return _largest(fits, MOST_REQUESTS)


def _decoding_table(found: Released, usable: float, dtype: torch.dtype, block_length: int, card: float | None) -> Table:
    title = f"requests that decode at once (at most {MOST_REQUESTS} are tried), blocks of {block_length}"
    table = Table("devices", *(f"{length:,} tokens each" for length in LENGTHS), title=title, title_justify="left")
    for ranks in RANKS if card else (1,):
        counts = [most_requests(found, usable, dtype, n, block_length, ranks, card is not None) for n in LENGTHS]
        name = "1" if ranks == 1 else f"{ranks} (tensor_parallel)"
        table.add_row(name, *("-" if count is None else str(count) if count else "does not fit" for count in counts))
    return table


def most_rows(shape: ModelShape, settings: TrainSettings, card: float, gpus: int, length: int) -> int:
    """Rows of `length` tokens in a micro-batch of each of so many GPUs of `card` bytes."""

    def fits(count: int) -> bool:
        changed = replace(settings, batch_size=2 * count * gpus, micro_batch_size=count)  # two, to be accumulated
        step = step_shape(shape, changed, length, gpus, LABELLED, KEPT_IDS)
        return memory(shape, changed, step, gpus, card=card).peak <= USABLE * card

    return _largest(fits, MOST_ROWS)


def _training_table(shape: ModelShape, device: str, card: float, gpus: int, length: int) -> Table:
    title = f"rows of {length:,} tokens in a micro-batch on each of {gpus} x {device}, bf16, with residuals"
    table = Table("strategy", "all activations kept", "activation_checkpointing", title=title, title_justify="left")
    for name, cells in _training_rows(shape, card, gpus, length):
        table.add_row(name, *cells)
    return table


def _training_rows(shape: ModelShape, card: float, gpus: int, length: int) -> Iterator[tuple[str, list[str]]]:
    plain = TrainSettings(steps=1, batch_size=gpus, dtype="bfloat16")
    for strategy in STRATEGIES:
        settings = strategy.apply(plain)
        counts = [
            most_rows(shape, replace(settings, activation_checkpointing=mode), card, gpus, length)
            for mode in (False, True)
        ]
        yield strategy.name, [str(count) if count else "does not fit" for count in counts]


def _largest(fits: Any, most: int) -> int:
    """The largest count from 0 to `most` that fits. What fits, fits with fewer."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
