"""The protocol between the HTTP interface and a model, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rcd_core.decode_settings import DecodeSettings


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One prompt (text or token ids) or conversation to decode. fixed_length: the user asked for max_new_tokens;
    otherwise it is the server's default, and gives way where the model has fewer positions left.

    streamed: the client gets text as it comes; otherwise nothing before the end, so that it may all begin anew.

    committed, told: a request that goes on after its replica was lost: the new token ids of finished blocks, and how
    many characters of text were sent of them. checkpoint: weights_id of the model they are of.
    """

    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    infill: bool
    settings: DecodeSettings
    fixed_length: bool
    stop: tuple[str, ...]
    streamed: bool = True
    committed: tuple[int, ...] = ()
    told: int = 0
    checkpoint: str = ""


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Text that can no longer change, and the token ids that became final with it (some of their text may be held back:
    half a character, the beginning of a stop string)."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One denoising pass, only where settings.trace asks for it: a decoding.Step as a mapping, with argmax_text, what
    each token of argmax reads by itself."""

    step: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """forwards: passes by kind (prefill, denoise, store, reference). steps: the trace, where asked for.
    reference_failures: blocks that started from zero because the reference could not answer."""

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_tokens: int
    forwards: dict[str, int]
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    reference_failures: int = 0


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event. result.text is the whole text: all deltas together, those before `told` included."""

    result: DecodeResult


DecodeEvent = TextDelta | TraceStep | Finished


class Overloaded(Exception):
    """The queue is full; worth another try in a while."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)  # what it is made of again where it comes out of another process
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the queue is full; try again in {self.retry_after_s:g} s"


class Unavailable(Exception):
    """No replica can answer, or the one that did was lost and no other could go on."""


class Backend(Protocol):
    """A model that decodes, in this process or another."""

    def stream(self, request: DecodeRequest) -> AsyncIterator[DecodeEvent]:
        """Raises UserError (this model refuses the request) or Overloaded on the first step, Unavailable on any.
        Closing the iterator cancels the request."""

    async def ready(self) -> None:
        """Returns once the model can decode; raises where it cannot."""

    async def statistics(self) -> dict[str, float]:
        """Counters (monotone) and gauges by snake_case name, for /metrics."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model by the name that requests give, and its settings where they give none."""

    backend: Backend
    defaults: DecodeSettings
    created: int
