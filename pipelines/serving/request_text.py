"""Between texts and the engine: a DecodeRequest becomes a Sequence, and what the engine tells of it becomes text.

Prompts and conversations are tokenized here, and nowhere else in the served application.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import asdict, replace
from typing import Any, Literal

from pipelines.serving.backend import DecodeEvent, DecodeRequest, DecodeResult, Finished, TextDelta, TraceStep
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.stream import BlockDone, Event, PassDone, TextStream
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.tasks import MASK_TEXT
from rcd_core.text.tokenizer import stop_token_ids

# Beyond these, logits divided or multiplied leave the range of 32-bit numbers, and no token is ever sure.
_BOUNDS = {"temperature": (1e-4, 1e4), "residual_temperature": (1e-4, 1e4), "cfg_scale": (0.0, 1e4)}


class RequestText:
    """What a model's tokenizer and its limits make of requests. max_length: positions of a request, prompt included."""

    def __init__(self, model: DiffusionModel, tokenizer: Any, *, has_reference: bool, max_length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_reference, self.max_length = has_reference, max_length
        self.stop_ids = tuple(dict.fromkeys((*model.info.eos_token_ids, *stop_token_ids(tokenizer))))

    def sequence(self, request: DecodeRequest) -> Sequence:
        """The request as the engine takes it. Raises UserError naming the field of a request that it would refuse."""
        ids, settings = self._ids(request), request.settings
        self._check_ids("stop_token_ids", settings.stop_token_ids or ())
        for name, (low, high) in _BOUNDS.items():
            if (value := getattr(settings, name)) and not low <= value <= high:
                raise UserError(f"{name} is {value:g}; it must be at least {low:g} and at most {high:g}")
        if settings.stop_token_ids is None:
            settings = replace(settings, stop_token_ids=self.stop_ids)
        field = "prompt" if request.messages is None else "messages"
        block_length = settings.block_length or self.model.info.block_length
        if block_length > self.max_length:
            raise UserError(f"block_length is {block_length}; at most {self.max_length} positions are served here")
        if not request.infill:
            settings = self._fitted(field, len(ids), block_length, request, settings)
        elif len(ids) > self.max_length:
            raise UserError(f"{field} has {len(ids)} tokens; at most {self.max_length} are served here: shorten it")
        committed = self._usable(request, settings, len(ids), block_length)
        return make_sequence(
            self.model,
            ids,
            settings,
            infill=request.infill,
            has_reference=self.has_reference,
            committed=committed,
        )

    def _fitted(
        self, field: str, num_prompt: int, block_length: int, request: DecodeRequest, settings: DecodeSettings
    ) -> DecodeSettings:
        """max_new_tokens within the positions that whole blocks leave behind the prompt: blocks are counted from the
        canvas' beginning (SDAR) or from the prompt's end (LLaDA)."""
        whole = self.max_length - (num_prompt if self.model.blocks_from_prompt_end else 0)
        room = whole // block_length * block_length - (0 if self.model.blocks_from_prompt_end else num_prompt)
        if room < 1:
            raise UserError(
                f"{field} has {num_prompt} tokens, which leaves no room for a block of {block_length} in the "
                f"{self.max_length} positions served here; shorten it"
            )
        if settings.max_new_tokens > room and request.fixed_length:
            raise UserError(
                f"max_tokens is {settings.max_new_tokens}, but behind {num_prompt} tokens of {field} there is room for "
                f"{room}: a request has at most {self.max_length} positions here, in whole blocks of {block_length}"
            )
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    def _usable(
        self, request: DecodeRequest, settings: DecodeSettings, num_prompt: int, block_length: int
    ) -> list[int] | None:
        """The committed tokens, where going on from them ends as the whole would have; else None: begin anew."""
        from_end = self.model.blocks_from_prompt_end
        # Caches and residuals that reach beyond a block are made of what was masked when they were made.
        local = not from_end or (settings.cache in (None, "none") and settings.residual_scope == "block")
        origin = 0 if from_end else num_prompt
        whole_blocks = (origin + len(request.committed)) % block_length == 0
        if request.committed and local and whole_blocks and not settings.compat_passes:
            return list(request.committed)
        return None

    def _ids(self, request: DecodeRequest) -> list[int]:
        if isinstance(request.prompt, list):
            self._check_ids("prompt", request.prompt)
            return request.prompt
        text = request.prompt
        if text is None:
            text = self._conversation(request.messages or [])
        if request.infill:
            text = text.replace(MASK_TEXT, self.tokenizer.convert_ids_to_tokens(self.model.mask_token_id))
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_ids(self, field: str, ids: Many[int]) -> None:
        bad = next((i for i in ids if not 0 <= i < self.model.vocab_size), None)
        if bad is not None:
            raise UserError(f"{field} holds token id {bad}; ids run from 0 to {self.model.vocab_size - 1}")

    def _conversation(self, messages: list[dict[str, str]]) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("messages cannot be used: the model's tokenizer has no chat template; use /v1/completions")
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise UserError(f"messages are refused by the model's chat template: {error}") from error


class Answer:
    """One request's answer as it becomes certain; `finished` once a stop string or the engine has ended it.

    What `request` says has been sent already is not sent again.
    """

    def __init__(self, tokenizer: Any, request: DecodeRequest, sequence: Sequence) -> None:
        self.tokenizer, self.request, self.sequence = tokenizer, request, sequence
        self.finished = False
        self._stream = TextStream(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), request.stop)
        self._text, self._ids = "", list[int]()
        self._told, self._known = request.told, len(request.committed)
        self._steps: list[dict[str, Any]] = []

    def events(self, news: Many[Event], forwards: dict[str, int]) -> list[DecodeEvent]:
        """What to tell of the engine's news; forwards: passes of the request so far, by kind."""
        found: list[DecodeEvent] = []
        reason: Literal["stop", "length"] | None = None
        for event in news:
            if isinstance(event, PassDone):
                # A viewer has no tokenizer. A token by itself may be half a character; text is told in TextDeltas.
                texts = [str(self.tokenizer.decode([i])) for i in event.step.argmax]
                self._steps.append({**vars(event.step), "argmax_text": texts})
                found.append(TraceStep(step=self._steps[-1]))
            elif isinstance(event, BlockDone):
                self._ids += event.token_ids
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
        if len(self._text) > self._told or len(self._ids) > self._known:
            found.append(TextDelta(text=self._text[self._told :], token_ids=self._ids[self._known :]))
            self._told, self._known = max(self._told, len(self._text)), max(self._known, len(self._ids))
        if reason:
            self.finished = True
            found.append(Finished(result=self._result(reason, forwards)))
        return found

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def _result(self, reason: Literal["stop", "length"], forwards: dict[str, int]) -> DecodeResult:
        num_prompt = len(self.sequence.canvas) if self.request.infill else self.sequence.num_prompt
        return DecodeResult(
            text=self._text,
            finish_reason=reason,
            num_prompt_tokens=num_prompt,
            num_tokens=self.num_tokens,
            forwards=forwards,
            settings=asdict(self.sequence.settings),
            steps=self._steps,
            reference_failures=self.sequence.reference_failures,
        )
