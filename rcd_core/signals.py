"""ReferenceSignals: the sparse form of a reference's predictions, on disk, between replicas and in the training step.

Kept per masked position: the top-k ids and log-probabilities, the exact entropy over the whole vocabulary (alpha needs
the tail's share of it) and the tail's mass. delta is not stored, because the embedding table that it averages is being
trained.

Shapes: N positions, K kept entries (padded with log-probability -inf), V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from rcd_core.decode_settings import CONFIDENCE_RULES, AlphaRule
from rcd_core.dense_signals import AlphaInputs, AnySignals, DenseSignals, HiddenSignals
from rcd_core.errors import UserError
from rcd_core.ops.encode import encode
from rcd_core.ops.residual_embedding import SparseResidual
from rcd_core.ops.tiles import tile_rows
from rcd_core.precision import running_sum
from rcd_core.signal_arrow import from_table, to_table


@dataclass(frozen=True)
class ReferenceSignals(AnySignals):
    """topk_ids (N, K) int32; topk_logprobs (N, K) fp16, of the full softmax at the delta temperature; entropy (N,)
    fp32, nats at the alpha temperature; tail_mass (N,) fp32, the probability of the ids that are not kept. confidence
    (N,) fp32: the largest probability at the alpha temperature, only where that differs from the delta temperature.
    Parquet files do not store it, so signals that were read from them have it only if it follows from the rest."""

    topk_ids: Tensor
    topk_logprobs: Tensor
    entropy: Tensor
    tail_mass: Tensor
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0
    confidence: Tensor | None = None

    # -- from predictions
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
        """(N, V) logits of any float dtype -> signals with K = min(k, V).

        mass: keep only as many of the k entries, per position, as reach this probability; the others join the tail and
        leave padding (id 0, log-probability -inf). A logit of -inf is a token of probability 0. UserError: NaN, +inf, a
        row that is -inf everywhere, or an argument out of range.
        """
        _check(logits, "logits", "(positions, vocabulary)", k, mass, alpha_temperature, delta_temperature)
        return cls._encode(logits, None, k, mass, (alpha_temperature, delta_temperature))

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
        """(N, D) hidden states, (V, D) head -> `from_logits` of their product in the head's dtype, of which only a tile
        exists at a time."""
        _check(hidden, "hidden", "(positions, width)", k, mass, alpha_temperature, delta_temperature)
        if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[1]:
            raise UserError(
                f"hidden has shape {tuple(hidden.shape)}, lm_head_weight {tuple(lm_head_weight.shape)}; "
                "(positions, width) and (vocabulary, width) of one width are needed"
            )
        return cls._encode(hidden, lm_head_weight, k, mass, (alpha_temperature, delta_temperature))

    @classmethod
    @torch.no_grad()
    def _encode(
        cls, rows: Tensor, head: Tensor | None, k: int, mass: float | None, temperatures: tuple[float, float]
    ) -> ReferenceSignals:
        """rows: logits, or hidden states if there is a head."""
        vocab_size = (rows if head is None else head.T).shape[1]
        k = min(k, vocab_size)
        if not len(rows):
            return cls.empty(k, *temperatures).to(rows.device)
        if head is None:
            parts = [encode(rows, k, *temperatures)]
        else:
            tiles = torch.split(rows.to(head.dtype), tile_rows(vocab_size, rows.device))
            parts = [encode(tile @ head.T, k, *temperatures) for tile in tiles]
        columns = (torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))
        ids, logprobs, tail, entropies, confidence, peak = columns
        if not torch.isfinite(peak).all():
            row = int((~torch.isfinite(peak)).nonzero()[0])
            if peak[row] == -math.inf:
                raise UserError(f"row {row} of the logits is -inf everywhere; at least one token must be possible")
            raise UserError(f"row {row} of the logits has NaN or +inf; the model's weights or inputs are broken")
        if mass is not None:
            p = logprobs.exp()
            dropped = (running_sum(p) - p) >= mass  # the entries before it reach the mass already
            dropped[:, 0] = False
            tail = tail + p.masked_fill(~dropped, 0.0).sum(1)
            logprobs = logprobs.masked_fill(dropped, -math.inf)
        logprobs = logprobs.to(torch.float16)
        ids = ids.to(torch.int32).masked_fill(~torch.isfinite(logprobs), 0)
        apart = temperatures[0] != temperatures[1]
        return cls(ids, logprobs, entropies.float(), tail.float(), *temperatures, confidence.float() if apart else None)

    @classmethod
    def empty(cls, k: int, alpha_temperature: float = 1.0, delta_temperature: float = 1.0) -> ReferenceSignals:
        """Signals of no position, N = 0, K = k."""
        ids, logprobs = torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k, dtype=torch.float16)
        confidence = None if alpha_temperature == delta_temperature else torch.zeros(0)
        return cls(ids, logprobs, torch.zeros(0), torch.zeros(0), alpha_temperature, delta_temperature, confidence)

    # -- to residuals
    def uncertainty(self, vocab_size: int, rule: AlphaRule) -> tuple[Tensor, Tensor]:
        if rule not in CONFIDENCE_RULES:
            return self.entropy, torch.ones_like(self.entropy)
        if self.confidence is not None:
            return self.entropy, self.confidence
        logprobs = self.topk_logprobs.float()
        if self.alpha_temperature == self.delta_temperature:
            return self.entropy, logprobs[:, 0].exp()
        if int(torch.isfinite(logprobs).sum()) == vocab_size * len(self):  # without a tail every temperature follows
            scaled = logprobs * (self.delta_temperature / self.alpha_temperature)
            return self.entropy, torch.softmax(scaled, dim=-1).amax(-1)
        raise UserError(
            f"alpha is {rule!r}, which needs the largest probability at alpha_temperature {self.alpha_temperature}; "
            f"these signals store it at delta_temperature {self.delta_temperature} only. Compute signals with equal "
            "temperatures, or use a rule of the entropy"
        )

    def top1(self) -> Tensor:
        return self.topk_ids[:, 0].long()

    def largest(self, k: int) -> ReferenceSignals:
        """Only the k largest entries; the others join the tail. Entropies stay exact."""
        dropped = self.topk_logprobs[:, k:].float().exp().sum(1)
        return replace(
            self,
            topk_ids=self.topk_ids[:, :k],
            topk_logprobs=self.topk_logprobs[:, :k],
            tail_mass=self.tail_mass + dropped,
        )

    def mixture(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """((N, K) weights, (N,) share): delta = sum_k weights_k E[topk_ids_k] + share * sum_v E_v. The tail's mass lies
        on the mean of the ids that are not kept. UserError: an id outside the vocabulary."""
        if len(self) and int(self.topk_ids.max()) >= vocab_size:
            raise UserError(
                f"signals have id {int(self.topk_ids.max())} but the embedding table has {vocab_size} rows; "
                "reference and target must share one vocabulary"
            )
        p, kept = self.topk_logprobs.float().exp(), torch.isfinite(self.topk_logprobs)
        share = self.tail_mass / (vocab_size - kept.sum(1)).clamp(min=1)  # of each id that is not kept
        # share * (sum over the ids not kept) = share * (sum over all ids) - share * (sum over the kept ids)
        return torch.where(kept, p - share[:, None], 0.0), share

    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        weights, share = self.mixture(len(embedding_weight))
        delta = torch.nn.functional.embedding_bag(
            self.topk_ids.long(), embedding_weight, per_sample_weights=weights.to(embedding_weight.dtype), mode="sum"
        )
        return delta + share.to(delta.dtype)[:, None] * embedding_weight.sum(0)

    # -- as a sequence of positions
    def to(self, device: torch.device | str) -> ReferenceSignals:
        return self._map(lambda t: t.to(device))

    def __len__(self) -> int:
        return self.topk_ids.shape[0]

    def __getitem__(self, index: slice | Tensor) -> ReferenceSignals:
        return self._map(lambda t: t[index])

    def __iter__(self) -> Iterator[ReferenceSignals]:
        return (self[i : i + 1] for i in range(len(self)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ReferenceSignals:
        changed: dict[str, Any] = {name: function(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **changed)

    @staticmethod
    def cat(parts: Sequence[ReferenceSignals]) -> ReferenceSignals:
        """Concatenate along N, padding to the largest K. UserError: no parts, or different temperatures."""
        if not parts:
            raise UserError("ReferenceSignals.cat needs at least one part")
        temperatures = {(p.alpha_temperature, p.delta_temperature) for p in parts}
        if len(temperatures) > 1:
            raise UserError(f"signals of different temperatures cannot be joined: {sorted(temperatures)}")
        width = max(p.topk_ids.shape[1] for p in parts)
        confidences = [p.confidence for p in parts]

        def widen(t: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value)

        return ReferenceSignals(
            torch.cat([widen(p.topk_ids, 0) for p in parts]),
            torch.cat([widen(p.topk_logprobs, -math.inf) for p in parts]),
            torch.cat([p.entropy for p in parts]),
            torch.cat([p.tail_mass for p in parts]),
            *temperatures.pop(),
            None if any(c is None for c in confidences) else torch.cat([c for c in confidences if c is not None]),
        )

    # -- serialisation
    def to_arrow(self) -> Any:
        """A pyarrow Table, one row per position, lists without padding; temperatures in the schema's metadata."""
        columns = (self.topk_ids, self.topk_logprobs, self.entropy, self.tail_mass)
        return to_table(columns, (self.alpha_temperature, self.delta_temperature), self.confidence)

    @classmethod
    def from_arrow(cls, table: Any) -> ReferenceSignals:
        columns, temperatures, confidence = from_table(table)
        return cls(*columns, *temperatures, confidence)

    def to_bytes(self) -> bytes:
        """An Arrow IPC stream, which Serve replicas send to each other."""
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
        raise UserError(f"k is {k}; it must be at least 1")
    if mass is not None and not 0.0 < mass <= 1.0:
        raise UserError(f"mass is {mass}; it must lie in (0, 1], or be None to keep k entries everywhere")
    for key, value in (("alpha_temperature", alpha_temperature), ("delta_temperature", delta_temperature)):
        if not 0.0 < value < math.inf:
            raise UserError(f"{key} is {value}; it must be above 0")


Signals = ReferenceSignals | DenseSignals | HiddenSignals


def sparse_residual(
    signals: ReferenceSignals, vocab_size: int, rule: AlphaRule, alpha_scale: float | None, **more: Unpack[AlphaInputs]
) -> SparseResidual:
    """`residual_state` as weights on rows of the embedding table, for training steps."""
    weights, share = signals.mixture(vocab_size)
    ids, alpha = signals.topk_ids, signals.alpha(vocab_size, rule, alpha_scale, **more)
    if rule == "top1":
        ids, weights, share = ids[:, :1], torch.ones_like(weights[:, :1]), torch.zeros_like(share)
    return SparseResidual(alpha, ids, weights, share)


def residual_state(
    signals: Signals, embedding_weight: Tensor, rule: AlphaRule, alpha_scale: float | None, **more: Unpack[AlphaInputs]
) -> tuple[Tensor, Tensor]:
    """(alpha (N,), delta (N, D)) of masked positions under a rule, from any form of signals."""
    if isinstance(signals, HiddenSignals):
        parts = [residual_state(tile, embedding_weight, rule, alpha_scale, **more) for tile in signals.tiles()]
        alphas, deltas = zip(*parts, strict=True)
        return torch.cat(alphas), torch.cat(deltas)
    alpha = signals.alpha(len(embedding_weight), rule, alpha_scale, **more)
    delta = embedding_weight[signals.top1()] if rule == "top1" else signals.soft_embedding(embedding_weight)
    return alpha, delta
