"""The models of the served application: Target, and Reference behind it.

To the target come texts; between the two travel token ids and sparse ReferenceSignals, never whole distributions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.openai_types import DecodeRequest, DecodeResult
from rcd_core import (
    Decoder,
    DecodeSettings,
    Generation,
    LocalReference,
    ReferenceSignals,
    UserError,
    WarmStart,
    load_model,
)
from rcd_core.tasks import MASK_TEXT
from rcd_core.tokenizer import load_tokenizer, stop_token_ids

MAX_BATCH = 64
REFERENCE_TIMEOUT_S = 120.0


class RemoteReference:
    """The reference deployment as the engine sees it: the same question and answer as of a LocalReference.

    top_k: ids per position where a request wants all of them, which is too much to send.
    """

    def __init__(self, handle: DeploymentHandle, top_k: int) -> None:
        self.handle = handle
        self.top_k = top_k

    def signals(self, requests: Sequence[WarmStart]) -> list[Any]:
        """Blocks; for the engine's thread, not for an event loop."""
        asked = [r if r.top_k is not None else replace(r, top_k=self.top_k) for r in requests]
        replies = self.handle.signals.remote(asked).result(timeout_s=REFERENCE_TIMEOUT_S)
        return [ReferenceSignals.from_bytes(reply) for reply in replies]


class Reference:
    """Holds the reference model; answers with signals in their Arrow form."""

    def __init__(self, checkpoint: str, device: str) -> None:
        self.model = LocalReference(load_model(checkpoint, device=device))

    async def signals(self, requests: list[WarmStart]) -> list[bytes]:
        return await asyncio.to_thread(self._signals, requests)

    def _signals(self, requests: list[WarmStart]) -> list[bytes]:
        found = self.model.signals(requests)
        return [signals.to_bytes() for signals in found if isinstance(signals, ReferenceSignals)]

    async def check_health(self) -> None:
        """Answers from the event loop, so never waits for a pass of the model."""


@dataclass(frozen=True)
class _Job:
    ids: list[int]
    settings: DecodeSettings
    infill: bool


class Target:
    """Holds a target model and its tokenizer; decodes requests that come at the same time in one batch."""

    def __init__(self, checkpoint: str, device: str, reference: DeploymentHandle | None, reference_top_k: int) -> None:
        self.model = load_model(checkpoint, device=device)
        self.tokenizer: Any = load_tokenizer(checkpoint)
        remote = RemoteReference(reference, reference_top_k) if reference else None
        self.decoder = Decoder(self.model, remote, max_batch=MAX_BATCH)
        self.stop_ids = tuple(dict.fromkeys((*self.model.info.eos_token_ids, *stop_token_ids(self.tokenizer))))
        self.thread = ThreadPoolExecutor(max_workers=1)  # one pass at a time, off the event loop

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        """Raises UserError before it joins a batch, so that one bad request fails alone."""
        job = self._job(request)
        self.decoder.check(job.ids, job.settings, infill=job.infill)
        generation: Generation = await self._batch(job)
        return self._result(request, job, generation)

    async def ready(self) -> None:
        """Answers once the constructor is through."""

    async def check_health(self) -> None:
        """Answers from the event loop, so never waits for a pass of the model."""

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.01)
    async def _batch(self, jobs: list[_Job]) -> list[Generation]:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._run, jobs)

    def _run(self, jobs: list[_Job]) -> list[Generation]:
        found: dict[int, Generation] = {}
        for decode, infill in ((self.decoder.generate, False), (self.decoder.infill, True)):
            mine = [i for i, job in enumerate(jobs) if job.infill == infill]
            outputs = decode([jobs[i].ids for i in mine], [jobs[i].settings for i in mine])
            found |= dict(zip(mine, outputs, strict=True))
        return [found[i] for i in range(len(jobs))]

    # -- text to ids and back
    def _job(self, request: DecodeRequest) -> _Job:
        ids, settings = self._ids(request), request.settings
        if settings.stop_token_ids is None:
            settings = replace(settings, stop_token_ids=self.stop_ids)
        if not request.infill and not request.fixed_length:
            block_length = settings.block_length or self.model.info.block_length
            room = (self.model.max_positions - len(ids)) // block_length * block_length
            if room > 0:
                settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        return _Job(ids, settings, request.infill)

    def _ids(self, request: DecodeRequest) -> list[int]:
        if isinstance(request.prompt, list):
            return request.prompt
        text = request.prompt
        if text is None:
            text = self._conversation(request.messages or [])
        if request.infill:
            text = text.replace(MASK_TEXT, self.tokenizer.convert_ids_to_tokens(self.model.mask_token_id))
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _conversation(self, messages: list[dict[str, str]]) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("messages cannot be used: the model's tokenizer has no chat template; use /v1/completions")
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise UserError(f"messages are refused by the model's chat template: {error}") from error

    def _result(self, request: DecodeRequest, job: _Job, generation: Generation) -> DecodeResult:
        if job.infill:
            text, reason = self.tokenizer.decode(generation.canvas_ids), "stop"
        else:
            text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
            reason = "length" if generation.finish_reason == "length" else "stop"
            if cuts := [at for stop in request.stop if (at := text.find(stop)) >= 0]:
                text, reason = text[: min(cuts)], "stop"
        return DecodeResult(
            text=text,
            finish_reason="length" if reason == "length" else "stop",
            num_prompt_tokens=len(job.ids),
            num_tokens=len(generation.token_ids),
            forwards=asdict(generation.num_forwards),
            settings=asdict(generation.settings),
            steps=[asdict(step) for step in generation.steps],
        )
