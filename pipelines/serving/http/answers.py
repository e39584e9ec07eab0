"""The answers of the HTTP interface: OpenAI's bodies and chunks, with what diffusion adds under `rcd`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from pipelines.serving.backend import DecodeEvent, DecodeResult, Finished, TextDelta
from pipelines.serving.http.bodies import ChatRequest, Request, TraceDetail

# -- the bodies, as /openapi.json tells them --------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class RcdAnswer(BaseModel):
    """settings: as they were in effect, for the first choice. forwards: passes by kind, of all choices together.
    tokens_per_forward: new tokens over denoising passes."""

    settings: dict[str, Any]
    forwards: dict[str, int]
    tokens_per_forward: float
    reference_failures: int
    seconds: float


class RcdChoice(BaseModel):
    """steps: one entry per denoising pass, where return_trace asks for it."""

    seed: int | None
    forwards: dict[str, int]
    reference_failures: int
    steps: list[dict[str, Any]] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"]
    rcd: RcdChoice


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]
    rcd: RcdChoice


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage
    rcd: RcdAnswer


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage
    rcd: RcdAnswer


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    status: Literal["ok", "ready"]


# -- how they come about ----------------------------------------------------------------------------------------------


class Answer:
    """What one request gets, told event by event: the chunks on the way, and the whole body in the end. Under `rcd` a
    stream holds the trace, pass by pass ({type: trace, index, pass, step}), and in its last chunk the statistics.

    fingerprint: tells which deployed model answered.
    """

    def __init__(self, request: Request, num_choices: int, fingerprint: str | None) -> None:
        self.request = request
        self.chat = isinstance(request, ChatRequest)
        self.results: list[DecodeResult | None] = [None] * num_choices
        self._text = [""] * num_choices
        self._num_passes = [0] * num_choices
        self._started = time.monotonic()
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint,
        }

    @property
    def complete(self) -> bool:
        return all(self.results)

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks before any event: a chat says first who speaks."""
        if self.chat:
            for index in range(len(self.results)):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def add(self, index: int, event: DecodeEvent) -> Iterator[dict[str, Any]]:
        """Take in an event of a choice. Yields its chunks; must be run to its end."""
        if isinstance(event, TextDelta):
            yield from self._say(index, event.text)
        elif isinstance(event, Finished):
            sent = self._text[index]
            if not event.result.text.startswith(sent):
                raise RuntimeError("the final text differs from what was sent of it")
            yield from self._say(index, event.result.text[len(sent) :])
            self.results[index] = event.result
            yield self._last_of(index, event.result)
        else:
            step = trace_step(event.step, self.request.return_trace)
            trace = {"type": "trace", "index": index, "pass": self._num_passes[index], "step": step}
            self._num_passes[index] += 1
            yield self._tagged([]) | {"rcd": trace}

    def closing(self) -> Iterator[dict[str, Any]]:
        """The chunk after all events, where the usage was asked for."""
        if self.request.include_usage:
            yield self._tagged([]) | {"usage": self.usage(), "rcd": self.rcd()}

    def body(self) -> dict[str, Any]:
        """The whole answer, once it is complete."""
        choices = [self._choice(index, r) for index, r in enumerate(self._finished())]
        name = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": self.usage(), "rcd": self.rcd()}

    def usage(self) -> dict[str, int]:
        results = self._finished()
        new = sum(r.num_tokens for r in results)
        given = sum(r.num_prompt_tokens for r in results[:: self.request.n])  # a prompt counts once for its choices
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}

    def rcd(self) -> dict[str, Any]:
        results = self._finished()
        forwards = {kind: sum(r.forwards[kind] for r in results) for kind in results[0].forwards}
        return {
            "settings": results[0].settings,
            "forwards": forwards,
            "tokens_per_forward": round(sum(r.num_tokens for r in results) / max(1, forwards["denoise"]), 3),
            "reference_failures": sum(r.reference_failures for r in results),
            "seconds": round(time.monotonic() - self._started, 4),
        }

    def _finished(self) -> list[DecodeResult]:
        return [r for r in self.results if r is not None]

    def _say(self, index: int, text: str) -> Iterator[dict[str, Any]]:
        if text:
            self._text[index] += text
            yield self._chunk(index, {"content": text} if self.chat else text)

    def _last_of(self, index: int, result: DecodeResult) -> dict[str, Any]:
        """The chunk without content that ends a choice; the last of them ends the answer, unless the usage does."""
        chunk = self._chunk(index, {} if self.chat else "", result.finish_reason)
        chunk["choices"][0]["rcd"] = _rcd_choice(result)
        return chunk | {"rcd": self.rcd()} if self.complete and not self.request.include_usage else chunk

    def _chunk(self, index: int, said: dict[str, str] | str, finish_reason: str | None = None) -> dict[str, Any]:
        content = {"delta": said} if self.chat else {"text": said}
        return self._tagged([{"index": index, **content, "logprobs": None, "finish_reason": finish_reason}])

    def _tagged(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = {**self._head, "object": name, "choices": choices}
        return chunk | {"usage": None} if self.request.include_usage else chunk

    def _choice(self, index: int, r: DecodeResult) -> dict[str, Any]:
        text = {"message": {"role": "assistant", "content": r.text}} if self.chat else {"text": r.text}
        rcd = _rcd_choice(r)
        if (detail := self.request.return_trace) != "none":
            rcd["steps"] = [trace_step(step, detail) for step in r.steps]
        return {"index": index, **text, "logprobs": None, "finish_reason": r.finish_reason, "rcd": rcd}


def _rcd_choice(r: DecodeResult) -> dict[str, Any]:
    return {"seed": r.settings["seed"], "forwards": r.forwards, "reference_failures": r.reference_failures}


def trace_step(step: dict[str, Any], detail: TraceDetail) -> dict[str, Any]:
    """A decoding.Step in the detail asked for: as it is, or its counts and means (entropy in nats)."""
    if detail == "steps":
        return step
    num_masked = len(step["masked"])
    means = {f"mean_{name}": sum(step[name]) / max(1, num_masked) for name in ("confidence", "entropy", "alpha")}
    return {"num_masked": num_masked, "num_committed": len(step["committed"]), **means}
