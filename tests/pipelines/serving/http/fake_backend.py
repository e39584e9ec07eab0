"""A Backend for tests of the HTTP interface: the application is real, only the model behind it is made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

from fastapi.testclient import TestClient

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
    """Answers with what it was asked, in pieces of two characters. Some prompts are special, see `stream`."""

    def __init__(self) -> None:
        self.asked: list[DecodeRequest] = []
        self.open = 0  # streams that are not over
        self.pause_s = 0.0  # before every piece

    async def stream(self, request: DecodeRequest) -> AsyncIterator[DecodeEvent]:
        self.asked.append(request)
        self.open += 1
        try:
            self._refuse(request.prompt)
            text = f"<{request.prompt if request.prompt is not None else request.messages}>"
            for start in range(0, len(text), 2):
                await asyncio.sleep(self.pause_s)
                if request.settings.trace:
                    yield TraceStep(step=STEP)
                yield TextDelta(text=text[start : start + 2], token_ids=[1, 2])
                if request.prompt == "lost on the way":
                    raise Unavailable("the replica was lost")
                if request.prompt == "forever":
                    await asyncio.sleep(3600)
            if request.prompt != "no result":
                yield Finished(result=_result(request, "another text" if request.prompt == "two texts" else text))
        finally:
            self.open -= 1

    async def ready(self) -> None: ...

    async def statistics(self) -> dict[str, float]:
        return {"running": float(self.open), "asked_total": float(len(self.asked))}

    def _refuse(self, prompt: str | list[int] | None) -> None:
        if prompt == "forbidden":
            raise UserError("temperature is 9.0; this model refuses it")
        if prompt == "full":
            raise Overloaded(1.5)
        if prompt == "broken":
            raise RuntimeError("a replica died")
        if isinstance(prompt, list) and max(prompt, default=0) >= 1000:
            raise UserError(f"the prompt holds token id {max(prompt)}; ids run from 0 to 999")


def client_of(echo: Echo, defaults: DecodeSettings) -> TestClient:
    """The application with this one model, `m`."""
    app = create_app({"m": ServedModel(backend=echo, defaults=defaults, created=7)}, {"key": "k"}, ApiLimits())
    return TestClient(app)


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
