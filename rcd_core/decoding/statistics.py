"""Counters of an engine: passes and their time, passes that the cache saved, tokens per forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from rcd_core.decoding.generation import Generation


@dataclass
class Statistics:
    """Totals since the engine was created.

    passes, rows and seconds are of batched passes by kind, "reference" included; a pass with rows of several kinds
    counts as the most frequent kind. seconds["choose"] is sampling: head and reduction of all passes of a step, on a
    GPU including the wait for them (the key is part of a metric's name).
    reused_tokens, reused_prefills: prompt tokens found in the cache, and the prefill passes of single requests this
    saved. merged_stores: store passes saved because a finished block joined the next block's first pass. preempted:
    requests that had to give up their pages.
    requests, tokens and forwards (passes of single requests by kind) are of finished requests.
    """

    passes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused_tokens: int = 0
    reused_prefills: int = 0
    merged_stores: int = 0
    preempted: int = 0
    requests: int = 0
    tokens: int = 0
    forwards: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, rows: int, seconds: float) -> None:
        self.passes[kind] = self.passes.get(kind, 0) + 1
        self.rows[kind] = self.rows.get(kind, 0) + rows
        self.spend(kind, seconds)

    def spend(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def finished(self, generation: Generation) -> None:
        self.requests += 1
        self.tokens += len(generation.token_ids)
        for kind, count in vars(generation.num_forwards).items():
            self.forwards[kind] = self.forwards.get(kind, 0) + count

    @property
    def occupancy(self) -> float:
        """Mean number of requests in a pass."""
        return sum(self.rows.values()) / max(1, sum(self.passes.values()))

    @property
    def tokens_per_forward(self) -> float:
        """The paper's measure: generated tokens over denoising passes."""
        return self.tokens / max(1, self.forwards.get("denoise", 0))

    def tokens_per_pass(self, reference_cost: float) -> float:
        """Generated tokens over passes of every kind. reference_cost: FLOPs of a reference pass over a target's."""
        target = sum(count for kind, count in self.forwards.items() if kind != "reference")
        return self.tokens / max(1.0, target + reference_cost * self.forwards.get("reference", 0))
