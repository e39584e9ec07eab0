"""API keys of the HTTP interface: where they come from, and who needs some. The driver imports this, so it is light."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.recipe.model import Recipe
from rcd_core.errors import UserError

KEYS, KEYS_FILE = "RCD_API_KEYS", "RCD_API_KEYS_FILE"


def api_keys(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys in RCD_API_KEYS (comma separated) and in the file RCD_API_KEYS_FILE (one per line, # starts a comment).
    Raises UserError if a variable is set but has no key, because the server would be open to everyone."""
    keys: list[str] = []
    if (listed := environment.get(KEYS)) is not None:
        keys += _require_keys(listed.split(","), KEYS)
    if (path := environment.get(KEYS_FILE)) is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{KEYS_FILE} is {path!r}, which cannot be read: {error}; name a text file") from error
        keys += _require_keys([line.partition("#")[0] for line in lines], f"{KEYS_FILE} ({path})")
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


def check(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> None:
    """Called before the first stage of a job that deploys. Raises UserError for unusable keys, and if everyone who
    reaches `deploy.host` could send requests, unless the recipe allows it."""
    deploy = recipe.deploy
    check_host("deploy.host", deploy.host, api_keys(environment), deploy.allow_without_keys, "here")


def check_host(name: str, host: str, keys: tuple[str, ...], allow_without_keys: bool, where: str) -> None:
    """Raises UserError, naming the setting `name`, if everyone who reaches `host` could send requests and that is not
    allowed. where: the environment without keys."""
    if not (keys or allow_without_keys or is_loopback(host)):
        raise UserError(
            f"{name} is {host!r}, beyond this machine, but there are no API keys {where}; set {KEYS} or {KEYS_FILE}, "
            "or allow_without_keys: true to serve everyone"
        )


def _require_keys(keys: list[str], source: str) -> list[str]:
    keys = [key.strip() for key in keys if key.strip()]
    if any(not key.isascii() or not key.isprintable() for key in keys):
        raise UserError(f"{source} has a key with a character that HTTP headers do not carry; use printable ASCII")
    if not keys:
        raise UserError(f"{source} has no key; add one, or unset the variable to serve this machine only, without keys")
    return keys
