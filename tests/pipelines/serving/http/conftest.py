from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.pipelines.serving.http.fake_backend import Echo, app_of


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def client(echo: Echo) -> TestClient:
    return TestClient(app_of(m=echo))
