"""A client that records replies, for tests that send many requests, and the library's own answers to compare with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from httpx_sse import EventSource

from pipelines.run.directory import StageContext
from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.text.tokenizer import load_tokenizer
from tests.pipelines.serving.serve_run import tokenizer

SETTINGS = DecodeSettings(
    temperature=1.0, stop_token_ids=(), residual=True, start="reference", residual_top_k=16, policy="sequential"
)


@dataclass
class Reply:
    """problem: why the answer is incomplete, whatever the status. parts, started, ended: times of time.monotonic; parts
    has one per piece of text."""

    body: dict[str, Any]
    status: int = 0
    text: str = ""
    tokens: int = 0
    problem: str = ""
    retry_after: str | None = None
    rcd: dict[str, Any] = field(default_factory=dict)
    parts: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def ask(http: httpx.Client, url: str, body: dict[str, Any], started: threading.Semaphore | None = None) -> Reply:
    """POST a completion; read a stream to the end. Raises nothing. started: released at the first text of a stream."""
    reply = Reply(body)
    try:
        with http.stream("POST", url + "/v1/completions", json=body) as answer:
            reply.status, reply.retry_after = answer.status_code, answer.headers.get("Retry-After")
            if answer.status_code != 200:
                reply.problem = answer.read().decode()
            elif body.get("stream"):
                _read(reply, answer, started)
            else:
                _take(reply, json.loads(answer.read()))
    except httpx.HTTPError as error:
        reply.problem = repr(error)
    reply.ended = time.monotonic()
    return reply


def ask_once(url: str, body: dict[str, Any]) -> Reply:
    """On a connection of its own."""
    with httpx.Client(timeout=10, trust_env=False) as http:
        return ask(http, url, body)


def keep_asking(
    url: str, number: int, seeds: Sequence[int], tokens: int, stop: threading.Event, pause_s: float = 0.0
) -> list[Reply]:
    """Client `number`: streams and whole answers in turn, until `stop` is set."""
    replies: list[Reply] = []
    with httpx.Client(timeout=300, trust_env=False) as http:
        while not stop.wait(pause_s):
            i = number + len(replies)
            replies.append(ask(http, url, words(seeds[i % len(seeds)], tokens, stream=i % 2 == 0)))
    return replies


def _read(reply: Reply, answer: httpx.Response, started: threading.Semaphore | None) -> None:
    for event in EventSource(answer).iter_sse():
        if event.data == "[DONE]":
            return
        chunk = event.json()
        if "error" in chunk:
            reply.problem = event.data
            return
        silent = not reply.parts
        _take(reply, chunk)
        if started and silent and reply.parts:
            started.release()
    reply.problem = "the stream ended early"


def _take(reply: Reply, body: dict[str, Any]) -> None:
    if text := "".join(choice["text"] for choice in body["choices"]):
        reply.text += text
        reply.parts.append(time.monotonic())
    if usage := body.get("usage"):
        reply.tokens = usage["completion_tokens"]
    reply.rcd = body.get("rcd") or reply.rcd


def in_double_precision(context: StageContext) -> StageContext:
    """The same run with its models in float64. In float32, rounding depends on the batch, which can decide a draw at
    the edge between two tokens; with many draws from random weights this does happen."""
    for name in ("target", "reference"):
        path = context.checkpoint(name)
        load_model(path).double().save_pretrained(path, load_tokenizer(path))
    return context


def words(seed: int, tokens: int, stream: bool, **changes: Any) -> dict[str, Any]:
    """A request to a run of serve_run.py, decoded with SETTINGS, by default one token per pass."""
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    settings = {"temperature": 1.0, "stop_token_ids": [], "residual_top_k": 16, "policy": "sequential", **changes}
    return {"model": "tiny-rcd", "prompt": "words", "max_tokens": tokens, "seed": seed, **settings, **options}


def texts(context: StageContext, seeds: Sequence[int], tokens: int, **changes: Any) -> dict[int, str]:
    """The library's answers to `words`, by seed."""
    model, reference = (load_model(context.checkpoint(name)) for name in ("target", "reference"))
    ids = tokenizer()("words", add_special_tokens=False)["input_ids"]
    settings = [replace(SETTINGS, max_new_tokens=tokens, seed=seed, **changes) for seed in seeds]
    answers = Decoder(model, reference).generate([ids] * len(seeds), settings)
    decoded = [tokenizer().decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
    return dict(zip(seeds, decoded, strict=True))
