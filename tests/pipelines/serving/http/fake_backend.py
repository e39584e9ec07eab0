"""A Backend without a model, behind the real HTTP application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI

from pipelines.serving.backend import (
    DecodeEvent,
    DecodeRequest,
    DecodeResult,
    Finished,
    Overloaded,
    ServedModel,
    TextDelta,
    TraceStep,
    Unavailable,
)
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError

DEFAULTS = DecodeSettings(confidence_threshold=0.9, residual=True, start="reference")
STEP = {
    "masked": [4, 5],
    "argmax": [7, 8],
    "confidence": [0.5, 0.75],
    "entropy": [1.0, 0.5],
    "committed": [5],
    "alpha": [0.25, 0.5],
    "argmax_text": ["<", "p"],
}


class Echo:
    """Answers with the prompt, two characters per event. Some prompts are special, see `stream` and `_refuse`."""

    def __init__(self) -> None:
        self.requests: list[DecodeRequest] = []
        self.open = 0  # unfinished streams

    async def stream(self, request: DecodeRequest) -> AsyncIterator[DecodeEvent]:
        self.requests.append(request)
        self.open += 1
        try:
            self._refuse(request.prompt)
            text = f"<{request.prompt if request.prompt is not None else request.messages}>"
            for start in range(0, len(text), 2):
                await asyncio.sleep(0)
                if request.settings.trace:
                    yield TraceStep(step=STEP)
                yield TextDelta(text=text[start : start + 2], token_ids=[1, 2])
                if request.prompt == "lost":
                    raise Unavailable("the replica was lost")
                if request.prompt == "forever":
                    await asyncio.sleep(3600)
            if request.prompt != "no result":
                yield Finished(result=_result(request, "another text" if request.prompt == "two texts" else text))
        finally:
            self.open -= 1

    async def ready(self) -> None: ...

    async def statistics(self) -> dict[str, float]:
        return {"running": float(self.open), "echoes_total": float(len(self.requests))}

    def _refuse(self, prompt: str | list[int] | None) -> None:
        if prompt == "forbidden":
            raise UserError("temperature is 9.0; this model refuses it")
        if prompt == "full":
            raise Overloaded(1.5)
        if prompt == "broken":
            raise RuntimeError("a replica died")
        if isinstance(prompt, list) and max(prompt, default=0) >= 1000:
            raise UserError(f"the prompt holds token id {max(prompt)}; ids run from 0 to 999")


def app_of(
    limits: ApiLimits | None = ApiLimits(),  # noqa: B008
    tasks: Mapping[str, str] | None = None,
    **backends: Any,
) -> FastAPI:
    """The application with these models, by default one Echo named `m`."""
    models = {
        name: ServedModel(backend=backend, defaults=DEFAULTS, created=7, task=(tasks or {}).get(name))
        for name, backend in (backends or {"m": Echo()}).items()
    }
    return create_app(models, {"version": "1.2", "key": "k"}, limits)


def _result(request: DecodeRequest, text: str) -> DecodeResult:
    return DecodeResult(
        text=text,
        finish_reason="stop",
        num_prompt_tokens=3,
        num_tokens=8,
        forwards={"prefill": 1, "denoise": 4, "store": 0, "reference": 1},
        settings=asdict(replace(request.settings, seed=request.settings.seed or 11)),
        steps=[STEP] * ((len(text) + 1) // 2) if request.settings.trace else [],
        reference_failures=2,
    )
