"""What an engine has done: passes and their time, what the cache has saved, tokens per forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from rcd_core.decoding.sequence import Generation


@dataclass
class Statistics:
    """Since the engine was made.

    passes, rows, seconds by kind of batched pass, "reference" too; one with rows of several kinds counts as the most
    frequent. seconds "choose": head and reduction of all passes of a step, and on a GPU the wait for them.
    Saved passes, of single requests: reused_prefills and reused_tokens, prompt blocks found in the cache;
    merged_stores, finished blocks that were stored along with the next one's first pass.
    requests, tokens (up to the end of each answer), forwards (passes of each request by kind): of what is finished.
    """

    passes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused_tokens: int = 0
    reused_prefills: int = 0
    merged_stores: int = 0
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
        """Generated tokens over passes of every kind, a reference pass counted as `reference_cost` of a target's (ratio
        of FLOPs)."""
        own = sum(count for kind, count in self.forwards.items() if kind != "reference")
        return self.tokens / max(1.0, own + reference_cost * self.forwards.get("reference", 0))
