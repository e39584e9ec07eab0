"""What decoding a request returns: tokens, passes by kind, and the trace of every denoising pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from rcd_core.decode_settings import ResolvedSettings


@dataclass
class Forwards:
    """Target passes by kind (a guidance pair counts once); reference: reference passes, one per block it started."""

    prefill: int = 0
    denoise: int = 0
    store: int = 0
    reference: int = 0

    @property
    def total(self) -> int:
        """Target passes of every kind."""
        return self.prefill + self.denoise + self.store


@dataclass(frozen=True)
class Step:
    """One denoising pass, in absolute positions. argmax, confidence, entropy (nats) and alpha align with masked, the
    positions that it predicts; alpha is the weight of the residual in the pass's input. edited: those of `committed`
    that held another token. candidates: the most probable (token id, probability) of each position of masked, largest
    first, if requested (Sequence.num_candidates)."""

    masked: list[int]
    argmax: list[int]
    confidence: list[float]
    entropy: list[float]
    committed: list[int]
    alpha: list[float]
    edited: list[int] = field(default_factory=list)
    candidates: list[list[tuple[int, float]]] = field(default_factory=list)

    def readable(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """For viewers, which have no tokenizer: the fields, argmax_text, and candidates, if there are any, as mappings
        of text, id and probability. decode: token ids -> text. A single token may be half a character."""
        fields = {name: value for name, value in vars(self).items() if name != "candidates"}
        fields["argmax_text"] = [decode([token]) for token in self.argmax]
        if self.candidates:
            fields["candidates"] = [
                [{"text": decode([i]), "id": i, "probability": float(f"{p:.4g}")} for i, p in top]
                for top in self.candidates
            ]
        return fields


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one new token. logprob: its own; top: the most probable (token id, logprob), largest first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Generation:
    """token_ids: new tokens before the stop token and within max_new_tokens (infill: the filled tokens, in order).
    canvas_ids: prompt and every decoded block, uncut. settings: as they were in effect.
    reference_failures: blocks that started from zero because the reference did not answer."""

    token_ids: list[int]
    canvas_ids: list[int]
    num_forwards: Forwards
    finish_reason: Literal["stop", "length", "filled"]
    settings: ResolvedSettings
    steps: list[Step]
    reference_failures: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """The paper's measure: generated tokens over denoising passes."""
        return len(self.token_ids) / max(1, self.num_forwards.denoise)

    def tokens_per_pass(self, reference_cost: float) -> float:
        """Generated tokens over all passes. reference_cost: FLOPs of a reference pass over those of a target pass."""
        passes = self.num_forwards.total + reference_cost * self.num_forwards.reference
        return len(self.token_ids) / max(1.0, passes)
