"""Text on both sides of the engine: a DecodeRequest becomes a Sequence, and the engine's events become text.

Prompts and conversations are tokenized only here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, Literal

from pipelines.serving.backend import (
    DecodeEvent,
    DecodeRequest,
    DecodeResult,
    Finished,
    NewToken,
    TextDelta,
    TokenLogprob,
    TraceStep,
)
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.stream import BlockDone, Event, PassDone, TextStream
from rcd_core.errors import UserError
from rcd_core.evaluation.flops import reference_weight
from rcd_core.families.base import DiffusionModel
from rcd_core.tasks import MASK_TEXT
from rcd_core.text.tokenizer import render_chat, stop_token_ids
from rcd_core.training.plan import ModelShape

MAX_TRACED = 1 << 21  # predictions that the trace of a choice may hold, candidates included: about 100 MB of JSON
# Beyond these bounds the scaled logits overflow float32, and no token is ever committed.
_BOUNDS = {"temperature": (1e-4, 1e4), "residual_temperature": (1e-4, 1e4), "cfg_scale": (0.0, 1e4)}


class RequestText:
    """Checks and tokenizes requests for one model. max_length: positions of a request, prompt included."""

    def __init__(self, model: DiffusionModel, tokenizer: Any, *, has_reference: bool, max_length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_reference, self.max_length = has_reference, max_length
        # No token stands for more characters than the longest one has, so longer texts cannot fit.
        self.max_chars = max_length * max(map(len, tokenizer.get_vocab()))
        self.stop_ids = tuple(dict.fromkeys((*model.info.eos_token_ids, *stop_token_ids(tokenizer))))

    def check_size(self, request: DecodeRequest) -> None:
        """Refuse in no time what is too long to be tokenized. Raises UserError naming the field."""
        field, size, most = "prompt", len(request.prompt or ""), self.max_chars
        if isinstance(request.prompt, list):
            most = self.max_length
        elif request.messages is not None:
            field, size = "messages", sum(len(m["role"]) + len(m["content"]) for m in request.messages)
        if size > most:
            unit = "tokens" if isinstance(request.prompt, list) else "characters"
            raise UserError(
                f"{field} has {size} {unit}, too many for the {self.max_length} positions of this server; shorten it"
            )

    def sequence(self, request: DecodeRequest, ids: list[int]) -> Sequence:
        """The engine's form of the request, whose token ids are `ids`. Raises UserError naming the field that the
        engine would reject."""
        settings = request.settings
        self._check_ids("stop_token_ids", settings.stop_token_ids or ())
        for name, (low, high) in _BOUNDS.items():
            if (value := getattr(settings, name)) and not low <= value <= high:
                raise UserError(f"{name} is {value:g}; it must be at least {low:g} and at most {high:g}")
        if settings.stop_token_ids is None:
            settings = replace(settings, stop_token_ids=self.stop_ids)
        field = "prompt" if request.messages is None else "messages"
        block_length = settings.block_length or self.model.info.block_length
        if block_length > self.max_length:
            raise UserError(f"block_length is {block_length}; this server has at most {self.max_length} positions")
        if not request.infill:
            settings = self._limit_length(field, len(ids), block_length, request, settings)
        elif len(ids) > self.max_length:
            raise UserError(f"{field} has {len(ids)} tokens; this server takes at most {self.max_length}: shorten it")
        committed = self._reusable(request, settings, len(ids), block_length)
        sequence = make_sequence(
            self.model,
            ids,
            settings,
            infill=request.infill,
            has_reference=self.has_reference,
            committed=committed,
            num_logprobs=request.logprobs,
            num_candidates=request.candidates,
        )
        if settings.trace:
            _check_trace(sequence, request.candidates)
        return sequence

    def _limit_length(
        self, field: str, num_prompt: int, block_length: int, request: DecodeRequest, settings: DecodeSettings
    ) -> DecodeSettings:
        """Limit max_new_tokens to the positions that whole blocks leave after the prompt. Blocks are counted from the
        start of the canvas (SDAR) or from the end of the prompt (LLaDA)."""
        whole = self.max_length - (num_prompt if self.model.blocks_from_prompt_end else 0)
        room = whole // block_length * block_length - (0 if self.model.blocks_from_prompt_end else num_prompt)
        if room < 1:
            raise UserError(
                f"{field} has {num_prompt} tokens, which leaves no room for a block of {block_length} within "
                f"{self.max_length} positions; shorten it"
            )
        if settings.max_new_tokens > room and request.fixed_length:
            raise UserError(
                f"max_tokens is {settings.max_new_tokens}, but after {num_prompt} tokens of {field} there is room for "
                f"{room}: a request has at most {self.max_length} positions, in whole blocks of {block_length}"
            )
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    def _reusable(
        self, request: DecodeRequest, settings: DecodeSettings, num_prompt: int, block_length: int
    ) -> list[int] | None:
        """The committed tokens, if resuming from them gives the same answer; else None, which restarts the request."""
        from_end = self.model.blocks_from_prompt_end
        # Caches and residuals that span blocks depend on positions that were masked when they were computed.
        local = not from_end or (settings.cache in (None, "none") and settings.residual_scope == "block")
        if settings.max_live_blocks is not None:
            local = settings.max_live_blocks == 1
        origin = 0 if from_end else num_prompt
        whole_blocks = (origin + len(request.committed)) % block_length == 0
        if request.committed and local and whole_blocks and not settings.compat_passes:
            return list(request.committed)
        return None

    def token_ids(self, request: DecodeRequest) -> list[int]:
        """The prompt in tokens. Raises UserError naming the field."""
        if isinstance(request.prompt, list):
            self._check_ids("prompt", request.prompt)
            return request.prompt
        text = request.prompt
        if text is None:
            text = self._conversation(request.messages or [])
        if request.infill:
            mask = self.tokenizer.convert_ids_to_tokens(self.model.mask_token_id)
            if mask is None:
                raise UserError(
                    f"infill cannot be used with a text: the tokenizer has no token of id {self.model.mask_token_id}, "
                    "the model's mask; send token ids"
                )
            text = text.replace(MASK_TEXT, mask)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        bad = next((i for i in ids if not 0 <= i < self.model.vocab_size), None)
        if bad is not None:
            raise UserError(f"{field} holds token id {bad}; ids run from 0 to {self.model.vocab_size - 1}")

    def _conversation(self, messages: list[dict[str, str]]) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("messages cannot be used: the model's tokenizer has no chat template; use /v1/completions")
        try:
            return render_chat(self.tokenizer, messages, add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"messages cannot be used: {error}") from error


class AnswerText:
    """Turns the engine's events of one request into DecodeEvents. `finished` is set by a stop string or the last event.

    Text that the client of a resumed request already has is not sent again. reference: size of the reference model, if
    it is known by the end.
    """

    def __init__(
        self,
        tokenizer: Any,
        request: DecodeRequest,
        sequence: Sequence,
        reference: Callable[[], ModelShape | None] = lambda: None,
    ) -> None:
        self.tokenizer, self.request, self.sequence = tokenizer, request, sequence
        self.reference = reference
        self.finished = False
        self._stream = TextStream(self._decode, request.stop)
        self._unstopped, self._unstopped_length = TextStream(self._decode), 0  # where each token starts
        self._text, self._ids, self._tokens = "", list[int](), list[NewToken | None]()
        self._num_sent, self._num_ids_sent = request.num_sent, len(request.committed)
        self._steps: list[dict[str, Any]] = []

    def events(self, engine_events: Iterable[Event], forwards: dict[str, int]) -> list[DecodeEvent]:
        """The events to send. forwards: passes of the request so far, by kind."""
        events: list[DecodeEvent] = []
        reason: Literal["stop", "length"] | None = None
        for event in engine_events:
            if isinstance(event, PassDone):
                self._steps.append(event.step.readable(lambda ids: str(self.tokenizer.decode(ids))))
                events.append(TraceStep(step=self._steps[-1]))
            elif isinstance(event, BlockDone):
                self._ids += event.token_ids
                self._tokens += self._new_tokens(event)
                if not self.request.infill:
                    self._text += self._stream.push(event.token_ids)
            else:
                reason = "length" if event.generation.finish_reason == "length" else "stop"
                if self.request.infill:
                    self._text = str(self.tokenizer.decode(event.generation.canvas_ids))
                else:
                    self._text += self._stream.finish()
        if self._stream.stopped:
            reason = "stop"
        if len(self._text) > self._num_sent or len(self._ids) > self._num_ids_sent:
            text, ids = self._text[self._num_sent :], self._ids[self._num_ids_sent :]
            events.append(TextDelta(text=text, token_ids=ids, tokens=_known(self._tokens[self._num_ids_sent :])))
            self._num_sent = max(self._num_sent, len(self._text))
            self._num_ids_sent = max(self._num_ids_sent, len(self._ids))
        if reason:
            self.finished = True
            events.append(Finished(result=self._result(reason, forwards)))
        return events

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def _result(self, reason: Literal["stop", "length"], forwards: dict[str, int]) -> DecodeResult:
        num_prompt = len(self.sequence.canvas) if self.request.infill else self.sequence.num_prompt
        shape = self.reference() if forwards["reference"] else None
        return DecodeResult(
            text=self._text,
            finish_reason=reason,
            num_prompt_tokens=num_prompt,
            num_tokens=self.num_tokens,
            forwards=forwards,
            settings=asdict(self.sequence.settings),
            steps=self._steps,
            reference_failures=self.sequence.reference_failures,
            tokens=_known(self._tokens),
            reference_weight=reference_weight(self.sequence, self.sequence.output(), shape) if shape else None,
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _new_tokens(self, event: BlockDone) -> list[NewToken | None]:
        """One for each of the event's tokens, if logprobs were requested. None: committed by a lost replica."""
        tokens: list[NewToken | None] = []
        for token_id, logprobs in zip(event.token_ids, event.logprobs, strict=False):
            start, text = self._unstopped_length, self._unstopped.push([token_id])
            self._unstopped_length += len(text)
            if logprobs is None:
                tokens.append(None)
                continue
            own = self._named(token_id, logprobs.logprob)
            if text.endswith(own.text):  # it may come after a part of a character that was held back
                start = self._unstopped_length - len(own.text)
            tokens.append(NewToken(own, [self._named(*pair) for pair in logprobs.top], start))
        return tokens

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        text = str(self.tokenizer.decode([token_id]))
        if is_text := "\ufffd" not in text:
            return TokenLogprob(text, logprob, is_text)
        return TokenLogprob(str(self.tokenizer.convert_ids_to_tokens(token_id)), logprob, is_text)


def _known(tokens: list[NewToken | None]) -> list[NewToken]:
    return [token for token in tokens if token is not None]


def _check_trace(sequence: Sequence, candidates: int) -> None:
    """Raise UserError for a trace that would fill the server's memory: a block is predicted in every of its passes."""
    steps = sequence.settings.denoising_steps
    lengths = [end - start for start, end in sequence.blocks]
    most = sum(length * max(length, steps) for length in lengths) * (1 + candidates)
    if most > MAX_TRACED:
        raise UserError(
            f"return_trace would report up to {most:,} predictions of a choice, at most {MAX_TRACED:,} are possible; "
            "lower trace_candidates, block_length or max_tokens, or leave return_trace out"
        )
