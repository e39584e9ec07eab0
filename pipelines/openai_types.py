"""The bodies of the HTTP interface: OpenAI's fields that are honoured, and every DecodeSettings field by its own name.

Anything else is refused: a misspelt threshold that is silently ignored would spoil an experiment.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from rcd_core.decoding.settings import DecodeSettings
from rcd_core.errors import UserError

DECODE_FIELDS = tuple(f.name for f in fields(DecodeSettings))
MAX_CHOICES = 128

# One optional field per setting, under the setting's own name; left out or null means the server's default.
_OPTIONAL: dict[str, Any] = {name: (hint | None, None) for name, hint in get_type_hints(DecodeSettings).items()}
_DecodeFields: Any = create_model("_DecodeFields", __config__=ConfigDict(extra="forbid"), **_OPTIONAL)


class ApiError(Exception):
    """An answer that is no completion, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Request(_DecodeFields):  # type: ignore[misc]
    """What completions and chat have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    user: str | None = None  # whom the request is made for: no effect

    def settings(self, defaults: DecodeSettings) -> DecodeSettings:
        """The server's defaults with what this request changes. Raises UserError naming the field."""
        given = {name: value for name in DECODE_FIELDS if (value := getattr(self, name)) is not None}
        if (length := self.length()) is not None:
            given["max_new_tokens"] = length
        return replace(defaults, **given)

    def length(self) -> int | None:
        """The new tokens asked for, under whichever of their names."""
        names = ("max_tokens", "max_completion_tokens", "max_new_tokens")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(set(given.values())) > 1:
            raise UserError(f"{' and '.join(given)} differ; they mean the same, give one")
        for name, value in given.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be an integer of at least 1")
        return next(iter(given.values()), None)

    def stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops:
            raise UserError("stop holds an empty string; leave it out")
        return stops


class CompletionRequest(Request):
    """POST /v1/completions. infill: fill every mask token (`<|MASK|>`) of the prompt and return the filled text."""

    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]
    infill: bool = False

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def decode_requests(self, defaults: DecodeSettings) -> Iterator[DecodeRequest]:
        if self.infill and (self.length() is not None or self.stops()):
            raise UserError("max_tokens and stop do not go with infill, which fills every mask and adds nothing")
        for prompt in self.prompts():
            yield from _choices(self, prompt, None, defaults, self.infill)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]

    def decode_requests(self, defaults: DecodeSettings) -> Iterator[DecodeRequest]:
        yield from _choices(self, None, [m.plain() for m in self.messages], defaults, False)


def _choices(
    request: Request,
    prompt: str | list[int] | None,
    messages: list[dict[str, str]] | None,
    defaults: DecodeSettings,
    infill: bool,
) -> Iterator[DecodeRequest]:
    """One request per choice of a prompt; a given seed counts up over them."""
    settings = request.settings(defaults)
    for i in range(request.n):
        yield DecodeRequest(
            prompt=prompt,
            messages=messages,
            infill=infill,
            settings=settings if settings.seed is None else replace(settings, seed=settings.seed + i),
            fixed_length=request.length() is not None,
            stop=request.stops(),
        )


# -- between the HTTP interface and a model, wherever it runs --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One prompt (text or token ids) or conversation to decode. fixed_length: the user asked for max_new_tokens;
    otherwise it is the server's default, and gives way where the model has fewer positions left.

    committed, told: a request that goes on after its replica was lost: the new token ids of finished blocks, and how
    many characters of text were sent of them.
    """

    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    infill: bool
    settings: DecodeSettings
    fixed_length: bool
    stop: tuple[str, ...]
    committed: tuple[int, ...] = ()
    told: int = 0


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Text that can no longer change, and the token ids that became final with it (some of their text may be held back:
    half a character, the beginning of a stop string)."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One denoising pass, a decoding.Step as a mapping; only where settings.trace asks for it."""

    step: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event. result.text is the whole text: all deltas together, those before `told` included."""

    result: DecodeResult


DecodeEvent = TextDelta | TraceStep | Finished


class Overloaded(Exception):
    """The queue is full; worth another try in a while."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """forwards: passes by kind (prefill, denoise, store, reference). steps: the trace, where asked for."""

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_tokens: int
    forwards: dict[str, int]
    settings: dict[str, Any]
    steps: list[dict[str, Any]]


def response(request: Request, results: list[DecodeResult], seconds: float) -> dict[str, Any]:
    """The body of an answer: OpenAI's, with what diffusion adds under `rcd`, in all and per choice."""
    chat = isinstance(request, ChatRequest)
    forwards = {kind: sum(r.forwards[kind] for r in results) for kind in results[0].forwards}
    num_tokens = sum(r.num_tokens for r in results)
    num_prompt_tokens = sum(r.num_prompt_tokens for r in results[:: request.n])  # a prompt counts once for its choices
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [_choice(i, result, chat) for i, result in enumerate(results)],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
        },
        "rcd": {
            "settings": results[0].settings,
            "forwards": forwards,
            "tokens_per_forward": round(num_tokens / max(1, forwards["denoise"]), 3),
            "seconds": round(seconds, 4),
        },
    }


def _choice(index: int, result: DecodeResult, chat: bool) -> dict[str, Any]:
    text = {"message": {"role": "assistant", "content": result.text}} if chat else {"text": result.text}
    rcd: dict[str, Any] = {"seed": result.settings["seed"], "forwards": result.forwards}
    if result.settings["trace"]:
        rcd["steps"] = result.steps
    return {"index": index, **text, "logprobs": None, "finish_reason": result.finish_reason, "rcd": rcd}
