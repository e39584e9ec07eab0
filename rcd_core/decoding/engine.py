"""The engine (Algorithm 2 of arXiv 2601.22954v2 for many requests at once). A step reads through four files: engine.py
schedules, model_runner.py runs the passes, sampler.py turns hidden states into tokens and commits, residual_state.py
keeps what feeds the next pass.

Requests at different places in their decoding share each forward pass. They join and leave between passes, and what
else runs does not change a request's result.

Shapes: N masked positions that a step predicts, D width.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.cache import Slots
from rcd_core.decoding.generation import Step
from rcd_core.decoding.logprobs import keep_logprobs
from rcd_core.decoding.model_runner import ModelRunner, group_rows
from rcd_core.decoding.not_finite import describe_not_finite
from rcd_core.decoding.observer import Observed, Observer
from rcd_core.decoding.policies import Bools
from rcd_core.decoding.reference import AsyncReference, Reference, WarmStart
from rcd_core.decoding.residual_state import dirichlet_signals
from rcd_core.decoding.sampler import choose_commits
from rcd_core.decoding.sequence import MaskedPositions, PassRow, Positions, Sequence
from rcd_core.decoding.statistics import Statistics
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import Signals

Floats = NDArray[np.float32]


class QueueFull(RuntimeError):
    """As many requests are waiting as max_queue allows."""


class Engine:
    """Advances a changing set of requests, one pass per step.

    max_batch: maximum number of requests in progress, each with a cache slot of max_length positions
    (cache.bytes_per_position gives the memory). max_queue: maximum number of waiting requests. prefill_chunk: maximum
    number of prompt tokens in one pass, so that a long prompt does not hold up the others. reuse_prefixes: SDAR
    requests take the first blocks of their prompt from the cache if it has them; this changes the number of prefill
    passes, not the text. fixed_shapes: passes over cached blocks are padded to a small set of shapes and captured as
    CUDA graphs (None: on GPUs only). observer: called after every denoising step; disables fixed shapes.
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
        self.model, self.reference, self.observer = model, reference, observer
        self.max_batch, self.max_length, self.max_queue = max_batch, max_length, max_queue
        self.prefill_chunk, self.reuse_prefixes = prefill_chunk, reuse_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.statistics = Statistics()
        fixed = model.device.type == "cuda" if fixed_shapes is None else fixed_shapes
        self._runner = ModelRunner(model, max_batch, max_length, fixed, self.statistics)
        self._state = self._runner.state
        self._slots = Slots(max_batch)
        self._failure: str | None = None  # of this step; one diagnosis serves all requests that fail in it
        self._pending: dict[Sequence, tuple[WarmStart, Future[Signals | None]]] = {}  # wait for a remote reference

    def add(self, sequence: Sequence) -> None:
        """Queue a request; it runs from the next step on. Raises QueueFull, and UserError if it is too long."""
        if len(sequence.canvas) > self.max_length:
            raise UserError(
                f"the request needs {len(sequence.canvas)} positions, the engine's slots have {self.max_length}; lower "
                "max_new_tokens, shorten the prompt, or raise the engine's max_length"
            )
        if self.max_queue is not None and len(self.waiting) >= self.max_queue + len(self._slots.free):
            raise QueueFull(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Drop a request, waiting or running. Call it between steps; its slot is free for the next one."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._pending.pop(sequence, None)
            self._slots.release(sequence.slot)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One pass of every running request that is not waiting for a remote reference. Returns the finished requests.

        A request whose predictions are not finite fails: it is finished and has an `error`. The others go on.
        """
        while self.waiting and self._slots.free:
            self._admit(self.waiting.popleft())
        self._start_blocks()
        sequences = [s for s in self.running if s not in self._pending and not s.finished]
        rows = [s.next_pass(self.prefill_chunk) for s in sequences]
        batches = group_rows(rows, self._runner.forward.spare_tokens)
        masked = MaskedPositions.of([sequences[i] for b in batches for i in b if rows[i].kind == "denoise"])
        observed = self.observer is not None
        alpha = self._state.input_alpha(masked, observed)
        needs_hidden = observed or any(s.num_logprobs is not None for s in masked.sequences)
        predictions, hidden = self._runner.run(sequences, rows, batches, masked, needs_hidden)
        for sequence, row in zip(sequences, rows, strict=True):
            self._pass_done(sequence, row)
        if masked.sequences:
            self._commit(masked, predictions, alpha, hidden)
            self._state.apply_block_rules(masked.sequences)
        return self._retire()

    def _admit(self, s: Sequence) -> None:
        num_shared = s.block[0] if self.reuse_prefixes and s.shares_prefix else 0
        s.slot, source, reused = self._slots.take(s.canvas, s.settings.block_length, num_shared)
        if reused and source != s.slot:
            self._runner.forward.cache.copy(source, s.slot, reused)
        s.stored = reused
        if s.settings.residual and self._state.reserve(max(s.settings.block_length, s.widest_scope)):
            self._runner.graphs.clear()
        self.statistics.reused_tokens += reused
        chunks = [-(-n // max(1, self.prefill_chunk)) for n in (s.block[0], s.block[0] - reused)]
        self.statistics.reused_prefills += chunks[0] - chunks[1]
        self.running.append(s)

    # -- the first residual of a block
    def _start_blocks(self) -> None:
        """Supply the first residual if the next pass denoises a new block, or each residual if the reference gives
        them all. A start from "self" takes a pass of its own (Sequence.is_start_pass)."""
        to_ask: list[Sequence] = []
        for s in self.running:
            if s in self._pending or not s.settings.residual or s.block_done:
                continue
            if s.next_pass(self.prefill_chunk).kind != "denoise":
                continue
            every_pass = s.settings.residual_source == "reference"
            if every_pass or (not s.started and s.settings.start == "reference"):
                to_ask.append(s)
            elif not s.started and s.settings.start == "dirichlet":
                self._state.start_block(s, s.masked_positions, dirichlet_signals(s))
            s.started |= every_pass or s.settings.start != "self"
        if to_ask and self.reference is not None:
            self._ask_reference(self.reference, to_ask)
        self._collect_answers()

    def _ask_reference(self, reference: Reference | AsyncReference, sequences: list[Sequence]) -> None:
        requests = [
            WarmStart.of(s, s.masked_positions, s.settings.residual_top_k, s.slot, **s.settings.temperatures)
            for s in sequences
        ]
        if isinstance(reference, AsyncReference):
            self._pending.update(zip(sequences, zip(requests, reference.submit(requests), strict=True), strict=True))
            return
        begun = time.perf_counter()
        try:
            answers = list(reference.signals(requests))
        except UserError as error:  # its predictions are not finite: ask for each request alone
            if len(sequences) == 1:
                sequences[0].fail(f"the reference failed: {error}")
                return
            for s in sequences:
                self._ask_reference(reference, [s])
            return
        for s, request, signals in zip(sequences, requests, answers, strict=True):
            self._warm_start(s, request, signals)
        self.statistics.add("reference", len(requests), time.perf_counter() - begun)

    def _collect_answers(self) -> None:
        if self._pending and len(self._pending) == len(self.running):  # no request has anything else to do
            wait([future for _, future in self._pending.values()], return_when=FIRST_COMPLETED)
        for s in [s for s, (_, future) in self._pending.items() if future.done()]:
            request, future = self._pending.pop(s)
            self._warm_start(s, request, future.result())

    def _warm_start(self, s: Sequence, request: WarmStart, signals: Signals | None) -> None:
        if signals is None:
            s.reference_failures += 1
        else:
            s.forwards.reference += 1
            self._state.start_block(s, np.asarray(request.positions), signals)

    # -- after the passes
    def _pass_done(self, s: Sequence, row: PassRow) -> None:
        exact = row.slot is not None and s.settings.cache == "block"
        if exact and row.kind == "denoise" and row.start < s.block[0]:
            self.statistics.merged_stores += s.block_index > 0
        s.pass_done(row)
        if exact:
            self._slots.prefixes[s.slot].stored = s.stored

    def _commit(
        self,
        masked: MaskedPositions,
        predictions: Floats,
        alpha: Floats,
        hidden: Tensor | None,
    ) -> None:
        """Write the tokens that each request's policy commits. predictions: (3, N) tokens, confidence, entropy."""
        tokens, confidence, entropy = predictions[0].astype(np.int64), predictions[1], predictions[2]
        commit = choose_commits(self.model, masked, confidence, entropy)
        if self.observer is not None and hidden is not None:
            has_residual = masked.per_request(lambda s: s.has_residual) > 0
            commits = masked.per_request(lambda s: not s.is_start_pass) > 0
            self.observer(Observed(masked, hidden, alpha, has_residual, commit & commits))
        if hidden is not None:
            keep_logprobs(masked, commit, tokens, hidden)
        committed, new_tokens, still_masked = masked.positions[commit], tokens[commit], masked.positions[~commit]
        num_committed = np.concatenate([[0], commit.cumsum()])
        for s, part in zip(masked.sequences, masked.slices(), strict=True):
            first, last = int(num_committed[part.start]), int(num_committed[part.stop])
            stuck = first == last and not (s.is_start_pass or s.block_done)
            if stuck or not np.isfinite(confidence[part]).all():
                s.fail(self._failure or describe_not_finite(s))
                self._failure = s.error
                continue
            step = None
            if s.settings.trace:
                step = _trace(s, tokens[part], confidence[part], entropy[part], commit[part], alpha[part])
            remaining = still_masked[part.start - first : part.stop - last]
            s.apply_commits(committed[first:last], new_tokens[first:last], remaining, step)

    def _retire(self) -> list[Sequence]:
        finished = [s for s in self.running if s.finished]
        self.running = [s for s in self.running if not s.finished]
        for s in finished:
            self._slots.release(s.slot)
            if s.error is None:
                self.statistics.finished(s.output())
            else:  # its keys and values may be NaN
                self._slots.prefixes[s.slot].stored = 0
                self._runner.forward.cache.clear(s.slot)
        self._failure = None
        return finished


def _trace(s: Sequence, tokens: Positions, confidence: Floats, entropy: Floats, commit: Bools, alpha: Floats) -> Step:
    """The step's trace, of the block's positions only. All arrays are (n,), aligned with s.masked_positions."""
    inside = s.masked_positions < s.block[1]
    return Step(
        masked=s.masked_positions[inside].tolist(),
        argmax=tokens[inside].tolist(),
        confidence=confidence[inside].tolist(),
        entropy=entropy[inside].tolist(),
        committed=s.masked_positions[commit].tolist(),
        alpha=alpha[inside].tolist(),
    )
