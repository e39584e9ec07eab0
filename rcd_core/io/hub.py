"""Repositories on the Hugging Face hub: ids, the commit that a revision names, and copies in the client's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from rcd_core.errors import UserError

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "SHA256SUMS")
TOKENIZER_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10.0  # a driver asks before it plans


def is_hub_id(text: str) -> bool:
    """Whether text has the form owner/name or owner/name@revision of a repository of models."""
    return _ID.fullmatch(text) is not None


def split_hub_id(text: str) -> tuple[str, str | None]:
    """owner/name@revision -> (owner/name, revision). revision: a commit, branch or tag; None: the main branch."""
    match = _ID.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} is no hub id; it must have the form owner/name or owner/name@revision")
    return match["name"], match["revision"]


def commit_of(name: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str:
    """The commit that a revision of owner/name is now: as the hub says, else as it was when it was last downloaded.

    Raises UserError if neither is known.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=_TIMEOUT_S).sha)
    except Exception as error:  # the hub's client has no common base class for its errors
        if cached := cached_snapshot(name, revision, kind):
            return cached.name
        at = f"{name}@{revision}" if revision else name
        raise UserError(f"{at} is not {_where()}: {error}; {remedy(error)}") from error


def cached_snapshot(name: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> Path | None:
    """The directory of a revision in the client's cache, without asking the hub. Its name is the commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True))
    except Exception:
        return None


def snapshot(hub_id: str, patterns: tuple[str, ...]) -> Path:
    """A local copy of a model's files that match. Raises UserError if it is neither on the hub nor in the cache."""
    from huggingface_hub import snapshot_download

    name, revision = split_hub_id(hub_id)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise UserError(f"{hub_id!r} is neither a local directory nor {_where()}: {error}; {remedy(error)}") from error


def remedy(error: BaseException) -> str:
    """What to do about an error of the hub's client. The hub answers 401 for names that do not exist, too."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "correct the name, or for a gated or private one accept its terms and set HF_TOKEN on every node"
    return "correct the name, or download it first"


def _where() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return "in the hub's cache, and HF_HUB_OFFLINE forbids downloads" if offline else "available from the hub"
