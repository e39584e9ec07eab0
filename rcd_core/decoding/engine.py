"""The engine: requests at different places in their decoding share each forward pass.

One step = starts of new blocks, then one pass per request, batched by kind and length. Requests join and leave between
passes; each is retired as soon as it is done, and what else runs changes no result. Residuals (Algorithm 2 of arXiv
2601.22954v2) are state of the request, set after each pass from the predictions at the positions that stay masked.

Shapes: N masked positions, D width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Many
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.cache import Slots
from rcd_core.decoding.forward import Forward, Residual, Work, groups
from rcd_core.decoding.prediction import Prediction, dirichlet, predict, temperatures
from rcd_core.decoding.reference import AsyncReference, Reference, WarmStart
from rcd_core.decoding.sequence import Pass, Sequence, Step
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import ReferenceSignals, Signals, residual_state


class QueueFull(RuntimeError):
    """The engine has as many waiting requests as it may have."""


@dataclass
class Statistics:
    """Since the engine was made. passes, rows, seconds by kind of pass ("reference" too; a batched pass with rows of
    several kinds counts as the most frequent); reused_tokens: prompt tokens found in the cache; merged_stores: finished
    blocks that were stored along with the next one's first pass instead of in a pass of their own."""

    passes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused_tokens: int = 0
    merged_stores: int = 0

    def add(self, kind: str, rows: int, seconds: float) -> None:
        self.passes[kind] = self.passes.get(kind, 0) + 1
        self.rows[kind] = self.rows.get(kind, 0) + rows
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    @property
    def occupancy(self) -> float:
        """Mean number of requests in a pass."""
        return sum(self.rows.values()) / max(1, sum(self.passes.values()))


class Engine:
    """Steps a changing set of requests.

    max_batch: requests under way at once, each with a cache slot for max_length positions (cache.bytes_per_position
    says what that costs). max_queue: requests that may wait beyond these. prefill_chunk: prompt tokens a pass takes at
    most, so that a long prompt does not hold up the others. reuse_prefixes: SDAR requests take what the cache holds of
    their prompt's first blocks; the text is the same, the number of prefill passes then depends on what ran before.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reference: Reference | AsyncReference | None,
        *,
        max_batch: int,
        max_length: int,
        max_queue: int | None = None,
        prefill_chunk: int = 2048,
        reuse_prefixes: bool = False,
    ) -> None:
        self.model = model
        self.reference = reference
        self.max_batch, self.max_length, self.max_queue = max_batch, max_length, max_queue
        self.prefill_chunk, self.reuse_prefixes = prefill_chunk, reuse_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.statistics = Statistics()
        self._forward = Forward(model, max_batch, max_length)
        self._slots = Slots(max_batch)

    def add(self, sequence: Sequence) -> None:
        """Raises QueueFull; the request takes part from the next step on."""
        if self.max_queue is not None and len(self.waiting) >= self.max_queue + len(self._slots.free):
            raise QueueFull(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Between passes: forget a request, running or waiting. Its slot is free for the next step."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._slots.release(sequence.slot)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Every running request that is not waiting for a remote reference makes one pass. Returns those that
        finished."""
        while self.waiting and self._slots.free:
            self._admit(self.waiting.popleft())
        self._start_blocks()
        ready = [s for s in self.running if s.awaited is None]
        passes = [s.next_pass(self.prefill_chunk) for s in ready]
        works = [_work(s, p) for s, p in zip(ready, passes, strict=True)]
        for group in groups(works):
            self._run([(ready[i], passes[i]) for i in group], [works[i] for i in group])
        done = [s for s in self.running if s.finished]
        self.running = [s for s in self.running if not s.finished]
        for s in done:
            self._slots.release(s.slot)
        return done

    def _admit(self, s: Sequence) -> None:
        # LLaDA's caches are approximations that belong to their own request, and compat_passes counts prefills.
        shared = self.reuse_prefixes and s.settings.cache == "block" and not s.settings.compat_passes
        assert s.settings.block_length is not None
        s.slot, source, reused = self._slots.take(s.canvas, s.settings.block_length, s.block[0] if shared else 0)
        if reused and source != s.slot:
            self._forward.cache.copy(source, s.slot, reused)
        s.stored = reused
        self.statistics.reused_tokens += reused
        self.running.append(s)

    # -- the first residual of a block (method.md 6)
    def _start_blocks(self) -> None:
        warm: list[Sequence] = []
        for s in self.running:
            if s.awaited is not None or not s.settings.residual or s.block_done:
                continue
            if s.next_pass(self.prefill_chunk).kind != "denoise":
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
            if isinstance(self.reference, AsyncReference):
                for s, request, future in zip(warm, asked, self.reference.submit(asked), strict=True):
                    s.awaited = (request, future)
            else:
                begun = time.perf_counter()
                for s, request, signals in zip(warm, asked, self.reference.signals(asked), strict=True):
                    self._warmed(s, request, signals)
                self.statistics.add("reference", len(asked), time.perf_counter() - begun)
        self._collect_answers()

    def _collect_answers(self) -> None:
        awaiting = [(s, *s.awaited) for s in self.running if s.awaited is not None]
        if awaiting and len(awaiting) == len(self.running):  # nobody has anything else to do
            wait([future for _, _, future in awaiting], return_when=FIRST_COMPLETED)
        for s, request, future in awaiting:
            if future.done():
                s.awaited = None
                self._warmed(s, request, future.result())

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

    def _warmed(self, s: Sequence, request: WarmStart, signals: Signals | None) -> None:
        if signals is None:
            s.reference_failures += 1
            return
        s.forwards.reference += 1
        self._set_residual(s, np.asarray(request.positions), signals)

    def _set_residual(self, s: Sequence, positions: NDArray[np.int64], signals: Signals) -> None:
        assert s.settings.alpha is not None
        if isinstance(signals, ReferenceSignals):
            signals = signals.to(self.model.device)
        alpha, delta = residual_state(signals, self.model.embedding.weight, s.settings.alpha, s.settings.alpha_scale)
        s.residual = Residual(positions, alpha, delta)

    # -- one pass
    def _run(self, group: Many[tuple[Sequence, Pass]], works: Many[Work]) -> None:
        begun = time.perf_counter()
        hidden = self._forward.hidden(works)
        for s, p in group:
            setattr(s.forwards, p.kind, getattr(s.forwards, p.kind) + 1)
            if p.kind != "denoise":
                s.stored = p.end
                if s.block_done:
                    s.advance()
            elif p.cached and not self.model.blocks_from_prompt_end:
                self.statistics.merged_stores += p.start < s.block[0] and s.block_index > 0
                s.stored = s.block[0]  # finished blocks before this one rode along
            if not self.model.blocks_from_prompt_end and p.cached:
                self._slots.held[s.slot].stored = s.stored
        self._predict(group, works, hidden)
        kinds = [p.kind for _, p in group]
        self.statistics.add(max(set(kinds), key=kinds.count), len(group), time.perf_counter() - begun)

    def _predict(self, group: Many[tuple[Sequence, Pass]], works: Many[Work], hidden: Tensor) -> None:
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
            unprompted = [_without_prompt(s, w) for (s, _), w in zip(group, works, strict=True)]
            bare = self._forward.hidden(unprompted)[at_rows, at_queries]
        predictions = predict(self.model, sequences, reached, hidden[at_rows, at_queries], bare)
        for s, positions, prediction in zip(sequences, reached, predictions, strict=True):
            self._apply(s, positions, prediction)

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


def _work(s: Sequence, p: Pass) -> Work:
    assert s.settings.block_length is not None
    residual = s.residual if p.kind == "denoise" else None
    slot = s.slot if p.cached else None
    return Work(s.canvas[p.start : p.end], p.start, p.num_keys, s.settings.block_length, slot, residual)


def _without_prompt(s: Sequence, work: Work) -> Work:
    """The unconditional row of classifier-free guidance: masks in place of the prompt."""
    ids = work.ids.copy()
    ids[: max(0, s.num_prompt - work.start)] = s.model.mask_token_id
    return Work(ids, work.start, work.num_keys, work.block_length, work.slot, work.residual)


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
