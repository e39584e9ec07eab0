"""HTTP client of OpenAI-compatible endpoints: streams for `rcd chat`, whole answers for `rcd evaluate --url`.

Our own endpoint (its model cards say owned_by "rcd") takes DecodeSettings fields in the body, and reports passes and
effective settings under `rcd`. Other endpoints report only text and token counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from httpx_sse import connect_sse

from rcd_core.errors import UserError

CONNECT_S = 10.0
ANSWER_S = 3600.0  # a long answer behind a long queue
SILENCE_S = 120.0  # of a stream; our server sends a comment every few seconds while it works
PATIENCE_S = 600.0  # of retries
FIRST_CONTACT_S = 10.0  # the same, before anything has answered: a wrong address should not take minutes
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
RETRIED = (429, 502, 503, 504)
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# DecodeSettings fields that every OpenAI-compatible server has, and OpenAI's names for them.
COMMON = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p"}


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """One whole answer.

    tokens: as the stage `evaluate` counts them, so with the stop token where the endpoint is ours. forwards (passes by
    kind) and settings (effective): None where the endpoint does not report them. seconds: of the successful request,
    without retries. fingerprint: of the deployment that answered.
    """

    text: str
    tokens: int
    finish_reason: str
    forwards: dict[str, int] | None
    settings: dict[str, Any] | None
    reference_failures: int
    seconds: float
    fingerprint: str | None


def check_url(url: str) -> str:
    """The host of an endpoint. UserError where `url` has none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url is {url!r}; give something like http://127.0.0.1:8000")
    return parts.hostname


class Endpoint:
    """One endpoint; thread-safe. api_key: sent as bearer token. patience_s: how long to retry a full queue or a lost
    connection; 0 never retries. Every failure is a UserError of one line."""

    def __init__(self, url: str, api_key: str | None = None, patience_s: float = PATIENCE_S) -> None:
        host = check_url(url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.patience_s = patience_s
        self._http = httpx.Client(
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            trust_env=host not in LOOPBACK,  # a proxy of the environment cannot reach this machine
        )

    def models(self) -> dict[str, bool]:
        """Model id -> whether this project serves it. The first contact: gives up soon."""
        body, _ = self._request("GET", "/v1/models", patience_s=min(self.patience_s, FIRST_CONTACT_S))
        try:
            return {str(card["id"]): card.get("owned_by") == "rcd" for card in body["data"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--url: {self.url}/v1/models is not a list of models ({error!r})") from error

    def answer(
        self, model: str, prompt: str, settings: Mapping[str, Any], *, infill: bool, ours: bool, seed: int
    ) -> HttpAnswer:
        """Send one user turn, or one text to infill. settings: DecodeSettings fields; only COMMON unless ours."""
        body: dict[str, Any] = {"model": model, "seed": seed}
        body |= settings if ours else {COMMON[name]: value for name, value in settings.items()}
        if infill:
            answer, seconds = self._request("POST", "/v1/completions", body | {"prompt": prompt, "infill": True})
        else:
            message = {"role": "user", "content": prompt}
            answer, seconds = self._request("POST", "/v1/chat/completions", body | {"messages": [message]})
        try:
            return _parse_answer(answer, seconds, infill, ours)
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.url}: the answer lacks {error}; is this an OpenAI-compatible endpoint?") from error

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed answer. Closing the iterator cancels the request."""
        timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        try:
            with connect_sse(
                self._http, "POST", self.url + path, json={**body, "stream": True}, timeout=timeout
            ) as source:
                if source.response.is_error:
                    source.response.read()
                    raise UserError(_explain(source.response))
                for event in source.iter_sse():
                    if event.data == "[DONE]":
                        return
                    yield _parse_chunk(event.data)
        except httpx.ReadTimeout as error:
            raise UserError(f"--url: {self.url} has been silent for {SILENCE_S:g} s") from error
        except httpx.TransportError as error:
            raise UserError(f"--url: {self.url}: {_lost(error)}") from error
        raise UserError("the stream ended before the answer did; the text so far is final")

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, patience_s: float | None = None
    ) -> tuple[Any, float]:
        """(JSON, seconds of the successful request). Retries until the patience ends."""
        start, pause = time.monotonic(), FIRST_PAUSE_S
        patience_s = self.patience_s if patience_s is None else patience_s
        while True:
            sent = time.monotonic()
            retry_after: float | None = None
            try:
                response = self._http.request(method, self.url + path, json=body)
                if not response.is_error:
                    return response.json(), time.monotonic() - sent
                reason = _explain(response)
                if response.status_code not in RETRIED:
                    raise UserError(f"--url: {self.url} refuses: {reason}")
                retry_after = _seconds(response.headers.get("Retry-After"))
            except httpx.TransportError as error:
                reason = _lost(error)
            except ValueError as error:
                raise UserError(f"--url: {self.url}{path} does not answer in JSON ({error})") from error
            wait = pause if retry_after is None else retry_after
            if time.monotonic() + wait - start > patience_s:
                tried = f"no answer in {patience_s:g} s; the last try: " if patience_s else ""
                raise UserError(f"--url: {self.url}: {tried}{reason}")
            time.sleep(wait)
            pause = min(LONGEST_PAUSE_S, 2 * pause)


def api_key() -> str | None:
    """The API key of the environment."""
    return os.environ.get("RCD_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def _parse_answer(body: Any, seconds: float, infill: bool, ours: bool) -> HttpAnswer:
    choice = body["choices"][0]
    rcd = body["rcd"] if ours else None
    reason = str(choice.get("finish_reason"))
    # The stop token was decoded too, and `evaluate` counts it. An infill ends without one.
    stop_token = ours and not infill and reason == "stop"
    return HttpAnswer(
        text=str(choice["text"] if infill else choice["message"]["content"] or ""),
        tokens=int(body["usage"]["completion_tokens"]) + stop_token,
        finish_reason=reason,
        forwards=rcd and rcd["forwards"],
        settings=rcd and rcd["settings"],
        reference_failures=rcd["reference_failures"] if rcd else 0,
        seconds=seconds,
        fingerprint=body.get("system_fingerprint"),
    )


def _parse_chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise UserError(f"--url: an event is not JSON ({error}); is this an OpenAI-compatible endpoint?") from error
    if not isinstance(chunk, dict):
        raise UserError("--url: an event is not a JSON object; is this an OpenAI-compatible endpoint?")
    if "error" in chunk:
        raise UserError(" ".join(str(chunk["error"]["message"]).split()))
    return chunk


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds. The date form, which few servers send, counts as missing."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def _lost(error: httpx.TransportError) -> str:
    return f"the connection failed ({error or type(error).__name__})"


def _explain(response: httpx.Response) -> str:
    """The message of an error in OpenAI's shape, else the status."""
    try:
        message = " ".join(str(response.json()["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        message = f"{response.url} answered {response.status_code} {response.reason_phrase}"
    return f"{message}; set RCD_API_KEY" if response.status_code == 401 else message
