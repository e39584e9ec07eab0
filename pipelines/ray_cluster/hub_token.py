"""The driver's token for the Hugging Face hub (HF_TOKEN), in every worker of its jobs, for gated checkpoints and data.

The environment of a runtime env would also bring it there, but Ray shows that on the dashboard and writes it to its
logs. So the token lies in the cluster's key-value store, and a worker takes it when it starts (worker_start.py), where
the node's environment has none.
"""

from __future__ import annotations

import os
import time

TOKEN = "HF_TOKEN"
_NAMESPACE, _KEY = b"rcd", b"hub token"
_WAIT_S = 10.0  # a worker may start before the driver has stored the token


def has() -> bool:
    """Whether this process has a token."""
    return bool(os.environ.get(TOKEN))


def give() -> None:
    """Store the token. Called after ray.init."""
    from ray.experimental.internal_kv import _internal_kv_put

    if token := os.environ.get(TOKEN):
        _internal_kv_put(_KEY, token.encode(), overwrite=True, namespace=_NAMESPACE)


def take() -> None:
    """Run by Ray in each new worker of a job that has a token."""
    from ray.experimental.internal_kv import _internal_kv_get

    deadline = time.monotonic() + _WAIT_S
    while not os.environ.get(TOKEN) and time.monotonic() < deadline:
        if token := _internal_kv_get(_KEY, namespace=_NAMESPACE):
            os.environ[TOKEN] = token.decode()
        else:
            time.sleep(0.05)
