"""The engine: requests at different places in their decoding share each forward pass.

One step = starts of new blocks, then one pass per request, batched by kind and length. Requests join and leave between
passes; each is retired as soon as it is done, and what else runs changes no result. Residuals (Algorithm 2 of arXiv
2601.22954v2) are state of the request, set by each pass from its predictions.

Shapes: N masked positions.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.alpha import position_rule
from rcd_core.decoding.cache import Slots
from rcd_core.decoding.feedback import temperatures
from rcd_core.decoding.forward import Work, groups
from rcd_core.decoding.observer import Observed, Observer
from rcd_core.decoding.passes import Passes
from rcd_core.decoding.prediction import Reached, dirichlet, select
from rcd_core.decoding.reference import AsyncReference, Reference, WarmStart
from rcd_core.decoding.sequence import Pass, Sequence, Step
from rcd_core.decoding.spread import spread_alpha
from rcd_core.decoding.statistics import Statistics
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import ReferenceSignals, Signals, residual_state


class QueueFull(RuntimeError):
    """The engine has as many waiting requests as it may have."""


class Engine:
    """Steps a changing set of requests.

    max_batch: requests under way at once, each with a cache slot for max_length positions (cache.bytes_per_position
    says what that costs). max_queue: requests that may wait beyond these. prefill_chunk: prompt tokens a pass takes at
    most, so that a long prompt does not hold up the others. reuse_prefixes: SDAR requests take what the cache holds of
    their prompt's first blocks; the text is the same, the number of prefill passes then depends on what ran before.
    fixed_shapes: passes over cached blocks are rounded up to few shapes, captured as CUDA graphs (None: on GPUs).
    observer: is shown each step's predictions; nothing is captured then.
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
        fixed_shapes: bool | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.reference = reference
        self.observer = observer
        self.max_batch, self.max_length, self.max_queue = max_batch, max_length, max_queue
        self.prefill_chunk, self.reuse_prefixes = prefill_chunk, reuse_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.statistics = Statistics()
        fixed = model.device.type == "cuda" if fixed_shapes is None else fixed_shapes
        self._passes = Passes(model, max_batch, max_length, fixed, self.statistics)
        self._state = self._passes.state
        self._slots = Slots(max_batch)

    def add(self, sequence: Sequence) -> None:
        """Raises QueueFull, and UserError for a request that is too long; it takes part from the next step on."""
        if len(sequence.canvas) > self.max_length:
            raise UserError(
                f"the request needs {len(sequence.canvas)} positions, the engine's slots have {self.max_length}; lower "
                "max_new_tokens, give a shorter prompt, or make the engine with a larger max_length"
            )
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
        order = groups(works, self._passes.forward.pass_tokens)
        reached = Reached.of([ready[i] for group in order for i in group if passes[i].kind == "denoise"])
        observed = self.observer is not None
        alpha = self._passes.traced_alpha(reached, observed)
        found, hidden = self._passes.run(order, ready, passes, works, reached, observed)
        for s, p in zip(ready, passes, strict=True):
            self._passed(s, p)
        if reached.sequences:
            self._apply(reached, found, alpha, hidden)
            spread_alpha(self._state, reached.sequences)
        done = [s for s in self.running if s.finished]
        self.running = [s for s in self.running if not s.finished]
        for s in done:
            self._slots.release(s.slot)
            self.statistics.finished(s.output())
        return done

    def _admit(self, s: Sequence) -> None:
        # LLaDA's caches are approximations that belong to their own request, and compat_passes counts prefills.
        shared = self.reuse_prefixes and s.settings.cache == "block" and not s.settings.compat_passes
        assert s.settings.block_length is not None
        s.slot, source, reused = self._slots.take(s.canvas, s.settings.block_length, s.block[0] if shared else 0)
        if reused and source != s.slot:
            self._passes.forward.cache.copy(source, s.slot, reused)
        s.stored = reused
        if s.settings.residual and self._state.reserve(max(s.settings.block_length, s.widest_scope)):
            self._passes.replays.clear()
        self.statistics.reused_tokens += reused
        chunks = [-(-n // max(1, self.prefill_chunk)) for n in (s.block[0], s.block[0] - reused)]
        self.statistics.reused_prefills += chunks[0] - chunks[1]
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
                self._set_residual(s, s.open, dirichlet(self.model, s, s.open))
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
            positions=tuple(s.open.tolist()),
            block_length=s.settings.block_length,
            top_k=s.settings.residual_top_k,
            session=s.slot,
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
        rule, scale = position_rule(s.settings), s.settings.alpha_scale
        learned = self.model.learned_alpha
        alpha, delta = residual_state(signals, self.model.embedding.weight, rule, scale, learned=learned)
        places = s.slot * self._state.reach + positions - s.block[0]
        self._state.write(torch.from_numpy(places).to(self.model.device), alpha, delta)
        s.fed = True
        spread_alpha(self._state, [s])

    # -- what a pass changes
    def _passed(self, s: Sequence, p: Pass) -> None:
        """What a pass has left in the cache."""
        exact = p.cached and not self.model.blocks_from_prompt_end
        if p.kind == "denoise":
            s.forwards.denoise += 1
            if not exact or p.start == s.block[0]:
                return
            self.statistics.merged_stores += s.block_index > 0
            s.stored = s.block[0]  # finished blocks before this one rode along
        else:
            setattr(s.forwards, p.kind, getattr(s.forwards, p.kind) + 1)
            s.stored = p.end
            if s.block_done:
                s.advance()
        if exact:
            self._slots.held[s.slot].stored = s.stored

    def _apply(
        self, reached: Reached, predictions: NDArray[np.float32], alpha: NDArray[np.float32], hidden: Tensor | None
    ) -> None:
        tokens, confidence, entropy = predictions[0].astype(np.int64), predictions[1], predictions[2]
        commit = select(self.model, reached, confidence, entropy)
        if self.observer is not None and hidden is not None:
            fed = np.array([s.fed for s in reached.sequences])[reached.owner]
            starting = np.array([s.settings.residual and not s.started for s in reached.sequences])[reached.owner]
            self.observer(Observed(reached, hidden, alpha, fed, commit & ~starting))
        chosen, chosen_tokens, rest = reached.positions[commit], tokens[commit], reached.positions[~commit]
        ends = reached.ends.tolist()
        splits = np.concatenate([[0], commit.cumsum()])[reached.ends].tolist()  # of chosen, by request
        end = split = 0
        for s, next_end, next_split in zip(reached.sequences, ends, splits, strict=True):
            begin, first, end, split = end, split, next_end, next_split
            if s.empty_pass_due:
                s.empty_pass_due = False
                s.advance()
                continue
            if s.feedback is not None:
                s.fed = True
            if s.settings.residual and not s.started:  # start "self": this pass only supplies the residual
                s.started = True
                continue
            if s.settings.trace:
                part = slice(begin, end)
                s.steps.append(_step(s, tokens[part], confidence[part], entropy[part], commit[part], alpha[part]))
            s.commit(chosen[first:split], chosen_tokens[first:split], rest[begin - first : end - split])
            s.step += 1
            if not s.block_done or (s.settings.compat_passes and s.settings.cache == "block"):
                continue  # with compat_passes its store pass comes next
            if s.settings.compat_passes and s.settings.cache in ("prefix", "dual") and s.step == 1:
                s.empty_pass_due = True  # Fast-dLLM's extra pass that commits nothing (semantics.md 3)
                continue
            s.advance()


def _work(s: Sequence, p: Pass) -> Work:
    assert s.settings.block_length is not None
    residual = (s.slot, s.block[0], s.scope_end) if p.kind == "denoise" and s.fed else None
    slot = s.slot if p.cached else None
    return Work(s.canvas[p.start : p.end], p.start, p.num_keys, s.settings.block_length, slot, residual)


def _step(
    s: Sequence,
    tokens: NDArray[np.int64],
    confidence: NDArray[np.float32],
    entropy: NDArray[np.float32],
    commit: NDArray[np.bool_],
    alpha: NDArray[np.float32],
) -> Step:
    inside = s.open < s.block[1]
    return Step(
        masked=s.open[inside].tolist(),
        argmax=tokens[inside].tolist(),
        confidence=confidence[inside].tolist(),
        entropy=entropy[inside].tolist(),
        committed=s.open[commit].tolist(),
        alpha=alpha[inside].tolist(),
    )
