"""Completions of an OpenAI-compatible endpoint, for evaluation: one prompt in, one answer out, however long it takes.

Our own endpoint (its model cards are owned by "rcd") takes DecodeSettings flat in the body and tells its passes and the
settings in effect. Of any other only text and numbers of tokens are known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from pipelines.chat_client import LOOPBACK
from rcd_core.errors import UserError

CONNECT_S = 10.0
ANSWER_S = 3600.0  # a long answer behind a long queue
PATIENCE_S = 600.0  # without an answer to a request that is worth another try
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
RETRIED = (429, 502, 503, 504)
# What any OpenAI-compatible server understands, under our names.
COMMON = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p"}


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """tokens: as the stage `evaluate` counts them, the stop token included where the endpoint is ours. forwards (passes
    by kind) and settings (as in effect): None where the endpoint does not tell. seconds: from request to answer,
    without the wait for another try. fingerprint: of the deployment that answered."""

    text: str
    tokens: int
    finish_reason: str
    forwards: dict[str, int] | None
    settings: dict[str, Any] | None
    reference_failures: int
    seconds: float
    fingerprint: str | None


class Endpoint:
    """May be used from many threads. UserError: what the endpoint refuses, and what does not get better in time."""

    def __init__(self, url: str, api_key: str | None = None, patience_s: float = PATIENCE_S) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url is {url!r}; give something like http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.patience_s = patience_s
        self._http = httpx.Client(
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            trust_env=parts.hostname not in LOOPBACK,  # a proxy of the environment knows nothing of this machine
        )

    def models(self) -> dict[str, bool]:
        """Model id -> whether it is served by this project."""
        body, _ = self._asked("GET", "/models")
        try:
            return {str(card["id"]): card.get("owned_by") == "rcd" for card in body["data"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--url: {self.url}/models is no list of models ({error}); is this the API's root?"
            ) from error

    def answer(
        self, model: str, prompt: str, settings: Mapping[str, Any], *, infill: bool, ours: bool, seed: int
    ) -> HttpAnswer:
        """One user turn, or one canvas to fill in. settings: DecodeSettings fields; others' endpoints take COMMON."""
        body: dict[str, Any] = {"model": model, "seed": seed}
        body |= settings if ours else {COMMON[name]: value for name, value in settings.items()}
        if infill:
            found, seconds = self._asked("POST", "/completions", body | {"prompt": prompt, "infill": True})
        else:
            message = {"role": "user", "content": prompt}
            found, seconds = self._asked("POST", "/chat/completions", body | {"messages": [message]})
        try:
            return _answer(found, seconds, infill, ours)
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.url}: the answer lacks {error}; is this an OpenAI-compatible endpoint?") from error

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[Any, float]:
        """(JSON, seconds of the try that succeeded). Tries again where that may help, as long as the patience lasts."""
        begun, wait_s = time.monotonic(), FIRST_WAIT_S
        while True:
            sent = time.monotonic()
            advised: float | None = None
            try:
                response = self._http.request(method, self.url + path, json=body)
                if not response.is_error:
                    return response.json(), time.monotonic() - sent
                why = _explained(response)
                if response.status_code not in RETRIED:
                    raise UserError(f"{self.url} refuses: {why}")
                advised = _seconds(response.headers.get("Retry-After"))
            except httpx.TransportError as error:
                why = f"the connection failed ({error or type(error).__name__})"
            except ValueError as error:
                raise UserError(f"{self.url}{path}: the answer is no JSON ({error})") from error
            pause = wait_s if advised is None else advised
            if time.monotonic() + pause - begun > self.patience_s:
                raise UserError(f"{self.url}: no answer in {self.patience_s:g} s; the last try: {why}")
            time.sleep(pause)
            wait_s = min(LONGEST_WAIT_S, 2 * wait_s)


def api_key() -> str | None:
    """The key to send, from the environment."""
    return os.environ.get("RCD_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def _answer(body: Any, seconds: float, infill: bool, ours: bool) -> HttpAnswer:
    choice = body["choices"][0]
    told = body["rcd"] if ours else None
    reason = str(choice.get("finish_reason"))
    # The stop token was decoded too, as `evaluate` counts it; an infill ends when all is filled.
    stopped = ours and not infill and reason == "stop"
    return HttpAnswer(
        text=str(choice["text"] if infill else choice["message"]["content"] or ""),
        tokens=int(body["usage"]["completion_tokens"]) + stopped,
        finish_reason=reason,
        forwards=told and told["forwards"],
        settings=told and told["settings"],
        reference_failures=told["reference_failures"] if told else 0,
        seconds=seconds,
        fingerprint=body.get("system_fingerprint"),
    )


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; a date, which few servers send, counts as not given."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def _explained(response: httpx.Response) -> str:
    try:
        message = " ".join(str(response.json()["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        message = f"{response.status_code} {response.reason_phrase}"
    return f"{message}; set RCD_API_KEY" if response.status_code == 401 else message
