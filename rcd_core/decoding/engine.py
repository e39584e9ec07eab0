"""The engine: requests at different places in their decoding share each forward pass.

One step = starts of new blocks, then one pass per request, batched by kind and length. A request is retired as soon as
it is done. Residuals (Algorithm 2 of arXiv 2601.22954v2) are state of the request, set after each pass from the
predictions at the positions that stay masked.

Shapes: R requests of a pass, Q queries, N masked positions, D width.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.cache import SlotCache
from rcd_core.decoding.prediction import Prediction, dirichlet, predict, temperatures
from rcd_core.decoding.reference import Reference, WarmStart
from rcd_core.decoding.sequence import Pass, Residual, Sequence, Step
from rcd_core.families.base import DiffusionModel
from rcd_core.layouts import Layout, block_causal
from rcd_core.residual import inject_residual
from rcd_core.signals import ReferenceSignals, Signals, residual_state

_PADDING_SHARE = 0.75  # requests share a pass if the shorter has at least this share of the longer's queries
Job = tuple[Sequence, Pass]


class Engine:
    """Steps a changing set of requests. `max_length`: longest canvas it has cache for."""

    def __init__(self, model: DiffusionModel, reference: Reference | None, *, max_batch: int, max_length: int) -> None:
        self.model = model
        self.reference = reference
        self.max_batch, self.max_length = max_batch, max_length
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free_slots = list(range(max_batch))
        self._cache: SlotCache | None = None

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Every running request makes one pass. Returns those that finished."""
        while self.waiting and self._free_slots:
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop(0)
            self.running.append(sequence)
        self._start_blocks()
        for group in _groups([(s, s.next_pass()) for s in self.running]):
            self._run(group)
        done = [s for s in self.running if s.finished]
        self.running = [s for s in self.running if not s.finished]
        self._free_slots = sorted(self._free_slots + [s.slot for s in done])
        return done

    # -- the first residual of a block (method.md 6)
    def _start_blocks(self) -> None:
        warm: list[Sequence] = []
        for s in self.running:
            if not s.settings.residual or s.block_done or s.next_pass().kind != "denoise":
                continue
            every_pass = s.settings.residual_source == "reference"
            if every_pass or (not s.started and s.settings.start == "reference"):
                warm.append(s)
            elif not s.started and s.settings.start == "dirichlet":
                positions = s.masked_positions(s.scope_end)
                self._set_residual(s, positions, dirichlet(self.model, s, positions))
            # A start from "self" comes about in a pass of its own, see _apply.
            s.started |= every_pass or s.settings.start != "self"
        if warm and self.reference is not None:
            asked = [self._warm_start(s) for s in warm]
            for s, request, signals in zip(warm, asked, self.reference.signals(asked), strict=True):
                s.forwards.reference += 1
                self._set_residual(s, np.asarray(request.positions), signals)

    def _warm_start(self, s: Sequence) -> WarmStart:
        sees = len(s.canvas) if self.model.blocks_from_prompt_end else s.block[1]
        assert s.settings.block_length is not None
        return WarmStart(
            canvas_ids=tuple(s.canvas[:sees].tolist()),
            positions=tuple(s.masked_positions(s.scope_end).tolist()),
            block_length=s.settings.block_length,
            top_k=s.settings.residual_top_k,
            **temperatures(s.settings),
        )

    def _set_residual(self, s: Sequence, positions: NDArray[np.int64], signals: Signals) -> None:
        assert s.settings.alpha is not None
        if isinstance(signals, ReferenceSignals):
            signals = signals.to(self.model.device)
        alpha, delta = residual_state(signals, self.model.embedding.weight, s.settings.alpha, s.settings.alpha_scale)
        s.residual = Residual(positions, alpha, delta)

    # -- one pass
    def _run(self, group: list[Job]) -> None:
        hidden = self._forward(group)
        for s, p in group:
            setattr(s.forwards, p.kind, getattr(s.forwards, p.kind) + 1)
            if p.kind != "denoise":
                s.stored = p.end
                if s.block_done:
                    s.advance()
            elif p.cached and not self.model.blocks_from_prompt_end:
                s.stored = s.block[0]  # finished blocks before this one rode along
        rows = [row for row, (_, p) in enumerate(group) if p.kind == "denoise"]
        sequences = [group[row][0] for row in rows]
        reached = [s.masked_positions(s.scope_end) for s in sequences]
        if not any(len(p) for p in reached):  # stores and prefills only, or passes that commit nothing (compat_passes)
            for s in sequences:
                s.empty_pass_due = False
                s.advance()
            return
        at_rows = torch.from_numpy(np.repeat(rows, [len(p) for p in reached]))
        starts = [group[row][1].start for row in rows]
        at_queries = torch.from_numpy(np.concatenate([p - start for p, start in zip(reached, starts, strict=True)]))
        bare = None
        if any(s.settings.cfg_scale for s in sequences):
            bare = self._forward(group, without_prompt=True)[at_rows, at_queries]
        predictions = predict(self.model, sequences, reached, hidden[at_rows, at_queries], bare)
        for s, positions, prediction in zip(sequences, reached, predictions, strict=True):
            self._apply(s, positions, prediction)

    def _forward(self, group: list[Job], without_prompt: bool = False) -> Tensor:
        """(R, Q, D) hidden states of one batched pass; shorter rows are padded at the end."""
        model, device = self.model, self.model.device
        width = max(p.end - p.start for _, p in group)
        num_keys = max(p.num_keys for _, p in group)
        ids = np.full((len(group), width), model.info.pad_token_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        written = np.full_like(ids, self.max_length)  # where keys and values go; padding into the slot's bin
        residual_at = np.zeros(ids.shape, dtype=bool)
        states: list[Residual] = []
        for row, (s, p) in enumerate(group):
            n = p.end - p.start
            ids[row, :n] = s.canvas[p.start : p.end]
            if without_prompt and p.start < s.num_prompt:
                ids[row, : s.num_prompt - p.start] = model.mask_token_id
            positions[row] = np.minimum(np.arange(p.start, p.start + width), p.end - 1)
            written[row, :n] = positions[row, :n]
            if p.kind == "denoise" and s.residual is not None:
                residual_at[row, s.residual.positions - p.start] = True
                states.append(s.residual)
        embeds = model.embedding(torch.from_numpy(ids).to(device))
        if states:
            alpha, delta = torch.cat([r.alpha for r in states]), torch.cat([r.delta for r in states])
            at = torch.from_numpy(residual_at).to(device)
            embeds = inject_residual(embeds, at, alpha, delta, model.embedding.weight[model.mask_token_id])
        at_positions = torch.from_numpy(positions).to(device)
        layout = self._layout(group, at_positions, num_keys)
        view = None
        if group[0][1].cached:
            if self._cache is None:
                self._cache = SlotCache(model, self.max_batch, self.max_length)
            slots = torch.tensor([s.slot for s, _ in group], device=device)
            view = self._cache.view(slots, torch.from_numpy(written).to(device), num_keys)
        return model.hidden(embeds, at_positions, layout, view)

    def _layout(self, group: list[Job], positions: Tensor, num_keys: int) -> Layout:
        """Who sees whom in this pass; requests may differ in block length."""
        lengths = torch.tensor([p.num_keys for _, p in group], device=positions.device)
        blocks = [b for s, _ in group if (b := self.model.attention_block(s.settings.block_length or 0))]
        if not blocks:
            return block_causal(positions, lengths, num_keys, None)
        one_block = all(p.start // b == (p.end - 1) // b for (_, p), b in zip(group, blocks, strict=True))
        return block_causal(positions, lengths, num_keys, torch.tensor(blocks, device=positions.device), one_block)

    # -- what a pass changes
    def _apply(self, s: Sequence, positions: NDArray[np.int64], prediction: Prediction) -> None:
        if s.empty_pass_due:
            s.empty_pass_due = False
            s.advance()
            return
        commit = prediction.commit
        probing = s.settings.residual and not s.started  # start "self": this pass only supplies the residual
        if probing:
            commit = np.zeros_like(commit)
            s.started = True
        elif s.settings.trace:
            s.steps.append(_step(s, positions, prediction))
        s.canvas[positions[commit]] = prediction.tokens[commit]
        if prediction.residual is not None:
            s.residual = Residual(positions, *prediction.residual)
        if s.residual is not None:
            s.residual = s.residual.keep(~commit)
        if probing:
            return
        s.step += 1
        if not s.block_done:
            return
        if s.settings.compat_passes and s.settings.cache == "block":
            return  # its store pass comes next
        if s.settings.compat_passes and s.settings.cache in ("prefix", "dual") and s.step == 1:
            s.empty_pass_due = True  # Fast-dLLM's extra pass that commits nothing (semantics.md 3)
            return
        s.advance()


def _step(s: Sequence, positions: NDArray[np.int64], prediction: Prediction) -> Step:
    inside = positions < s.block[1]
    alpha = np.zeros(len(positions)) if s.residual is None else s.residual.alpha.float().cpu().numpy()
    return Step(
        masked=positions[inside].tolist(),
        argmax=prediction.tokens[inside].tolist(),
        confidence=prediction.confidence[inside].tolist(),
        entropy=prediction.entropy[inside].tolist(),
        committed=positions[prediction.commit].tolist(),
        alpha=alpha[inside].tolist(),
    )


def _groups(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that share a forward: same use of the cache and similar numbers of queries."""
    groups: list[list[Job]] = []
    for job in sorted(jobs, key=lambda j: (j[1].cached, j[1].end - j[1].start, j[0].slot)):
        if groups:
            first = groups[-1][0][1]
            size, smallest = job[1].end - job[1].start, first.end - first.start
            if first.cached == job[1].cached and smallest >= _PADDING_SHARE * size:
                groups[-1].append(job)
                continue
        groups.append([job])
    return groups
