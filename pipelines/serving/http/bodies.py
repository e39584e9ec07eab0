"""The bodies of the HTTP interface: OpenAI's fields that are honoured, and every DecodeSettings field by its own name.

Anything else is refused: a misspelt threshold that is silently ignored would spoil an experiment. Types are strict: the
text "0.5" is no number. Null is as good as left out, for every field but model, prompt and messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, create_model
from pydantic_core import CoreSchema, PydanticUseDefault, core_schema

from pipelines.serving.backend import DecodeRequest
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError

DECODE_FIELDS = tuple(f.name for f in fields(DecodeSettings) if f.name != "trace")  # over HTTP: return_trace
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_INT = 2**31 - 1
SEED_LIMIT = 2**63

TraceDetail = Literal["none", "summary", "steps"]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no text
        raise ValueError(f"character {error.start} is half a surrogate pair, which is no text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Seed = Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)]

STRICT = ConfigDict(extra="forbid", strict=True)


class _NullIsDefault:
    """Marks a field whose value is never None, but for which null may be sent: it means that nothing is given."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(_not_null, core_schema.nullable_schema(handler(source)))


def _not_null(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


# Clients send null for what their user left out.
Switch = Annotated[bool, _NullIsDefault()]

# DecodeSettings refuses what is out of these bounds too; here they are for /openapi.json to tell.
_BOUNDED: dict[str, Any] = {
    "seed": Seed,
    "stop_token_ids": Annotated[tuple[TokenId, ...], Field(strict=False)],  # a list in JSON, so not strictly a tuple
    **dict.fromkeys(("block_length", "denoising_steps", "max_new_tokens", "top_k", "residual_top_k"), Count),
    **dict.fromkeys(("temperature", "cfg_scale"), Annotated[float, Field(ge=0)]),
    **dict.fromkeys(("entropy_bound", "residual_temperature", "alpha_scale"), Annotated[float, Field(gt=0)]),
    "confidence_threshold": Annotated[float, Field(ge=0, le=1)],
    "top_p": Annotated[float, Field(gt=0, le=1)],
}


# One optional field per setting, under the setting's own name; left out or null means the server's default.
_HINTS = get_type_hints(DecodeSettings)
_OPTIONAL: dict[str, Any] = {name: (_BOUNDED.get(name, _HINTS[name]) | None, None) for name in DECODE_FIELDS}
_DecodeFields: Any = create_model("_DecodeFields", __config__=STRICT, **_OPTIONAL)


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: Switch = False


class Request(_DecodeFields):  # type: ignore[misc]
    """What completions and chat have in common.

    return_trace: what comes back of every denoising pass, counts and means or all of it. timeout_s: seconds after which
    to give up, at most the server's.
    """

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), _NullIsDefault()] = 1
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: Switch = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # whom the request is made for: no effect
    return_trace: Annotated[TraceDetail, _NullIsDefault()] = "none"
    timeout_s: Annotated[float, Field(ge=0.1)] | None = None

    def settings(self, defaults: DecodeSettings) -> DecodeSettings:
        """The server's defaults with what this request changes. Raises UserError naming the field."""
        given = {name: value for name in DECODE_FIELDS if (value := getattr(self, name)) is not None}
        if (length := self.length()) is not None:
            given["max_new_tokens"] = length
        return replace(defaults, **given, trace=self.return_trace != "none")

    def length(self) -> int | None:
        """The new tokens asked for, under whichever of their names."""
        names = ("max_tokens", "max_completion_tokens", "max_new_tokens")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(set(given.values())) > 1:
            raise UserError(f"{' and '.join(given)} differ; they mean the same, give one")
        return next(iter(given.values()), None)

    def stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops:
            raise UserError("stop holds an empty string; leave it out")
        return stops

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Request):
    """POST /v1/completions. infill: fill every mask token (`<|MASK|>`) of the prompt and return the filled text."""

    prompt: Text | Annotated[list[Text] | list[TokenId] | list[list[TokenId]], Field(min_length=1)]
    infill: Switch = False

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def decode_requests(self, defaults: DecodeSettings) -> Iterator[DecodeRequest]:
        if self.infill and (self.length() is not None or self.stops()):
            raise UserError("max_tokens and stop do not go with infill, which fills every mask and adds nothing")
        prompts = self.prompts()
        if len(prompts) * self.n > MAX_CHOICES:
            raise UserError(f"prompt holds {len(prompts)} prompts, with n {self.n}; at most {MAX_CHOICES} in all")
        for prompt in prompts:
            yield from _choices(self, prompt, None, defaults, self.infill)


class TextPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = STRICT
    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

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
    if request.stream_options and not request.stream:
        raise UserError("stream_options goes with stream: true; leave it out")
    settings = request.settings(defaults)
    for i in range(request.n):
        yield DecodeRequest(
            prompt=prompt,
            messages=messages,
            infill=infill,
            settings=settings if settings.seed is None else replace(settings, seed=settings.seed + i),
            fixed_length=request.length() is not None,
            stop=request.stops(),
            streamed=request.stream,
        )
