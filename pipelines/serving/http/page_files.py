"""The files of the playground, and the headers that they are served with."""

from __future__ import annotations

from pathlib import Path

FILES = Path(__file__).with_name("static")
# The page inserts model output as text only. If that ever failed, the policy would block scripts and requests.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidate, so that a new release is visible at once
}
