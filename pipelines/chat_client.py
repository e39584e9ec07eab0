"""The HTTP interface from the other side: what `rcd chat` asks a served model, and its answer as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from rcd_core.errors import UserError

CONNECT_S = 10.0
SILENCE_S = 120.0  # the server says something at least every few seconds, however long a block takes
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class ChatClient:
    """One endpoint. Whatever goes wrong is a UserError of one line. api_key: sent as a bearer token, where given."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url is {url!r}; give something like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            trust_env=parts.hostname not in LOOPBACK,  # a proxy of the environment knows nothing of this machine
        )

    def models(self) -> list[str]:
        with self._sent("GET", "/v1/models") as response:
            return [str(card["id"]) for card in _json(response.read())["data"]]

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer. Closing the iterator hangs up, which cancels the request."""
        with self._sent("POST", path, json={**body, "stream": True}) as response:
            for data in server_sent_events(response.iter_bytes()):
                if data == "[DONE]":
                    return
                chunk = _json(data)
                if "error" in chunk:
                    raise UserError(" ".join(str(chunk["error"]["message"]).split()))
                yield chunk
        raise UserError("the stream broke off before its end; what was said of it stands, the rest is lost")

    @contextmanager
    def _sent(self, method: str, path: str, **kwargs: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, self.url + path, **kwargs) as response:
                if response.is_error:
                    about = "--url: " if method == "GET" else ""  # nothing else was given that could be wrong
                    raise UserError(about + _explained(response))
                yield response
        except httpx.ConnectError as error:
            raise UserError(f"--url: nothing answers at {self.url} ({error}); is the application running?") from error
        except httpx.ReadTimeout as error:
            raise UserError(f"--url: {self.url} has been silent for {SILENCE_S:g} s") from error
        except httpx.HTTPError as error:
            raise UserError(f"--url: the connection to {self.url} failed: {error or type(error).__name__}") from error


def server_sent_events(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each event, however the stream is cut; comments are left out."""
    rest, data = b"", list[str]()
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in (raw.removesuffix(b"\r").decode() for raw in lines):
            if line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            elif not line and data:
                yield "\n".join(data)
                data = []


def _explained(response: httpx.Response) -> str:
    """What the server says in OpenAI's shape, else its status."""
    try:
        message = " ".join(str(json.loads(response.read())["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered {response.status_code} {response.reason_phrase}"
    return f"{message}; set RCD_API_KEY" if response.status_code == 401 else message


def _json(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"--url: the answer is no JSON ({error}); is this an RCD endpoint?") from error
    if not isinstance(found, dict):
        raise UserError("--url: the answer is no JSON object; is this an RCD endpoint?")
    return found
