"""ReferenceSignals: the sparse form of a reference's predictions, on disk, between replicas and in the training step.

Kept per masked position: the top-k ids and log-probabilities, the exact entropy over the whole vocabulary (alpha needs
the tail's part of it) and the tail's mass. delta is never stored: the embedding table it averages is being trained.

Shapes: N positions, K kept entries, V vocabulary, D width. Padding of unequal K: log-probability -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rcd_core.alpha import LearnedAlpha, alpha_from_statistics, entropy
from rcd_core.decode_settings import AlphaRule
from rcd_core.errors import UserError
from rcd_core.ops.encode import Encoded, encode
from rcd_core.ops.residual_embedding import SparseResidual
from rcd_core.signal_arrow import from_table, to_table

_TILE_BYTES = 64 << 20  # fp32 logits held at once by from_hidden


@dataclass(frozen=True)
class ReferenceSignals:
    """topk_ids (N, K) int32, topk_logprobs (N, K) fp16 at the delta temperature, from the full softmax;
    entropy (N,) fp32 nats at the alpha temperature; tail_mass (N,) fp32, what the kept entries leave out."""

    topk_ids: Tensor
    topk_logprobs: Tensor
    entropy: Tensor
    tail_mass: Tensor
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0

    # -- making
    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        k: int = 32,
        mass: float | None = None,
        *,
        alpha_temperature: float = 1.0,
        delta_temperature: float = 1.0,
    ) -> ReferenceSignals:
        """(N, V) logits of any float dtype; K = min(k, V). -inf is a token of probability 0; NaN, +inf and a row that
        is -inf everywhere raise. mass: of the k entries keep only as many, per position, as reach this probability;
        the others join the tail and leave padding (id 0, log-probability -inf)."""
        _check(logits, "logits", "(positions, vocabulary)", k, mass, alpha_temperature, delta_temperature)
        temperatures = (alpha_temperature, delta_temperature)
        if not len(logits):
            return cls.empty(min(k, logits.shape[1]), *temperatures).to(logits.device)
        with torch.no_grad():
            return cls._from_encoded(
                [encode(logits.detach(), min(k, logits.shape[1]), *temperatures)], mass, *temperatures
            )

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        lm_head_weight: Tensor,
        k: int = 32,
        mass: float | None = None,
        *,
        alpha_temperature: float = 1.0,
        delta_temperature: float = 1.0,
    ) -> ReferenceSignals:
        """(N, D) hidden states, (V, D) head: as from_logits of their product in the head's dtype, of which only a tile
        is held at a time."""
        _check(hidden, "hidden", "(positions, width)", k, mass, alpha_temperature, delta_temperature)
        if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[1]:
            raise UserError(
                f"hidden has shape {tuple(hidden.shape)}, lm_head_weight {tuple(lm_head_weight.shape)}; "
                "(positions, width) and (vocabulary, width) of one width are needed"
            )
        vocab_size, temperatures = lm_head_weight.shape[0], (alpha_temperature, delta_temperature)
        if not len(hidden):
            return cls.empty(min(k, vocab_size), *temperatures).to(hidden.device)
        head, tile = lm_head_weight.detach(), max(1, _TILE_BYTES // (4 * vocab_size))
        with torch.no_grad():
            tiles = torch.split(hidden.detach().to(head.dtype), tile)
            encoded = [encode(rows @ head.T, min(k, vocab_size), *temperatures) for rows in tiles]
            return cls._from_encoded(encoded, mass, *temperatures)

    @classmethod
    def _from_encoded(
        cls, parts: Sequence[Encoded], mass: float | None, alpha_temperature: float, delta_temperature: float
    ) -> ReferenceSignals:
        columns = (torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))
        ids, logprobs, tail, entropies, peak = columns
        if not torch.isfinite(peak).all():
            row = int((~torch.isfinite(peak)).nonzero()[0])
            if peak[row] == -math.inf:
                raise UserError(f"row {row} of the logits is -inf everywhere; at least one token must be possible")
            raise UserError(f"row {row} of the logits holds NaN or +inf; the model's weights or inputs are broken")
        if mass is not None:
            p = logprobs.exp()
            dropped = (p.cumsum(1) - p) >= mass  # those before it suffice already
            dropped[:, 0] = False
            tail = tail + p.masked_fill(~dropped, 0.0).sum(1)
            logprobs = logprobs.masked_fill(dropped, -math.inf)
        kept = logprobs.to(torch.float16)
        return cls(
            topk_ids=ids.to(torch.int32).masked_fill(~torch.isfinite(kept), 0),
            topk_logprobs=kept,
            entropy=entropies,
            tail_mass=tail,
            alpha_temperature=alpha_temperature,
            delta_temperature=delta_temperature,
        )

    @classmethod
    def empty(cls, k: int, alpha_temperature: float = 1.0, delta_temperature: float = 1.0) -> ReferenceSignals:
        return cls(
            torch.zeros(0, k, dtype=torch.int32),
            torch.zeros(0, k, dtype=torch.float16),
            torch.zeros(0),
            torch.zeros(0),
            alpha_temperature,
            delta_temperature,
        )

    # -- use
    def alpha(
        self,
        vocab_size: int,
        rule: AlphaRule = "normalized_entropy",
        alpha_scale: float | None = None,
        *,
        learned: LearnedAlpha | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """(N,) weights in [0, 1], Eq. 3 or another rule; learned and groups as in alpha_from_statistics."""
        confidence = self.topk_logprobs[:, 0].float().exp()
        return alpha_from_statistics(
            rule, self.entropy, confidence, vocab_size, alpha_scale, learned=learned, groups=groups
        )

    def largest(self, k: int) -> ReferenceSignals:
        """As if only k entries had been kept: the others join the tail. Entropies stay exact."""
        dropped = self.topk_logprobs[:, k:].float().exp().sum(1)
        return replace(
            self,
            topk_ids=self.topk_ids[:, :k],
            topk_logprobs=self.topk_logprobs[:, :k],
            tail_mass=self.tail_mass + dropped,
        )

    def mixture(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """((N, K) weights, (N,) share): delta = sum_k weights E[topk_ids] + share * (the sum of E's rows); the tail's
        mass lies on the mean of the ids not kept."""
        if len(self) and int(self.topk_ids.max()) >= vocab_size:
            raise UserError(
                f"signals hold id {int(self.topk_ids.max())} but the embedding table has {vocab_size} rows; "
                "reference and target must share one vocabulary"
            )
        p, kept = self.topk_logprobs.float().exp(), torch.isfinite(self.topk_logprobs)
        share = self.tail_mass / (vocab_size - kept.sum(1)).clamp(min=1)  # the tail's mass on each id not kept
        # sum_j p_j E_j + share * (sum of E over what is not kept), as one weighted sum over what is kept.
        return torch.where(kept, p - share[:, None], 0.0), share

    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        """Eq. 1: (N, D) delta with gradient to the (V, D) table."""
        weights, share = self.mixture(len(embedding_weight))
        delta = torch.nn.functional.embedding_bag(
            self.topk_ids.long(),
            embedding_weight,
            per_sample_weights=weights.to(embedding_weight.dtype),
            mode="sum",
        )
        return delta + share.to(delta.dtype)[:, None] * embedding_weight.sum(0)

    def to(self, device: torch.device | str) -> ReferenceSignals:
        return self._map(lambda t: t.to(device))

    def __len__(self) -> int:
        return self.topk_ids.shape[0]

    def __getitem__(self, index: slice | Tensor) -> ReferenceSignals:
        return self._map(lambda t: t[index])

    def __iter__(self) -> Iterator[ReferenceSignals]:
        return (self[i : i + 1] for i in range(len(self)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ReferenceSignals:
        return replace(
            self,
            topk_ids=function(self.topk_ids),
            topk_logprobs=function(self.topk_logprobs),
            entropy=function(self.entropy),
            tail_mass=function(self.tail_mass),
        )

    @staticmethod
    def cat(parts: Sequence[ReferenceSignals]) -> ReferenceSignals:
        """Join along N; unequal K is padded with -inf. The temperatures must agree."""
        if not parts:
            raise UserError("ReferenceSignals.cat needs at least one part")
        temperatures = {(p.alpha_temperature, p.delta_temperature) for p in parts}
        if len(temperatures) > 1:
            raise UserError(f"signals of different temperatures cannot be joined: {sorted(temperatures)}")
        width = max(p.topk_ids.shape[1] for p in parts)

        def widen(t: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value)

        return ReferenceSignals(
            torch.cat([widen(p.topk_ids, 0) for p in parts]),
            torch.cat([widen(p.topk_logprobs, -math.inf) for p in parts]),
            torch.cat([p.entropy for p in parts]),
            torch.cat([p.tail_mass for p in parts]),
            *temperatures.pop(),
        )

    # -- travel
    def to_arrow(self) -> Any:
        """A pyarrow Table, one row per position, lists without the padding; temperatures in the schema's metadata."""
        columns = (self.topk_ids, self.topk_logprobs, self.entropy, self.tail_mass)
        return to_table(columns, (self.alpha_temperature, self.delta_temperature))

    @classmethod
    def from_arrow(cls, table: Any) -> ReferenceSignals:
        columns, temperatures = from_table(table)
        return cls(*columns, *temperatures)

    def to_bytes(self) -> bytes:
        """Arrow IPC: what travels between Serve replicas."""
        import pyarrow as pa

        table = self.to_arrow()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, data: bytes) -> ReferenceSignals:
        import pyarrow as pa

        with pa.ipc.open_stream(data) as reader:
            return cls.from_arrow(reader.read_all())


def _check(
    rows: Tensor, name: str, shape: str, k: int, mass: float | None, alpha_temperature: float, delta_temperature: float
) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise UserError(f"{name} has shape {tuple(rows.shape)} and dtype {rows.dtype}; {shape} of floats is needed")
    if not k >= 1:
        raise UserError(f"k is {k}; keep at least 1 entry per position")
    if mass is not None and not 0.0 < mass <= 1.0:
        raise UserError(f"mass is {mass}; it must lie in (0, 1], or be None to keep k entries everywhere")
    for key, value in (("alpha_temperature", alpha_temperature), ("delta_temperature", delta_temperature)):
        if not 0.0 < value < math.inf:
            raise UserError(f"{key} is {value}; it must be above 0")


@dataclass(frozen=True)
class DenseSignals:
    """The unabridged twin: whole distributions of a few positions, in memory only. Same questions, same answers."""

    logits: Tensor  # (N, V) fp32
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0

    def alpha(
        self,
        vocab_size: int,
        rule: AlphaRule = "normalized_entropy",
        alpha_scale: float | None = None,
        *,
        learned: LearnedAlpha | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        scaled = self.logits / self.alpha_temperature
        confidence = torch.softmax(scaled, dim=-1).amax(-1)
        return alpha_from_statistics(
            rule, entropy(scaled), confidence, vocab_size, alpha_scale, learned=learned, groups=groups
        )

    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        return torch.softmax(self.logits / self.delta_temperature, dim=-1).to(embedding_weight.dtype) @ embedding_weight

    def top1(self) -> Tensor:
        return self.logits.argmax(-1)

    def __getitem__(self, index: slice | Tensor) -> DenseSignals:
        return DenseSignals(self.logits[index], self.alpha_temperature, self.delta_temperature)

    def __len__(self) -> int:
        return self.logits.shape[0]


Signals = ReferenceSignals | DenseSignals


def sparse_residual(
    signals: ReferenceSignals,
    vocab_size: int,
    rule: AlphaRule,
    alpha_scale: float | None,
    *,
    learned: LearnedAlpha | None = None,
    groups: Tensor | None = None,
) -> SparseResidual:
    """residual_state as weights on rows of the embedding table, for training steps."""
    weights, share = signals.mixture(vocab_size)
    ids, alpha = signals.topk_ids, signals.alpha(vocab_size, rule, alpha_scale, learned=learned, groups=groups)
    if rule == "top1":
        ids, weights, share = ids[:, :1], torch.ones_like(weights[:, :1]), torch.zeros_like(share)
    return SparseResidual(alpha, ids, weights, share)


def residual_state(
    signals: Signals,
    embedding_weight: Tensor,
    rule: AlphaRule,
    alpha_scale: float | None,
    *,
    learned: LearnedAlpha | None = None,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(alpha (N,), delta (N, D)): the state of masked positions under a rule, from either form of signals."""
    alpha = signals.alpha(embedding_weight.shape[0], rule, alpha_scale, learned=learned, groups=groups)
    if rule == "top1":
        top = signals.top1() if isinstance(signals, DenseSignals) else signals.topk_ids[:, 0].long()
        return alpha, embedding_weight[top]
    return alpha, signals.soft_embedding(embedding_weight)
