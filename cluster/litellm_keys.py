"""The keys of litellm.yaml. LiteLLM calls user_api_key_auth for each request and applies the limits that it returns."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Any

import yaml
from fastapi import Request
from litellm.proxy._types import ProxyException, UserAPIKeyAuth


def keys() -> dict[str, dict[str, Any]]:
    """Key -> limits. Read for each request, so that a change of the file needs no restart."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(Path(os.environ["LITELLM_KEYS_FILE"]).read_text()) or {}
    return found


async def user_api_key_auth(request: Request, api_key: str) -> UserAPIKeyAuth:
    """Raises ProxyException, which is status 401, for an unknown key."""
    for key, limits in keys().items():
        if hmac.compare_digest(key.encode(), api_key.encode()):
            return UserAPIKeyAuth(api_key=key, **limits)
    raise ProxyException(message="unknown key", type="auth_error", param="api_key", code=401)
