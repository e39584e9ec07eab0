"""The rule "learned": alpha from a position's uncertainty by a network that is trained with the target.

    alpha = sigmoid(logit(u) + f(u, c)),   u = min(1, H / h), c = max p,   f: 2 -> 16 -> 1

f begins as 0, so that training starts from the calibrated rule, apart from u being kept MARGIN away from 0 and 1.
It lies beside the weights in a file of its own: what the authors' code reads stays exactly theirs.

Shapes: N positions.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rcd_core.errors import UserError

FILE = "rcd_alpha.safetensors"
WIDTH = 16
MARGIN = 1e-3


class LearnedAlpha(nn.Module):
    """The same initial weights whenever and wherever it is made: workers need not agree on them first."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.hidden = nn.Linear(2, WIDTH)
        self.out = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, share: Tensor, confidence: Tensor) -> Tensor:
        """(N,) entropies over h and (N,) top probabilities, both in [0, 1] -> (N,) alpha, fp32."""
        seen = torch.stack([share, confidence], -1).to(self.hidden.weight.dtype)  # bf16 under sharded low precision
        shift: Tensor = self.out(torch.tanh(self.hidden(seen)))[:, 0].float()
        return torch.sigmoid(torch.logit(share.float(), eps=MARGIN) + shift)


def save_learned_alpha(learned: LearnedAlpha | None, directory: Path) -> None:
    """Write the network's file, or take away that of an earlier save."""
    if learned is None:
        (directory / FILE).unlink(missing_ok=True)
        return
    partial = directory / f"{FILE}.partial"
    save_file({name: w.detach().float().cpu().contiguous() for name, w in learned.state_dict().items()}, partial)
    os.replace(partial, directory / FILE)


def load_learned_alpha(directory: Path, device: str | torch.device, wanted: bool) -> LearnedAlpha | None:
    """The network of a checkpoint, fp32 and frozen like its other weights; None where there is none.

    wanted: the checkpoint's own rule is "learned". UserError where it then lacks the file, or the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        if wanted:
            raise UserError(f"{directory}: config.json's rcd.alpha is 'learned' but {FILE} is missing; copy it as well")
        return None
    learned = LearnedAlpha()
    try:
        learned.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or of another network ({error}); download or write it again") from error
    return learned.to(device)
