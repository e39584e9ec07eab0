"""The application against its own schema: schemathesis derives valid and invalid requests from /openapi.json.

RCD_SCHEMATHESIS_CASES: number of random requests, by default 300; boundary cases come on top.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.pipelines.serving.http.fake_backend import app_of

NUM_CASES = int(os.environ.get("RCD_SCHEMATHESIS_CASES", "300"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
STATUSES: Counter[int] = Counter()

schema = schemathesis.openapi.from_asgi("/openapi.json", app_of())


@schema.hook
def map_body(_: Any, body: Any) -> Any:
    """Three of four requests name the served model, which schemathesis cannot guess."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 4:
        return {**body, "model": "m"}
    return body


def bounded(share: float) -> Any:
    return settings(
        max_examples=max(1, int(share * NUM_CASES)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@schema.include(method="POST").parametrize()
@bounded(0.4)  # of two routes
def test_decoding_conforms(case: schemathesis.Case) -> None:
    STATUSES[case.call_and_validate(checks=CHECKS).status_code] += 1


@schema.include(method="GET").parametrize()
@bounded(0.2 / 6)  # of six
def test_the_rest_conforms(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


def test_the_cases_reached_the_model() -> None:
    if not STATUSES:
        pytest.skip("needs the tests above")
    assert sum(STATUSES.values()) >= 0.7 * NUM_CASES and STATUSES[200] and STATUSES[400] and STATUSES[404]
