"""How many bytes of fp32 logits are held at once, wherever the vocabulary is reduced row by row."""

from __future__ import annotations

import torch

SMALLEST, LARGEST = 64 << 20, 1 << 30
SHARE = 128  # of a GPU's memory: 640 MB of 80 GB, a thousand rows of a vocabulary of 150,000. Chosen, not measured.


def logits_bytes(memory: float | None) -> int:
    """memory: bytes of the GPU; None on a CPU."""
    return SMALLEST if memory is None else int(min(max(SMALLEST, memory / SHARE), LARGEST))


def tile_bytes(device: torch.device) -> int:
    """Of fp32 logits on this device."""
    return logits_bytes(torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None)


def tile_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of (vocab_size,) fp32 logits of a tile, at least 1."""
    return max(1, tile_bytes(device) // (4 * vocab_size))
