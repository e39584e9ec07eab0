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

from rcd_core.errors import UserError
from rcd_core.residual import AlphaRule, alpha_from_statistics, entropy

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
        cls, logits: Tensor, k: int = 32, *, alpha_temperature: float = 1.0, delta_temperature: float = 1.0
    ) -> ReferenceSignals:
        """(N, V) logits of any float dtype. NaN or +inf raises; -inf is a token of probability 0."""
        if logits.dim() != 2:
            raise UserError(f"logits have shape {tuple(logits.shape)}; (positions, vocabulary) is needed")
        vocab_size = logits.shape[1]
        if not k >= 1:
            raise UserError(f"k is {k}; keep at least 1 entry per position")
        z = logits.float()
        if torch.isnan(z).any() or torch.isposinf(z).any():
            raise UserError("logits contain NaN or +inf; the reference's weights or inputs are broken")
        scaled = z / delta_temperature
        k = min(k, vocab_size)
        top, ids = scaled.topk(k, dim=-1)
        norm = scaled.logsumexp(-1)
        tail = scaled.scatter(1, ids, float("-inf")).logsumexp(-1)
        return cls(
            topk_ids=ids.to(torch.int32),
            topk_logprobs=(top - norm[:, None]).to(torch.float16),
            entropy=entropy(z / alpha_temperature),
            tail_mass=(tail - norm).exp(),
            alpha_temperature=alpha_temperature,
            delta_temperature=delta_temperature,
        )

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        lm_head_weight: Tensor,
        k: int = 32,
        *,
        alpha_temperature: float = 1.0,
        delta_temperature: float = 1.0,
    ) -> ReferenceSignals:
        """(N, D) hidden states, (V, D) head: as from_logits, holding only a tile of the logits at a time."""
        tile = max(1, _TILE_BYTES // (4 * lm_head_weight.shape[0]))
        parts = [
            cls.from_logits(
                rows @ lm_head_weight.T, k, alpha_temperature=alpha_temperature, delta_temperature=delta_temperature
            )
            for rows in torch.split(hidden, tile)
        ]
        return cls.cat(parts) if parts else cls.empty(k, alpha_temperature, delta_temperature)

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
        self, vocab_size: int, rule: AlphaRule = "normalized_entropy", alpha_scale: float | None = None
    ) -> Tensor:
        """(N,) weights in [0, 1], Eq. 3 or another rule."""
        confidence = self.topk_logprobs[:, 0].float().exp()
        return alpha_from_statistics(rule, self.entropy, confidence, vocab_size, alpha_scale)

    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        """Eq. 1: (N, D) delta with gradient to the (V, D) table; the tail's mass on the mean of the ids not kept."""
        vocab_size = embedding_weight.shape[0]
        if len(self) and int(self.topk_ids.max()) >= vocab_size:
            raise UserError(
                f"signals hold id {int(self.topk_ids.max())} but the embedding table has {vocab_size} rows; "
                "reference and target must share one vocabulary"
            )
        weights = self.topk_logprobs.to(embedding_weight.dtype).exp()
        kept = torch.isfinite(self.topk_logprobs)
        ids = self.topk_ids.long()
        bag = torch.nn.functional.embedding_bag
        delta = bag(ids, embedding_weight, per_sample_weights=weights, mode="sum")
        kept_sum = bag(ids, embedding_weight, per_sample_weights=kept.to(weights.dtype), mode="sum")
        num_left = vocab_size - kept.sum(1)
        tail_mean = (embedding_weight.sum(0) - kept_sum) / num_left.clamp(min=1)[:, None]
        tail = torch.where(num_left > 0, self.tail_mass, 0.0).to(weights.dtype)
        return delta + tail[:, None] * tail_mean

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
        import pyarrow as pa

        kept = torch.isfinite(self.topk_logprobs)
        offsets = pa.array([0, *kept.sum(1).cumsum(0).tolist()], pa.int32())
        ids, logprobs = self.topk_ids[kept].cpu().numpy(), self.topk_logprobs[kept].cpu().numpy()
        metadata = {
            "alpha_temperature": repr(self.alpha_temperature),
            "delta_temperature": repr(self.delta_temperature),
        }
        table = pa.table(
            {
                "topk_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
                "topk_logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs, pa.float16())),
                "entropy": pa.array(self.entropy.cpu().numpy(), pa.float32()),
                "tail_mass": pa.array(self.tail_mass.cpu().numpy(), pa.float32()),
            }
        )
        return table.replace_schema_metadata(metadata)

    @classmethod
    def from_arrow(cls, table: Any) -> ReferenceSignals:
        metadata = table.schema.metadata or {}
        ids, logprobs = (table[name].combine_chunks() for name in ("topk_ids", "topk_logprobs"))
        lengths = torch.from_numpy(ids.value_lengths().to_numpy(zero_copy_only=False).copy()).long()
        width = int(lengths.max()) if len(lengths) else 0
        kept = torch.arange(width) < lengths[:, None]
        topk_ids = torch.zeros(len(lengths), width, dtype=torch.int32)
        topk_logprobs = torch.full((len(lengths), width), -math.inf, dtype=torch.float16)
        topk_ids[kept] = torch.from_numpy(ids.flatten().to_numpy(zero_copy_only=False).copy())
        topk_logprobs[kept] = torch.from_numpy(logprobs.flatten().to_numpy(zero_copy_only=False).copy())
        return cls(
            topk_ids,
            topk_logprobs,
            torch.from_numpy(table["entropy"].to_numpy().copy()),
            torch.from_numpy(table["tail_mass"].to_numpy().copy()),
            float(metadata.get(b"alpha_temperature", b"1.0")),
            float(metadata.get(b"delta_temperature", b"1.0")),
        )

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


@dataclass(frozen=True)
class DenseSignals:
    """The unabridged twin: whole distributions of a few positions, in memory only. Same questions, same answers."""

    logits: Tensor  # (N, V) fp32
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0

    def alpha(
        self, vocab_size: int, rule: AlphaRule = "normalized_entropy", alpha_scale: float | None = None
    ) -> Tensor:
        scaled = self.logits / self.alpha_temperature
        confidence = torch.softmax(scaled, dim=-1).amax(-1)
        return alpha_from_statistics(rule, entropy(scaled), confidence, vocab_size, alpha_scale)

    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        return torch.softmax(self.logits / self.delta_temperature, dim=-1).to(embedding_weight.dtype) @ embedding_weight

    def top1(self) -> Tensor:
        return self.logits.argmax(-1)

    def __getitem__(self, index: slice | Tensor) -> DenseSignals:
        return DenseSignals(self.logits[index], self.alpha_temperature, self.delta_temperature)

    def __len__(self) -> int:
        return self.logits.shape[0]


Signals = ReferenceSignals | DenseSignals


def residual_state(
    signals: Signals, embedding_weight: Tensor, rule: AlphaRule, alpha_scale: float | None
) -> tuple[Tensor, Tensor]:
    """(alpha (N,), delta (N, D)): the state of masked positions under a rule, from either form of signals."""
    alpha = signals.alpha(embedding_weight.shape[0], rule, alpha_scale)
    if rule == "top1":
        top = signals.top1() if isinstance(signals, DenseSignals) else signals.topk_ids[:, 0].long()
        return alpha, embedding_weight[top]
    return alpha, signals.soft_embedding(embedding_weight)
