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

from rcd_core.attention.paged_backends import paged_backend
from rcd_core.decoding.chunk import Positions
from rcd_core.decoding.editing import choose_edits
from rcd_core.decoding.generation import Step
from rcd_core.decoding.logprobs import candidates_of, keep_logprobs
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.model_runner import Forward, ModelRunner, RequestPass, group_requests
from rcd_core.decoding.not_finite import describe_not_finite
from rcd_core.decoding.observer import Observed, Observer
from rcd_core.decoding.pages import PagedCache, page_size_of
from rcd_core.decoding.policies import Bools
from rcd_core.decoding.reference import AsyncReference, Reference, WarmStart
from rcd_core.decoding.residual_state import ResidualState, dirichlet_signals
from rcd_core.decoding.sampler import choose_commits
from rcd_core.decoding.sequence import LiveBlock, Sequence
from rcd_core.decoding.statistics import Statistics
from rcd_core.decoding.tables import Tables
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import Signals

Floats = NDArray[np.floating]


class QueueFull(RuntimeError):
    """As many requests are waiting as max_queue allows."""


class Engine:
    """Advances a changing set of requests, one pass per step.

    max_batch: maximum number of requests in progress. max_length: positions of the longest. max_queue: maximum number
    of waiting requests. prefill_chunk: maximum number of prompt tokens of a request in one pass, so that a long prompt
    does not hold up the others. reuse_prefixes: SDAR requests take the first blocks of their prompt from the cache if
    it has them; this changes the number of prefill passes, not the text.
    num_pages: pages of the cache (pages.py). A request takes pages as it grows; if none is left, the youngest request
    gives up its own and decodes its block again later. None: as many as max_batch requests of max_length need, and each
    request has neighbouring pages.
    attention: backend of decoding (attention/paged_backends.py); None: the model's.
    fixed_shapes: passes over blocks are padded to a small set of shapes and captured as CUDA graphs (None: on GPUs,
    where the attention backend can be captured).
    observer: called after every denoising step.
    Where deterministic algorithms are asked for (process.py), one request is decoded at a time, without captured passes
    and reused prefixes, so that its result is the same bit for bit whatever else runs.
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
        num_pages: int | None = None,
        attention: str | None = None,
        fixed_shapes: bool | None = None,
        observer: Observer | None = None,
    ) -> None:
        if torch.are_deterministic_algorithms_enabled():
            # The rounding of a row depends on the shape of its pass, and so on what else runs and what ran before.
            max_batch, reuse_prefixes, fixed_shapes = 1, False, False
        self.model, self.reference, self.observer = model, reference, observer
        self.max_batch, self.max_length, self.max_queue = max_batch, max_length, max_queue
        self.prefill_chunk, self.reuse_prefixes = prefill_chunk, reuse_prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.statistics = Statistics()
        page_size = page_size_of(model.device)
        backend = paged_backend(attention or model.attention, model.config, model.dtype, model.device, page_size)
        if backend.needs_lanes and num_pages is not None:
            raise UserError(
                f"num_pages is set but attention {backend.name!r} reads neighbouring pages only; leave it out"
            )
        self.tables = Tables(max_batch, max_length, page_size, num_pages)
        cache = PagedCache(model, self.tables.num_pages, page_size)
        forward = Forward(model, cache, self.tables, max_length, backend, ResidualState(model, max_batch))
        on_gpu = model.device.type == "cuda" and backend.on_device
        self._runner = ModelRunner(forward, on_gpu if fixed_shapes is None else fixed_shapes, self.statistics)
        self._state = forward.state
        self._failure: str | None = None  # of this step; one diagnosis serves all requests that fail in it
        self._pending: dict[LiveBlock, tuple[WarmStart, Future[Signals | None]]] = {}  # wait for a remote reference

    def add(self, sequence: Sequence) -> None:
        """Queue a request; it runs from the next step on. Raises QueueFull, and UserError if it is too long."""
        positions = min(self.max_length, self.tables.num_pages * self.tables.page_size)
        if len(sequence.canvas) > positions:
            raise UserError(
                f"the request needs {len(sequence.canvas)} positions, the engine has {positions} for a request; lower "
                "max_new_tokens, shorten the prompt, or raise the engine's max_length"
            )
        if self.max_queue is not None and len(self.waiting) >= self.max_queue + self.tables.num_free_slots:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Drop a request, waiting or running. Call it between steps; its pages are free for the next one."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._stop(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One pass of every running request that is not waiting for a remote reference. Returns the finished requests.

        A request whose predictions are not finite fails: it is finished and has an `error`. The others go on.
        """
        self._admit()
        self._start_blocks()
        passes = group_requests(self._choose_rows(), self._runner.fixed_shapes)
        requests = [request for group in passes for request in group]
        masked = MaskedPositions.of([b for r in requests if r.kind == "denoise" for b in r.sequence.live])
        observed = self.observer is not None
        alpha = self._state.input_alpha(masked, observed)
        asked = (b.sequence.num_candidates or b.sequence.num_logprobs is not None for b in masked.blocks)
        needs_hidden = observed or any(asked)
        predictions, hidden = self._runner.run(passes, masked, needs_hidden)
        self._passes_done(requests)
        if masked.blocks:
            self._commit(masked, predictions, alpha, hidden)
            self._state.apply_block_rules(masked.blocks)
        return self._retire()

    # -- requests and their pages
    def _admit(self) -> None:
        while self.waiting and self.tables.num_free_slots:
            s = self.waiting[0]
            taken = self.tables.open(s, s.most_reused if self.reuse_prefixes else 0, self._runner.forward.cache)
            if taken is None:
                return
            self.waiting.popleft()
            self.running.append(s)
            s.stored, s.kind = taken, self._runner.sampler.kind_of(s)
            if s.settings.residual and self._state.reserve(max(s.settings.block_length, s.widest_scope), self.running):
                self._runner.graphs.clear()
            self.statistics.reused_tokens += taken
            passes = [s.num_prefills(n, self.prefill_chunk) for n in (s.block[0], s.block[0] - taken)]
            self.statistics.reused_prefills += passes[0] - passes[1]

    def _choose_rows(self) -> list[RequestPass]:
        """The chunks of every request that can run, with pages for all of their tokens."""
        chosen: list[RequestPass] = []
        waits = {block.sequence for block in self._pending}
        page_size = self.tables.page_size
        for s in list(self.running):
            if s.slot < 0 or s.finished or (waits and s in waits):  # without a slot: preempted for an earlier one
                continue
            kind, chunks = s.next_pass(self.prefill_chunk)
            while chunks[-1].num_keys > len(s.pages) * page_size and not self.tables.grow(s, chunks[-1].num_keys):
                victim = next(v for v in reversed(self.running) if not v.finished)
                self._preempt(victim)
                chosen = [r for r in chosen if r.sequence is not victim]
                if victim is s:
                    break
            else:
                num_tokens = len(chunks[0].token_ids)
                for chunk in chunks[1:]:
                    num_tokens += len(chunk.token_ids)
                chosen.append(RequestPass(s, kind, chunks, num_tokens, s.num_masked if kind == "denoise" else 0))
        return chosen

    def _preempt(self, s: Sequence) -> None:
        """Take a request's pages. It waits at the head of the queue, and starts its block again: with the same result,
        because everything before the block is final and everything in it is keyed by position and pass."""
        self._stop(s)
        s.restart()
        self.waiting.appendleft(s)
        self.statistics.preempted += 1

    def _stop(self, s: Sequence) -> None:
        self.running.remove(s)
        for block in s.live:
            self._pending.pop(block, None)
        self.tables.close(s)

    # -- the first residual of a block
    def _start_blocks(self) -> None:
        """Supply the first residual if the next pass denoises a new block, or each residual if the reference gives
        them all. A start from "self" takes a pass of its own (LiveBlock.is_start_pass)."""
        to_ask: list[LiveBlock] = []
        for s in self.running:
            if not s.settings.residual or s.next_pass(self.prefill_chunk)[0] != "denoise":
                continue
            for block in s.live:
                if block in self._pending or block.done or block.next_token:
                    continue
                every_pass = s.settings.residual_source == "reference"
                if every_pass or (not block.started and s.settings.start == "reference"):
                    to_ask.append(block)
                elif not block.started and s.settings.start == "dirichlet":
                    self._state.start_block(block, block.masked_positions, dirichlet_signals(block))
                block.started |= every_pass or s.settings.start != "self"
        if to_ask and self.reference is not None:
            self._ask_reference(self.reference, to_ask)
        self._collect_answers()

    def _ask_reference(self, reference: Reference | AsyncReference, blocks: list[LiveBlock]) -> None:
        requests = [
            WarmStart.of(b, b.masked_positions, b.settings.residual_top_k, b.sequence.slot, **b.settings.temperatures)
            for b in blocks
        ]
        if isinstance(reference, AsyncReference):
            self._pending.update(zip(blocks, zip(requests, reference.submit(requests), strict=True), strict=True))
            return
        begun = time.perf_counter()
        try:
            answers = list(reference.signals(requests))
        except UserError as error:  # its predictions are not finite: ask for each block alone
            if len(blocks) == 1:
                blocks[0].sequence.fail(f"the reference failed: {error}")
                return
            for block in blocks:
                self._ask_reference(reference, [block])
            return
        for block, request, signals in zip(blocks, requests, answers, strict=True):
            self._warm_start(block, request, signals)
        self.statistics.add("reference", len(requests), time.perf_counter() - begun)

    def _collect_answers(self) -> None:
        if not self._pending:
            return
        blocks, futures = list(self._pending), [future for _, future in self._pending.values()]
        ranks = self.model.ranks
        if ranks.rank == 0 and len({b.sequence for b in blocks}) == len(self.running):  # nothing else to do
            wait(futures, return_when=FIRST_COMPLETED)
        for i, signals in ranks.share([(i, future.result()) for i, future in enumerate(futures) if future.done()]):
            request, _ = self._pending.pop(blocks[i])
            self._warm_start(blocks[i], request, signals)

    def _warm_start(self, block: LiveBlock, request: WarmStart, signals: Signals | None) -> None:
        if signals is None:
            block.sequence.reference_failures += 1
        else:
            block.sequence.forwards.reference += 1
            self._state.start_block(block, np.asarray(request.positions), signals)

    # -- after the passes
    def _passes_done(self, requests: list[RequestPass]) -> None:
        for s, kind, chunks, *_ in requests:
            block = s.live[0]
            if kind == "denoise" and s.stored < block.start and s.settings.cache == "block":
                self.statistics.merged_stores += block.index > 0
            s.pass_done(kind, chunks[-1].end)
            if self.reuse_prefixes and s.shares_prefix:
                self.tables.register(s)

    def _commit(self, masked: MaskedPositions, predictions: Floats, alpha: Floats, hidden: Tensor | None) -> None:
        """Write the tokens that each request's policy commits. predictions: (NUM_RESULTS, N), see sampler.py."""
        tokens, confidence, entropy = predictions[0].astype(np.int64), predictions[1], predictions[2]
        commit = choose_commits(masked, confidence, entropy, predictions[3])
        if masked.filled is not None:
            commit |= choose_edits(masked, masked.filled, tokens, confidence)
        if self.observer is not None and hidden is not None:
            has_residual = masked.per_block(lambda b: b.has_residual) > 0
            commits = masked.per_block(lambda b: not b.is_start_pass) > 0
            self.observer(Observed(masked, hidden, alpha, has_residual, commit & commits))
        candidates: list[list[tuple[int, float]]] = []
        if hidden is not None:
            keep_logprobs(masked, commit, tokens, hidden)
            candidates = candidates_of(masked, hidden)
        committed, new_tokens, still_masked = masked.positions[commit], tokens[commit], masked.positions[~commit]
        finite = np.isfinite(confidence)
        all_finite = bool(finite.all())
        start = first = 0  # of the block's positions, and among those that are committed
        ends, lasts = masked.ends.tolist(), np.concatenate([[0], commit.cumsum()])[masked.ends].tolist()
        for block, end, last in zip(masked.blocks, ends, lasts, strict=True):
            s, part = block.sequence, slice(start, end)
            new, left = slice(first, last), slice(start - first, end - last)
            stuck = first == last and block.must_commit
            start, first = end, last
            if stuck or not (all_finite or finite[part].all()):
                s.fail(self._failure or describe_not_finite(block))
                self._failure = s.error
                continue
            step = None
            if s.settings.trace:
                several = candidates[part] if s.num_candidates else []
                step = _trace(block, tokens[part], confidence[part], entropy[part], commit[part], alpha[part], several)
            s.apply_commits(block, committed[new], new_tokens[new], still_masked[left], step)

    def _retire(self) -> list[Sequence]:
        finished = [s for s in self.running if s.finished]
        for s in finished:
            if s.error is not None:  # its keys and values may be NaN
                self._runner.forward.cache.clear(self.tables.forget(s))
            self._stop(s)
            if s.error is None:
                self.statistics.finished(s.output())
        self._failure = None
        return finished


def _trace(
    block: LiveBlock,
    tokens: Positions,
    confidence: Floats,
    entropy: Floats,
    commit: Bools,
    alpha: Floats,
    candidates: list[list[tuple[int, float]]],
) -> Step:
    """The step's trace, of the block's positions only. All arrays are (n,), aligned with block.predicted; candidates
    too, unless the request has not asked for them."""
    positions, s = block.predicted, block.sequence
    inside, held = positions < block.end, s.canvas[positions] != s.mask_token_id
    return Step(
        masked=positions[inside].tolist(),
        argmax=tokens[inside].tolist(),
        confidence=confidence[inside].tolist(),
        entropy=entropy[inside].tolist(),
        committed=positions[commit].tolist(),
        alpha=alpha[inside].tolist(),
        edited=positions[commit & held].tolist(),
        candidates=[top for top, kept in zip(candidates, inside, strict=bool(candidates)) if kept],
    )
