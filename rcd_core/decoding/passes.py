"""The device's side of an engine: the forwards of a step, and what they predict.

Shapes: N masked positions that a step predicts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.forward import Forward, Shape, Work
from rcd_core.decoding.prediction import Predictor, Reached
from rcd_core.decoding.replays import Replays
from rcd_core.decoding.sequence import Pass, Sequence
from rcd_core.decoding.state import ResidualState
from rcd_core.decoding.statistics import Statistics
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.reduce import Feedback

_FIXED_QUERIES = 256  # tokens of a row up to which passes have fixed shapes: blocks, not prompts
_FIXED_POSITIONS = 64  # their masked positions are rounded up to a multiple of so many


class Passes:
    """Model, cache and residual state of max_batch slots. fixed: passes over cached blocks are rounded up to few shapes
    and, on a GPU, captured."""

    def __init__(
        self, model: DiffusionModel, max_batch: int, max_length: int, fixed: bool, statistics: Statistics
    ) -> None:
        self.model, self.fixed, self.statistics = model, fixed, statistics
        self.state = ResidualState(max_batch, model.embedding.weight.shape[1], model.dtype, model.device)
        self.forward = Forward(model, max_batch, max_length, self.state)
        self.predictor = Predictor(model, self.state)
        self.replays = Replays(model.device)

    def traced_alpha(self, reached: Reached, observed: bool) -> NDArray[np.float32]:
        """(N,) alpha in the input of the coming pass; zeros where nobody asks."""
        found = np.zeros(len(reached.positions), dtype=np.float32)
        asked = [s.fed and (observed or s.settings.trace) for s in reached.sequences]
        if any(asked):
            of = np.array(asked)[reached.owner]
            found[of] = self.state.alpha[self._upload(reached.places(self.state.reach)[of])].cpu().numpy()
        return found

    def run(
        self,
        order: Many[list[int]],
        ready: Many[Sequence],
        passes: Many[Pass],
        works: Many[Work],
        reached: Reached,
        observed: bool,
    ) -> tuple[NDArray[np.float32], Tensor | None]:
        """(3, N) tokens, confidence, entropy of the reached positions: one forward per group, then head and reduction
        for all of them, or both in one where the pass is captured. One copy from the device in the end.
        observed: nothing is captured, and the hidden states (N, D) are given too."""
        places = reached.places(self.state.reach)
        first = reached.sequences[0] if reached.sequences else None
        alike = all(s.greedy and s.feedback == first.feedback for s in reached.sequences if first)
        feedback = first.feedback if first else None
        with_entropy = any(s.looks_at_entropy for s in reached.sequences)
        fixed = self.fixed and alike and not observed and all(w.slot is not None for w in works)
        if fixed:
            fixed = all(len(w.ids) <= _FIXED_QUERIES for w, p in zip(works, passes, strict=True) if p.kind == "denoise")
        guided = any(s.settings.cfg_scale for s in reached.sequences)
        hidden: list[Tensor] = []
        bare: list[Tensor] = []
        found: list[Tensor] = []
        done = done_positions = 0  # of what is reached
        for group in order:
            begun = time.perf_counter()
            rows = [row for row, i in enumerate(group) if passes[i].kind == "denoise"]
            group_works = [works[i] for i in group]
            ends = reached.ends[done : done + len(rows)]
            mine = slice(done_positions, int(ends[-1]) if len(ends) else done_positions)
            if mine.stop == mine.start:  # prefills and stores, or passes that commit nothing (compat_passes)
                self.forward.hidden(group_works)
            else:
                numbers, shape = self.forward.pack(group_works, fixed)
                bases = [row * shape.queries - works[group[row]].start for row in rows]
                at = reached.positions[mine] + np.array(bases)[reached.owner[mine] - done]
                if fixed:
                    found.append(self._captured(numbers, shape, at, places[mine], feedback, with_entropy))
                else:
                    hidden.append(self._rows(self.forward.run(self._upload(numbers), shape), at))
                if guided:
                    unprompted = [_without_prompt(ready[i], works[i]) for i in group]
                    bare.append(self._rows(self.forward.hidden(unprompted), at))
            done, done_positions = done + len(rows), mine.stop
            kinds = [passes[i].kind for i in group]
            self.statistics.add(max(set(kinds), key=kinds.count), len(group), time.perf_counter() - begun)
        if not hidden and not found:
            return np.zeros((3, 0), dtype=np.float32), None
        begun = time.perf_counter()
        states = _joined(hidden) if hidden else None
        if states is not None and alike:
            found = [self.predictor.greedy(states, self._upload(places), feedback, with_entropy)]
        elif states is not None:
            rest = _joined(bare) if guided else None
            found = [self.predictor.mixed(reached, states, self._upload(places), rest)]
        result: NDArray[np.float32] = _joined(found, 1).cpu().numpy()
        self.statistics.spend("choose", time.perf_counter() - begun)
        return result, states

    def _captured(
        self,
        numbers: NDArray[np.int64],
        shape: Shape,
        at: NDArray[np.int64],
        places: NDArray[np.int64],
        feedback: Feedback | None,
        with_entropy: bool,
    ) -> Tensor:
        """A whole pass of fixed shape, head and reduction included: more positions than there are, whose results nobody
        wants."""
        count, extra = len(at), -len(at) % _FIXED_POSITIONS
        size, nowhere = count + extra, self.state.nowhere
        at = np.concatenate([at, np.zeros(extra, dtype=np.int64)])

        def run(integers: Tensor) -> Tensor:
            hidden = self.forward.run(integers, shape).flatten(0, 1).index_select(0, integers[-2 * size : -size])
            return self.predictor.greedy(hidden, integers[-size:], feedback, with_entropy)

        everything = np.concatenate([numbers, at, places, np.full(extra, nowhere)])
        rehearsal = np.concatenate([numbers, at, np.full(size, nowhere)])
        found = self.replays((shape, size, feedback, with_entropy), everything, rehearsal, run)
        return found[:, :count].clone()

    def _rows(self, hidden: Tensor, at: NDArray[np.int64]) -> Tensor:
        return hidden.flatten(0, 1).index_select(0, self._upload(at))

    def _upload(self, integers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(integers).to(self.model.device)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _without_prompt(s: Sequence, work: Work) -> Work:
    """The unconditional row of classifier-free guidance: masks in place of the prompt."""
    ids = work.ids.copy()
    ids[: max(0, s.num_prompt - work.start)] = s.model.mask_token_id
    return Work(ids, work.start, work.num_keys, work.block_length, work.slot, work.residual)
