"""The protocol between the HTTP interface and a model, in this process or another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from rcd_core.decode_settings import DecodeSettings


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One prompt (text or token ids) or conversation to decode.

    fixed_length: the client chose max_new_tokens. Otherwise it is the server's default, and shrinks to the positions
    that are left. streamed: the client receives text as it becomes final; otherwise only the whole answer, so that
    decoding may restart from the beginning. logprobs: most probable tokens to report with each new token's logprob.
    candidates: most probable tokens of each predicted position to report in the trace.

    A request that resumes after its replica was lost also has: committed, the new token ids of finished blocks;
    num_sent, the characters of text that the client has received; checkpoint, the weights_id of their model.
    """

    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    infill: bool
    settings: DecodeSettings
    fixed_length: bool
    stop: tuple[str, ...]
    streamed: bool = True
    logprobs: int | None = None
    candidates: int = 0
    committed: tuple[int, ...] = ()
    num_sent: int = 0
    checkpoint: str = ""


class TokenLogprob(NamedTuple):
    """is_text False: the token is a part of a character, and text is its name in the vocabulary."""

    text: str
    logprob: float
    is_text: bool


class NewToken(NamedTuple):
    """own: of the token itself; top: of the most probable ones. start: characters of the answer before the token."""

    own: TokenLogprob
    top: list[TokenLogprob]
    start: int


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Text that can no longer change, and the token ids that became final with it. Text may lag behind the ids: half a
    character and a possible beginning of a stop string are held back. tokens: one for each id, if requested."""

    text: str
    token_ids: list[int]
    tokens: list[NewToken] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One denoising pass, if settings.trace is set: decoding.Step.readable."""

    step: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """forwards: passes by kind (prefill, denoise, store, reference). steps: the trace, if requested.
    reference_failures: blocks that started from zero because the reference could not answer. tokens: of TextDelta.
    reference_weight: FLOPs of a reference pass over those of a denoising pass; None: not known."""

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_tokens: int
    forwards: dict[str, int]
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    reference_failures: int = 0
    tokens: list[NewToken] = field(default_factory=list)
    reference_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event. result.text is the whole text, including what a lost replica sent."""

    result: DecodeResult


DecodeEvent = TextDelta | TraceStep | Finished


class Overloaded(Exception):
    """The queue is full; the client may retry later."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)  # unpickling calls the class with these arguments
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the queue is full; try again in {self.retry_after_s:g} s"


class DecodingFailed(Exception):
    """The model's predictions for this request are not finite; the message names checkpoint and layer."""


class Unavailable(Exception):
    """No replica can answer, or the replica was lost and no other could resume its answer."""


class Backend(Protocol):
    """A model that decodes."""

    def stream(self, request: DecodeRequest) -> AsyncIterator[DecodeEvent]:
        """Raises UserError (invalid request) or Overloaded on the first step, Unavailable or DecodingFailed on any
        step. Closing the iterator cancels the request."""

    async def ready(self) -> None:
        """Return once the model can decode; raise if it cannot."""

    async def statistics(self) -> dict[str, float]:
        """Counters (names in _total) and gauges by snake_case name, for /metrics."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model behind the HTTP interface. defaults: settings that requests may override. created: Unix time. task: what
    it was trained for, if that is known."""

    backend: Backend
    defaults: DecodeSettings
    created: int
    task: str | None = None
