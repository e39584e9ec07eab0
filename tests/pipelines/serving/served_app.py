"""The HTTP interface over small random models on a free port, without Ray, for tests of its clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn

from pipelines.serving.backend import ServedModel
from pipelines.serving.engine_thread import EngineThread
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits
from rcd_core import Decoder, DecodeSettings, LocalReference, ModelConfig, new_model
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.text.tokenizer import mask_token_id, stop_token_ids, train_tokenizer

MODEL, BASELINE = "tiny", "tiny-baseline"
SETTINGS = DecodeSettings(residual=True, start="zero", confidence_threshold=0.5, max_new_tokens=24)
PLAIN = DecodeSettings(confidence_threshold=0.5, max_new_tokens=24)


@dataclass
class Served:
    """engines: by model id. Both models share the tokenizer."""

    url: str
    engines: dict[str, EngineThread]
    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def turns(self, *texts: str) -> list[int]:
        """The ids of a conversation that starts with a user turn."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return self.ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def text(self, ids: list[int], settings: DecodeSettings, model: str = MODEL) -> str:
        """The library's own answer."""
        out = Decoder(self.engines[model].model).generate([ids], settings)[0]
        return str(self.tokenizer.decode(out.token_ids, skip_special_tokens=True))

    def statistics(self, model: str = MODEL) -> dict[str, float]:
        with ThreadPoolExecutor(1) as thread:  # this thread may already run an event loop
            return thread.submit(lambda: asyncio.run(self.engines[model].statistics())).result()


@contextmanager
def served(
    *,
    template: bool = True,
    baseline: bool = True,
    about: dict[str, Any] | None = None,
    keys: tuple[str, ...] = (),
    task: str | None = None,
) -> Iterator[Served]:
    """template False: the model has no chat template. keys: API keys. task: what the models were trained for."""
    tokenizer = train_tokenizer(["the quick fox over the lazy dog 漢字 🙂 Über 123456\n"] * 50, 340)
    if not template:
        tokenizer.chat_template = None
    defaults = {MODEL: SETTINGS} | ({BASELINE: PLAIN} if baseline else {})
    engines = {
        name: EngineThread(
            _model(tokenizer, seed), tokenizer, _reference(tokenizer), max_batch=4, max_length=256, max_queue=4
        )
        for seed, name in enumerate(defaults)
    }
    models = {
        name: ServedModel(backend=engines[name], defaults=settings, created=7, task=task)
        for name, settings in defaults.items()
    }
    try:
        app = create_app(models, {"version": "1.2.3", "key": "k", **(about or {})}, ApiLimits(api_keys=keys))
        with listening(app) as url:
            yield Served(url, engines, tokenizer)
    finally:
        for engine in engines.values():
            engine.close()


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port. Yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def _model(tokenizer: Any, seed: int, width: int = 32) -> DiffusionModel:
    info = CheckpointInfo(mask_token_id(tokenizer), stop_token_ids(tokenizer), tokenizer.pad_token_id, 8)
    sizes = ModelConfig(
        family="sdar",
        hidden_size=width,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=32,
        max_positions=256,
    )
    model = new_model(sizes, vocab_size=len(tokenizer), info=info, seed=seed)
    with torch.no_grad():  # so that it is confident about some tokens, and attends to others
        model.lm_head_weight.mul_(8.0)
        model.backbone.model.layers[0].self_attn.o_proj.weight.mul_(8.0)
        model.embedding.weight[model.mask_token_id] *= 0.1
    return model


def _reference(tokenizer: Any) -> LocalReference:
    return LocalReference(_model(tokenizer, 9, width=16))
