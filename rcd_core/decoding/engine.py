"""The engine: requests at different places in their decoding share each forward pass.

One step = starts of new blocks, then one pass per request, batched by kind and length. A request is retired as soon as
it is done. Residuals (Algorithm 2 of arXiv 2601.22954v2) are state of the request, set after each pass from the
predictions of the positions that stay masked.

Shapes: R requests of a pass, Q queries, N masked positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.attention import block_causal_mask
from rcd_core.decoding.cache import SlotCache
from rcd_core.decoding.policies import POLICIES, BlockView
from rcd_core.decoding.reference import LocalReference, Reference, WarmStart
from rcd_core.decoding.sampling import SamplingColumns, choose_tokens
from rcd_core.decoding.sequence import Generation, Pass, Residual, Sequence, Step, make_sequence
from rcd_core.decoding.settings import DecodeSettings
from rcd_core.families import DiffusionModel
from rcd_core.noise import hash_key, uniforms
from rcd_core.residual import entropy, inject_residual
from rcd_core.signals import DenseSignals, ReferenceSignals, Signals, residual_state

_TILE_BYTES = 64 << 20  # fp32 logits held at once
_PADDING_SHARE = 0.75  # requests share a pass if the shorter has at least this share of the longer's queries
Job = tuple[Sequence, Pass]


class Engine:
    """Steps a changing set of requests. `max_length`: longest canvas it has cache for."""

    def __init__(
        self, model: DiffusionModel, reference: Reference | None, *, max_batch: int, max_length: int
    ) -> None:
        self.model = model
        self.reference = reference
        self.max_length = max_length
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_slots = list(range(max_batch))
        self._cache: SlotCache | None = None
        self._max_batch = max_batch

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Every running request makes one pass. Returns those that finished."""
        while self.waiting and self.free_slots:
            sequence = self.waiting.popleft()
            sequence.slot = self.free_slots.pop(0)
            self.running.append(sequence)
        self._start_blocks()
        for group in _groups([(s, s.next_pass()) for s in self.running]):
            self._run(group)
        done = [s for s in self.running if s.finished]
        self.running = [s for s in self.running if not s.finished]
        self.free_slots = sorted(self.free_slots + [s.slot for s in done])
        return done

    # -- the first residual of a block (method.md 6)
    def _start_blocks(self) -> None:
        warm: list[Sequence] = []
        for s in self.running:
            if not s.settings.residual or s.block_done or s.next_pass().kind != "denoise":
                continue
            if s.settings.residual_source == "reference" or (not s.started and s.settings.start == "reference"):
                warm.append(s)
            elif not s.started and s.settings.start == "dirichlet":
                self._set_residual(s, s.masked_positions(s.scope_end), self._dirichlet(s))
            if s.settings.start != "self" or s.settings.residual_source == "reference":
                s.started = True
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
            **_temperatures(s.settings),
        )

    def _dirichlet(self, s: Sequence) -> DenseSignals:
        """p ~ Dirichlet(1, ..., 1): normalised exponentials, keyed by seed and position."""
        positions = s.masked_positions(s.scope_end)
        draws = [uniforms(hash_key("dirichlet", s.settings.seed or 0, int(p)), self.model.vocab_size) for p in positions]
        exponentials = -np.log1p(-np.stack(draws))
        logits = torch.from_numpy(np.log(np.maximum(exponentials, 1e-30))).float().to(self.model.device)
        return DenseSignals(logits, **_temperatures(s.settings))

    def _set_residual(self, s: Sequence, positions: NDArray[np.int64], signals: Signals) -> None:
        assert s.settings.alpha is not None
        if isinstance(signals, ReferenceSignals):
            signals = signals.to(self.model.device)
        alpha, delta = residual_state(signals, self.model.embedding.weight, s.settings.alpha, s.settings.alpha_scale)
        s.residual = Residual(positions, alpha, delta)

    # -- one pass
    def _run(self, group: list[Job]) -> None:
        hidden = self._forward(group)
        denoising = [(row, s) for row, (s, p) in enumerate(group) if p.kind == "denoise"]
        for s, p in group:
            setattr(s.forwards, p.kind, getattr(s.forwards, p.kind) + 1)
            if p.kind != "denoise":
                s.stored = p.end
                if s.block_done:
                    s.advance()
            elif p.cached and not self.model.blocks_from_prompt_end:
                s.stored = s.block[0]
        if not denoising:
            return
        reached = [s.masked_positions(s.scope_end) for _, s in denoising]
        rows = np.repeat([row for row, _ in denoising], [len(p) for p in reached])
        columns = np.concatenate([p - group[row][1].start for (row, _), p in zip(denoising, reached, strict=True)])
        if not len(rows):  # only passes that commit nothing (compat_passes)
            for _, s in denoising:
                s.empty_pass_due = False
                s.advance()
            return
        picked = hidden[torch.from_numpy(rows), torch.from_numpy(columns)]
        guided = [s for _, s in denoising if s.settings.cfg_scale]
        unconditional = None
        if guided:
            bare = self._forward(group, without_prompt=True)
            unconditional = bare[torch.from_numpy(rows), torch.from_numpy(columns)]
        self._predict([s for _, s in denoising], reached, picked, unconditional)

    def _forward(self, group: list[Job], without_prompt: bool = False) -> Tensor:
        """(R, Q, D) hidden states of one batched pass; shorter rows are padded at the end."""
        model, device = self.model, self.model.device
        width = max(p.end - p.start for _, p in group)
        num_keys = max(p.num_keys for _, p in group)
        ids = np.full((len(group), width), model.info.pad_token_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        residual_at = np.zeros(ids.shape, dtype=bool)
        states: list[Residual] = []
        cache_positions = np.full_like(ids, self.max_length)  # padding writes into the slot's bin
        for row, (s, p) in enumerate(group):
            n = p.end - p.start
            ids[row, :n] = s.canvas[p.start : p.end]
            if without_prompt and p.start < s.num_prompt:
                ids[row, : s.num_prompt - p.start] = model.mask_token_id
            positions[row] = np.minimum(np.arange(p.start, p.start + width), p.end - 1)
            cache_positions[row, :n] = positions[row, :n]
            if p.kind == "denoise" and s.residual is not None:
                residual_at[row, s.residual.positions - p.start] = True
                states.append(s.residual)
        embeds = model.embedding(torch.from_numpy(ids).to(device))
        if states:
            alpha, delta = torch.cat([r.alpha for r in states]), torch.cat([r.delta for r in states])
            at = torch.from_numpy(residual_at).to(device)
            embeds = inject_residual(embeds, at, alpha, delta, model.embedding.weight[model.mask_token_id])
        at_positions = torch.from_numpy(positions).to(device)
        lengths = torch.tensor([p.num_keys for _, p in group], device=device)
        layout = self._layout(group, at_positions, lengths, num_keys)
        view = None
        if group[0][1].cached:
            if self._cache is None:
                self._cache = SlotCache(model, self._max_batch, self.max_length)
            slots = torch.tensor([s.slot for s, _ in group], device=device)
            view = self._cache.view(slots, torch.from_numpy(cache_positions).to(device), num_keys)
        return model.hidden(embeds, at_positions, layout, view)

    def _layout(self, group: list[Job], positions: Tensor, lengths: Tensor, num_keys: int) -> Tensor:
        block_lengths = [s.settings.block_length or 0 for s, _ in group]
        if self.model.attention_block(1) is None:
            return block_causal_mask(positions, lengths, num_keys, None)
        masks = [
            block_causal_mask(positions[i : i + 1], lengths[i : i + 1], num_keys, b) for i, b in enumerate(block_lengths)
        ] if len(set(block_lengths)) > 1 else [block_causal_mask(positions, lengths, num_keys, block_lengths[0])]
        return torch.cat(masks)

    # -- from hidden states to commits and residuals
    def _predict(
        self, sequences: list[Sequence], reached: list[NDArray[np.int64]], hidden: Tensor, unconditional: Tensor | None
    ) -> None:
        counts = [len(p) for p in reached]
        owner = np.repeat(np.arange(len(sequences)), counts)
        columns = self._sampling_columns(sequences, reached)
        scale = None
        if unconditional is not None:
            scale = torch.tensor([s.settings.cfg_scale for s in sequences], device=hidden.device)[torch.from_numpy(owner)]
        feeds = np.array([s.settings.residual and s.settings.residual_source == "self" for s in sequences])[owner]
        kinds = [_residual_kind(s.settings) for s in sequences]
        tokens, confidences, entropies = [], [], []
        alpha = torch.zeros(len(owner), device=hidden.device)
        delta = torch.zeros(len(owner) if feeds.any() else 0, hidden.shape[1], device=hidden.device, dtype=hidden.dtype)
        tile = max(1, _TILE_BYTES // (4 * self.model.vocab_size))
        for start in range(0, len(owner), tile):
            stop = min(start + tile, len(owner))
            logits = self.model.head(hidden[start:stop]).float()
            if unconditional is not None and scale is not None:
                plain = self.model.head(unconditional[start:stop]).float()
                # scale 0 is no guidance at all: (0 + 1) * (z - u) + u would differ from z by rounding.
                factor = scale[start:stop, None]
                logits = torch.where(factor > 0, plain + (factor + 1) * (logits - plain), logits)
            t, c = choose_tokens(
                logits, columns[start:stop], self.model.mask_token_id, not self.model.blocks_from_prompt_end
            )
            tokens.append(t)
            confidences.append(c)
            entropies.append(entropy(logits))
            for kind in {kinds[i] for i in owner[start:stop][feeds[start:stop]]}:
                chosen = np.array([kinds[i] == kind for i in owner[start:stop]]) & feeds[start:stop]
                index = torch.from_numpy(np.flatnonzero(chosen)).to(hidden.device)
                signals = _signals(logits[index], sequences[owner[start + int(np.flatnonzero(chosen)[0])]].settings)
                rule, alpha_scale = kind[0], kind[1]
                a, d = residual_state(signals, self.model.embedding.weight, rule, alpha_scale)
                alpha[start + index], delta[start + index] = a.to(alpha.dtype), d.to(delta.dtype)
        found = (torch.cat(tokens).cpu().numpy(), torch.cat(confidences).cpu().numpy(), torch.cat(entropies).cpu().numpy())
        ends = np.cumsum(counts)
        rows = [slice(int(e) - n, int(e)) for e, n in zip(ends, counts, strict=True)]
        commits = self._select(sequences, reached, rows, found)
        for s, positions, row, commit in zip(sequences, reached, rows, commits, strict=True):
            new = (alpha[row], delta[row]) if s.settings.residual and s.settings.residual_source == "self" else None
            self._apply(s, positions, found[0][row], found[1][row], commit, new)

    def _sampling_columns(self, sequences: list[Sequence], reached: list[NDArray[np.int64]]) -> SamplingColumns:
        counts = [len(p) for p in reached]
        uniform = np.zeros(sum(counts))
        offset = 0
        for s, positions in zip(sequences, reached, strict=True):
            if s.settings.temperature > 0:
                drawn = [uniforms(hash_key(s.settings.seed or 0, int(p), s.step), 1)[0] for p in positions]
                uniform[offset : offset + len(positions)] = drawn
            offset += len(positions)

        def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(np.repeat(list(values), counts), dtype=dtype, device=self.model.device)

        return SamplingColumns(
            temperature=column((s.settings.temperature for s in sequences), torch.float32),
            top_k=column((s.settings.top_k or self.model.vocab_size for s in sequences), torch.int64),
            top_p=column((s.settings.top_p or 1.0 for s in sequences), torch.float32),
            uniform=torch.from_numpy(uniform).to(self.model.device),
        )

    def _select(
        self,
        sequences: list[Sequence],
        reached: list[NDArray[np.int64]],
        rows: list[slice],
        found: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]],
    ) -> list[NDArray[np.bool_]]:
        """Per request a (count,) choice among its reached positions, by its own policy."""
        width = max(s.block[1] - s.block[0] for s in sequences)
        shape = (len(sequences), width)
        masked, confidence, certainty = np.zeros(shape, dtype=bool), np.zeros(shape), np.zeros(shape)
        inside = [p < s.block[1] for s, p in zip(sequences, reached, strict=True)]
        offsets = [p[i] - s.block[0] for s, p, i in zip(sequences, reached, inside, strict=True)]
        for i, row in enumerate(rows):
            masked[i, offsets[i]] = True
            confidence[i, offsets[i]] = found[1][row][inside[i]]
            certainty[i, offsets[i]] = found[2][row][inside[i]]
        chosen = np.zeros(shape, dtype=bool)
        for policy in {s.settings.policy for s in sequences}:
            mine = np.array([s.settings.policy == policy for s in sequences])
            view = BlockView(
                masked[mine],
                confidence[mine],
                certainty[mine],
                np.array([s.quota() for s in sequences])[mine],
                np.array([s.settings.confidence_threshold for s in sequences])[mine],
                np.array([s.settings.entropy_bound or 0.0 for s in sequences])[mine],
                self.model.threshold_inclusive,
            )
            chosen[mine] = POLICIES[policy](view)
        commits = []
        for i, positions in enumerate(reached):
            commit = np.zeros(len(positions), dtype=bool)
            commit[inside[i]] = chosen[i, offsets[i]]
            commits.append(commit)
        return commits

    def _apply(
        self,
        s: Sequence,
        positions: NDArray[np.int64],
        tokens: NDArray[np.int64],
        confidence: NDArray[np.float32],
        commit: NDArray[np.bool_],
        new_residual: tuple[Tensor, Tensor] | None,
    ) -> None:
        probing = s.settings.residual and not s.started  # start "self": this pass only supplies the residual
        if s.empty_pass_due:
            s.empty_pass_due = False
            s.advance()
            return
        if probing:
            commit = np.zeros_like(commit)
            s.started = True
        elif s.settings.trace:
            inside = positions < s.block[1]
            used = np.zeros(len(positions))
            if s.residual is not None:
                used = s.residual.alpha.float().cpu().numpy()
            s.steps.append(
                Step(
                    masked=positions[inside].tolist(),
                    argmax=tokens[inside].tolist(),
                    confidence=confidence[inside].tolist(),
                    committed=positions[commit].tolist(),
                    alpha=used[inside].tolist(),
                )
            )
        s.canvas[positions[commit]] = tokens[commit]
        if new_residual is not None:
            index = torch.from_numpy(np.flatnonzero(~commit)).to(self.model.device)
            s.residual = Residual(positions, *new_residual).keep(~commit, index)
        elif s.residual is not None:
            index = torch.from_numpy(np.flatnonzero(~commit)).to(self.model.device)
            s.residual = s.residual.keep(~commit, index)
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


def _temperatures(settings: DecodeSettings) -> dict[str, float]:
    t = settings.residual_temperature
    return {"alpha_temperature": t, "delta_temperature": t if settings.delta_temperature == "residual" else 1.0}


def _residual_kind(settings: DecodeSettings) -> tuple[object, ...]:
    """Requests alike in this may share one computation of (alpha, delta)."""
    return (settings.alpha, settings.alpha_scale, *_temperatures(settings).values(), settings.residual_top_k)


def _signals(logits: Tensor, settings: DecodeSettings) -> Signals:
    if settings.residual_top_k is None:
        return DenseSignals(logits, **_temperatures(settings))
    return ReferenceSignals.from_logits(logits, settings.residual_top_k, **_temperatures(settings))


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


class Decoder:
    """Decodes prompts or fills canvases with a target and, for warm starts, a reference (model or remote)."""

    def __init__(
        self,
        model: DiffusionModel,
        reference: DiffusionModel | Reference | None = None,
        *,
        max_batch: int = 256,
    ) -> None:
        self.model = model
        self.reference = LocalReference(reference) if isinstance(reference, DiffusionModel) else reference
        self.max_batch = max_batch

    def generate(
        self, prompts: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None = None
    ) -> list[Generation]:
        """Continue each prompt (token ids). One DecodeSettings for all, or one per prompt."""
        return self._decode(prompts, settings, infill=False)

    def infill(
        self, canvases: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None = None
    ) -> list[Generation]:
        """Replace every mask token of each canvas, wherever it stands, and change nothing else."""
        return self._decode(canvases, settings, infill=True)

    def check(self, ids: Many[int], settings: DecodeSettings, *, infill: bool = False) -> Sequence:
        """The request as the engine would take it; raises UserError for one it would refuse."""
        return make_sequence(self.model, list(ids), settings, infill=infill, has_reference=self.reference is not None)

    def _decode(
        self, inputs: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None, *, infill: bool
    ) -> list[Generation]:
        if settings is None or isinstance(settings, DecodeSettings):
            settings = [settings or DecodeSettings()] * len(inputs)
        sequences = [self.check(ids, s, infill=infill) for ids, s in zip(inputs, settings, strict=True)]
        if not sequences:
            return []
        engine = Engine(
            self.model,
            self.reference,
            max_batch=min(self.max_batch, len(sequences)),
            max_length=max(len(s.canvas) for s in sequences),
        )
        for sequence in sequences:
            engine.add(sequence)
        while engine.busy:
            engine.step()
        return [s.output() for s in sequences]
