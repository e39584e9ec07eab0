"""The figures of a model: one name and one meaning in /metrics and in Ray's metrics."""

from __future__ import annotations

import re

_KINDS = ("prefill", "denoise", "store", "reference")
_MEANINGS = {
    "requests_total": "Requests answered to their end",
    "tokens_total": "Tokens of the answers",
    "cancelled_total": "Requests whose client was gone before the end",
    "failed_total": "Requests lost because a pass failed",
    "reference_failures_total": "Blocks that started from zero because the reference could not answer",
    "retries_total": "Tries after which a request went to another replica",
    "admitted_total": "Requests that got a place in the batch",
    "queue_seconds_total": "Time they waited for it, before their first pass",
    "queue_length": "Requests that wait for a place in the batch",
    "running": "Requests in the batch",
    "replicas": "Replicas that answer",
    "reused_tokens_total": "Prompt tokens found in the cache",
    "reused_prefills_total": "Prefill passes of single requests that this saved",
    "merged_stores_total": "Finished blocks stored along with the next one's first pass",
    "choose_seconds_total": "Time of head and reduction, on a GPU with the wait for the passes",
    **{f"{kind}_passes_total": f"Batched {kind} passes" for kind in _KINDS},
    **{f"{kind}_seconds_total": f"Time of the batched {kind} passes" for kind in _KINDS},
    **{f"{kind}_forwards_total": f"{kind.capitalize()} passes of single requests, answered ones" for kind in _KINDS},
}


def metric_name(figure: str) -> str:
    """Of a figure of `statistics()`. Ray puts `ray_` before it."""
    return f"rcd_{re.sub(r'[^a-zA-Z0-9_]', '_', figure)}"


def meaning(figure: str) -> str:
    return _MEANINGS.get(figure, "Of a model")


def is_counter(figure: str) -> bool:
    return figure.endswith("_total")
