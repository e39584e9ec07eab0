"""Answers of the HTTP interface: OpenAI's bodies and chunks, plus passes and settings under `rcd`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from pipelines.serving.backend import DecodeEvent, DecodeResult, Finished, NewToken, TextDelta, TokenLogprob
from pipelines.serving.http.bodies import ChatRequest, Request, TraceDetail
from rcd_core.tasks import check, example_of_task, get_task

# -- the schema of the bodies ------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class RcdAnswer(BaseModel):
    """`rcd` of an answer."""

    settings: dict[str, Any] = Field(description="Effective DecodeSettings of the first choice.")
    forwards: dict[str, int] = Field(description="Passes by kind, summed over the choices.")
    tokens_per_forward: float = Field(description="New tokens per denoising pass.")
    tokens_per_pass: float | None = Field(
        description="The same with reference passes, counted by their FLOPs; null: the reference's size is not known."
    )
    reference_failures: int = Field(description="Blocks that started from zero because the reference could not answer.")
    seconds: float = Field(description="From request to answer, as the server measures it.")


class RcdChoice(BaseModel):
    """`rcd` of a choice."""

    seed: int | None = Field(description="Seed of this choice.")
    forwards: dict[str, int] = Field(description="Passes by kind.")
    reference_failures: int = Field(description="Blocks that started from zero because the reference could not answer.")
    valid: bool | None = Field(
        None, description="Whether the answer is right, where the task can tell without its key."
    )
    steps: list[dict[str, Any]] | None = Field(None, description="One entry per denoising pass, with `return_trace`.")


class CompletionLogprobs(BaseModel):
    """One entry for each token of the text."""

    tokens: list[str] = Field(description="Texts; for a part of a character, its name in the vocabulary.")
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(description="The most probable tokens, and the token itself.")
    text_offset: list[int] = Field(description="Characters of the answer before the token.")


class ChatLogprob(BaseModel):
    token: str = Field(description="Text; for a part of a character, its name in the vocabulary.")
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8; null for a part of a character.")


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob] = Field(description="The most probable tokens.")


class ChatLogprobs(BaseModel):
    """One entry for each token of the text."""

    content: list[ChatTokenLogprob]
    refusal: None


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"]
    rcd: RcdChoice


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(_Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class _Body(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None
    usage: Usage
    rcd: RcdAnswer


class Completion(_Body):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatCompletion(_Body):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelFacts(BaseModel):
    """`rcd` of a model."""

    task: str = Field(description="What it was trained for.")
    about: str | None = Field(description="What it does and what its prompts look like; null where the task is silent.")
    infill: bool = Field(description="Prompts are texts with `<|MASK|>` to fill, sent with `infill: true`.")
    example: str | None = Field(description="A prompt, or a user's message; null where the task has no generator.")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    rcd: ModelFacts | None = None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    status: Literal["ok", "ready"]


# -- their content -----------------------------------------------------------------------------------------------------


class Answer:
    """Collects the events of one request, and makes the chunks of a stream or the whole body.

    `rcd` of a chunk has a step of the trace ({type: trace, index, pass, step}); `rcd` of the last chunk has the
    statistics. fingerprint: identifies the deployed models. task: the model's; it decides whether an answer is `valid`.
    """

    def __init__(self, request: Request, num_choices: int, fingerprint: str | None, task: str | None = None) -> None:
        self.request, self.task = request, task
        self.chat = isinstance(request, ChatRequest)
        self.results: list[DecodeResult | None] = [None] * num_choices
        self._with_logprobs = request.num_logprobs() is not None
        self._text = [""] * num_choices
        self._tokens: list[list[NewToken]] = [[] for _ in range(num_choices)]  # not sent yet
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
        """The chunks before any event: a chat starts with the role."""
        if self.chat:
            for index in range(len(self.results)):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def add(self, index: int, event: DecodeEvent) -> Iterator[dict[str, Any]]:
        """Add an event of a choice and yield its chunks. Must be iterated to the end."""
        if isinstance(event, TextDelta):
            self._tokens[index] += event.tokens
            yield from self._delta(index, event.text)
        elif isinstance(event, Finished):
            sent = self._text[index]
            if not event.result.text.startswith(sent):
                raise RuntimeError("the final text differs from the text already sent")
            yield from self._delta(index, event.result.text[len(sent) :])
            self.results[index] = event.result
            yield self._last_chunk(index, event.result)
        else:
            step = trace_step(event.step, self.request.return_trace)
            trace = {"type": "trace", "index": index, "pass": self._num_passes[index], "step": step}
            self._num_passes[index] += 1
            yield self._envelope([]) | {"rcd": trace}

    def closing(self) -> Iterator[dict[str, Any]]:
        """The chunk after all events, if stream_options.include_usage is set."""
        if self.request.include_usage:
            yield self._envelope([]) | {"usage": self.usage(), "rcd": self.rcd()}

    def body(self) -> dict[str, Any]:
        """The whole answer, once it is complete."""
        choices = [self._choice(index, r) for index, r in enumerate(self._finished())]
        name = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": self.usage(), "rcd": self.rcd()}

    def usage(self) -> dict[str, int]:
        results = self._finished()
        new = sum(r.num_tokens for r in results)
        prompt = sum(r.num_prompt_tokens for r in results[:: self.request.n])  # once for all choices of a prompt
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def rcd(self) -> dict[str, Any]:
        results = self._finished()
        forwards = {kind: sum(r.forwards[kind] for r in results) for kind in results[0].forwards}
        return {
            "settings": results[0].settings,
            "forwards": forwards,
            "tokens_per_forward": round(sum(r.num_tokens for r in results) / max(1, forwards["denoise"]), 3),
            "tokens_per_pass": _tokens_per_pass(results),
            "reference_failures": sum(r.reference_failures for r in results),
            "seconds": round(time.monotonic() - self._started, 4),
        }

    def _finished(self) -> list[DecodeResult]:
        return [r for r in self.results if r is not None]

    def _delta(self, index: int, text: str) -> Iterator[dict[str, Any]]:
        if text:
            self._text[index] += text
            chunk = self._chunk(index, {"content": text} if self.chat else text)
            if self._with_logprobs:
                sent = _within(self._tokens[index], self._text[index])
                self._tokens[index] = self._tokens[index][len(sent) :]
                chunk["choices"][0]["logprobs"] = self._logprobs(sent)
            yield chunk

    def _last_chunk(self, index: int, result: DecodeResult) -> dict[str, Any]:
        """The chunk without content that ends a choice. The last one has the statistics, unless the usage follows."""
        chunk = self._chunk(index, {} if self.chat else "", result.finish_reason)
        chunk["choices"][0]["rcd"] = self._rcd_choice(index, result)
        return chunk | {"rcd": self.rcd()} if self.complete and not self.request.include_usage else chunk

    def _chunk(self, index: int, content: dict[str, str] | str, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.chat else "text": content, "logprobs": None}
        return self._envelope([{**choice, "finish_reason": finish_reason}])

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = {**self._head, "object": name, "choices": choices}
        return chunk | {"usage": None} if self.request.include_usage else chunk

    def _choice(self, index: int, r: DecodeResult) -> dict[str, Any]:
        text = {"message": {"role": "assistant", "content": r.text}} if self.chat else {"text": r.text}
        rcd = self._rcd_choice(index, r)
        if (detail := self.request.return_trace) != "none":
            rcd["steps"] = [trace_step(step, detail) for step in r.steps]
        logprobs = self._logprobs(_within(r.tokens, r.text)) if self._with_logprobs else None
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": r.finish_reason, "rcd": rcd}

    def _rcd_choice(self, index: int, r: DecodeResult) -> dict[str, Any]:
        facts = {"seed": r.settings["seed"], "forwards": r.forwards, "reference_failures": r.reference_failures}
        prompt = self.request.question(index) if self.task else None
        valid = check(self.task, prompt, r.text) if self.task and prompt is not None else None
        return facts if valid is None else facts | {"valid": valid}

    def _logprobs(self, tokens: list[NewToken]) -> dict[str, Any]:
        if self.chat:
            return {"content": [_chat_logprob(t.own) | _top(t) for t in tokens], "refusal": None}
        return {
            "tokens": [t.own.text for t in tokens],
            "token_logprobs": [t.own.logprob for t in tokens],
            "top_logprobs": [{one.text: one.logprob for one in (*t.top, t.own)} for t in tokens],
            "text_offset": [t.start for t in tokens],
        }


def _tokens_per_pass(results: list[DecodeResult]) -> float | None:
    """As the report counts: denoising passes, and reference passes by their FLOPs."""
    if any(r.forwards["reference"] and r.reference_weight is None for r in results):
        return None
    passes = sum(r.forwards["denoise"] + r.forwards["reference"] * (r.reference_weight or 0.0) for r in results)
    return round(sum(r.num_tokens for r in results) / max(1.0, passes), 3)


def _within(tokens: list[NewToken], text: str) -> list[NewToken]:
    """The tokens that begin in the text. A stop string cuts it, or it lags behind the tokens."""
    return [t for t in tokens if t.start < len(text)]


def _chat_logprob(t: TokenLogprob) -> dict[str, Any]:
    return {"token": t.text, "logprob": t.logprob, "bytes": list(t.text.encode()) if t.is_text else None}


def _top(t: NewToken) -> dict[str, Any]:
    return {"top_logprobs": [_chat_logprob(one) for one in t.top]}


def model_facts(task: str) -> dict[str, Any]:
    """ModelFacts of a model of this task."""
    chosen = get_task(task)
    about = getattr(chosen, "about", None)
    return {"task": task, "about": about, "infill": chosen.infill, "example": example_of_task(task)}


def trace_step(step: dict[str, Any], detail: TraceDetail) -> dict[str, Any]:
    """A decoding.Step in full, or its counts and means (entropy in nats)."""
    if detail == "steps":
        return step
    num_masked = len(step["masked"])
    means = {f"mean_{name}": sum(step[name]) / max(1, num_masked) for name in ("confidence", "entropy", "alpha")}
    return {"num_masked": num_masked, "num_committed": len(step["committed"]), **means}
