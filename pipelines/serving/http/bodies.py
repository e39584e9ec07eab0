"""Request bodies: the OpenAI fields that are supported, and every DecodeSettings field by its own name.

Unknown fields are rejected, because a misspelt threshold that is silently ignored would spoil an experiment. Types are
strict: "0.5" is no number. null means the same as leaving a field out, except for model, prompt and messages.
neutral.py lists fields that are accepted only where they ask for nothing.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, create_model
from pydantic_core import CoreSchema, PydanticUseDefault, core_schema

from pipelines.recipe.descriptions import DESCRIPTIONS
from pipelines.serving.backend import DecodeRequest
from pipelines.serving.http import neutral
from rcd_core.decode_settings import COUNTS, SHARES, DecodeSettings
from rcd_core.errors import UserError

DECODE_FIELDS = tuple(f.name for f in fields(DecodeSettings) if f.name != "trace")  # over HTTP: return_trace
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 256
MAX_INT = 2**31 - 1
SEED_LIMIT = 2**63

TraceDetail = Literal["none", "summary", "steps"]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair
        raise ValueError(f"character {error.start} is half a surrogate pair, which is not text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Seed = Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)]

STRICT = ConfigDict(extra="forbid", strict=True)


class _NullIsDefault:
    """Marks a field whose value is never None but for which clients may send null, which means the default."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(_not_null, core_schema.nullable_schema(handler(source)))


def _not_null(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


Switch = Annotated[bool, _NullIsDefault()]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]

# DecodeSettings checks these bounds too; here they are part of /openapi.json.
_BOUNDED: dict[str, Any] = {
    "seed": Seed,
    # JSON has lists, strict tuples reject them.
    "stop_token_ids": Annotated[tuple[TokenId, ...], Field(strict=False, max_length=MAX_STOP_TOKEN_IDS)],
    **dict.fromkeys(COUNTS, Count),
    **dict.fromkeys(("temperature", "cfg_scale"), Annotated[float, Field(ge=0)]),
    **dict.fromkeys(("entropy_bound", "residual_temperature", "alpha_scale"), Annotated[float, Field(gt=0)]),
    **dict.fromkeys(SHARES, Annotated[float, Field(ge=0, le=1)]),
    "top_p": Annotated[float, Field(gt=0, le=1)],
}


def _description(name: str) -> str:
    """As in recipes, without what null means there: here it means the server's default."""
    return re.sub(r"; null\b[^;]*\.$", ".", DESCRIPTIONS["DecodeSettings"][name])


# One optional field per setting, under the setting's own name.
_HINTS = get_type_hints(DecodeSettings)
_OPTIONAL: dict[str, Any] = {
    name: (_BOUNDED.get(name, _HINTS[name]) | None, Field(None, description=_description(name)))
    for name in DECODE_FIELDS
}
_OPTIONAL["top_k"] = (
    Annotated[int, Field(ge=-1, le=MAX_INT)] | None,
    Field(None, description=_description("top_k").rstrip(".") + "; -1 and 0 mean all."),
)
_BodyFields: Any = create_model("_BodyFields", __config__=STRICT, **_OPTIONAL, **neutral.fields(neutral.BODY))
_MessageFields: Any = create_model("_MessageFields", __config__=STRICT, **neutral.fields(neutral.MESSAGE))
_PartFields: Any = create_model("_PartFields", __config__=STRICT, **neutral.fields(neutral.PART))
_StreamFields: Any = create_model("_StreamFields", __config__=STRICT, **neutral.fields(neutral.STREAM))


class StreamOptions(_StreamFields):  # type: ignore[misc]
    """Options of a stream."""

    include_usage: Switch = Field(False, description="End the stream with a chunk that has `usage` and `rcd`.")


class Request(_BodyFields):  # type: ignore[misc]
    """Fields of both POST routes."""

    model: str = Field(description="Id of a served model.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), _NullIsDefault()] = Field(1, description="Choices per prompt.")
    max_tokens: Count | None = Field(None, description="Most new tokens; by default the served model's, if they fit.")
    max_completion_tokens: Count | None = Field(None, description="Same as `max_tokens`.")
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Texts that end the answer; they are not part of it."
    )
    stream: Switch = Field(False, description="Send finished blocks as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    best_of: Count | None = Field(None, description="Only 1 or `n`: no choice is discarded.")
    user: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    metadata: dict[str, str] | None = Field(None, description="No effect.")
    parallel_tool_calls: bool | None = Field(None, description="No effect.")
    return_trace: Annotated[TraceDetail, _NullIsDefault()] = Field(
        "none", description="Report every denoising pass, as counts and means or in full."
    )
    trace_candidates: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _NullIsDefault()] = Field(
        0,
        description='With `return_trace: "steps"`: most probable tokens to report of each predicted position.',
    )
    timeout_s: Annotated[float, Field(ge=0.1)] | None = Field(
        None, description="Deadline in seconds; at most, and by default, the server's."
    )

    def settings(self, defaults: DecodeSettings) -> DecodeSettings:
        """The server's defaults, overridden by this request. Raises UserError naming the field."""
        values = {name: value for name in DECODE_FIELDS if (value := getattr(self, name)) is not None}
        if (length := self.length()) is not None:
            values["max_new_tokens"] = length
        if values.get("top_k", 1) < 1:
            values["top_k"] = None
        return replace(defaults, **values, trace=self.return_trace != "none")

    def length(self) -> int | None:
        """The requested number of new tokens, under any of its names."""
        names = ("max_tokens", "max_completion_tokens", "max_new_tokens")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(set(values.values())) > 1:
            raise UserError(f"{' and '.join(values)} differ but mean the same; send only one")
        return next(iter(values.values()), None)

    def check_size(self, most: int) -> None:
        """Raises UserError if the prompts of all choices have more than `most` characters and token ids."""
        field, size = self._size()
        size += sum(map(len, self.stops()))
        if size * self.n > most:
            choices = f" for each of {self.n} choices" if self.n > 1 else ""
            what = f"{field} and stop have" if self.stops() else f"{field} has"
            raise UserError(f"{what} {size} characters{choices}; at most {most} in all: shorten it")

    @abstractmethod
    def _size(self) -> tuple[str, int]:
        """The field of the prompts, and the number of its characters and token ids in one choice."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Most probable tokens to report with each new token's logprob; None: no logprobs. Raises UserError."""

    @abstractmethod
    def question(self, index: int) -> str | None:
        """What a choice answers, if it is text."""

    def stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops:
            raise UserError("stop has an empty string; remove it")
        return stops

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Request):
    """Body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text] | list[TokenId] | list[list[TokenId]], Field(min_length=1)] = Field(
        description="A text, token ids, or a list of either."
    )
    logprobs: Annotated[NumLogprobs | None, BeforeValidator(lambda v: None if v is False else v)] = Field(
        None, description="Report the logprob of each new token, and this many most probable ones."
    )
    top_logprobs: Annotated[Any, neutral.Only((0,))] = Field(None, description="Only 0: a field of chats.")
    infill: Switch = Field(False, description="Fill every `<|MASK|>` of the prompt and return the filled text.")

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def _size(self) -> tuple[str, int]:
        return "prompt", sum(map(len, self.prompts()))

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def question(self, index: int) -> str | None:
        prompt = self.prompts()[index // self.n]
        return prompt if isinstance(prompt, str) else None

    def decode_requests(self, defaults: DecodeSettings) -> Iterator[DecodeRequest]:
        if self.infill and (self.length() is not None or self.stops()):
            raise UserError("max_tokens and stop do not go with infill, which only fills masks")
        if self.infill and getattr(self, "stop_token_ids", None):
            raise UserError("stop_token_ids do not go with infill, which only fills masks; leave them out")
        prompts = self.prompts()
        if len(prompts) * self.n > MAX_CHOICES:
            raise UserError(
                f"prompt has {len(prompts)} prompts and n is {self.n}; at most {MAX_CHOICES} choices in all"
            )
        for prompt in prompts:
            yield from _choices(self, prompt, None, defaults, self.infill)


class TextPart(_PartFields):  # type: ignore[misc]
    """A part of a message. Only text is supported."""

    type: Literal["text"] = Field(description="Kind of the part.")
    text: Text = Field(description="The parts of a message are joined.")


class Message(_MessageFields):  # type: ignore[misc]
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who says it; `developer` means `system`."
    )
    content: Text | list[TextPart] = Field(description="A text, or text parts.")
    name: str | None = Field(None, description="No effect.")
    reasoning: str | None = Field(None, description="No effect.")
    reasoning_content: str | None = Field(None, description="No effect.")

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)] = Field(description="The conversation.")
    logprobs: Annotated[Switch, BeforeValidator(lambda v: False if v == 0 else v)] = Field(
        False, description="Report the logprob of each new token."
    )
    top_logprobs: NumLogprobs | None = Field(
        None, description="Report this many most probable tokens too. Only with `logprobs`."
    )

    def _size(self) -> tuple[str, int]:
        return "messages", sum(len(m.role) + len(m.plain()["content"]) for m in self.messages)

    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise UserError(f"top_logprobs is {self.top_logprobs}, which needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def question(self, index: int) -> str | None:
        """The last message of the user."""
        return next((m.plain()["content"] for m in reversed(self.messages) if m.role == "user"), None)

    def decode_requests(self, defaults: DecodeSettings) -> Iterator[DecodeRequest]:
        yield from _choices(self, None, [m.plain() for m in self.messages], defaults, False)


def _choices(
    request: Request,
    prompt: str | list[int] | None,
    messages: list[dict[str, str]] | None,
    defaults: DecodeSettings,
    infill: bool,
) -> Iterator[DecodeRequest]:
    """One DecodeRequest per choice of a prompt; a given seed counts up over them."""
    if request.include_usage and not request.stream:
        raise UserError("stream_options needs stream: true; remove it")
    if request.best_of not in (None, 1, request.n):
        raise UserError(f"best_of is {request.best_of}; every choice is returned, so it must be 1 or n: leave it out")
    if request.trace_candidates and request.return_trace != "steps":
        raise UserError(
            f'trace_candidates is {request.trace_candidates}, which needs return_trace: "steps"; set it, or leave '
            "trace_candidates out"
        )
    settings = request.settings(defaults)
    for i in range(request.n):
        yield DecodeRequest(
            prompt=prompt,
            messages=messages,
            infill=infill,
            settings=settings if settings.seed is None else replace(settings, seed=_following(settings.seed, i)),
            fixed_length=request.length() is not None,
            stop=request.stops(),
            streamed=request.stream,
            logprobs=request.num_logprobs(),
            candidates=request.trace_candidates,
        )


def _following(seed: int, i: int) -> int:
    """The seed of choice i; the largest one of 64 bits is followed by the smallest."""
    return (seed + i + (1 << 63)) % (1 << 64) - (1 << 63)
