from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.pipelines.serving.http.fake_backend import Echo, app_of
from tests.pipelines.serving.http.page import Page
from tests.pipelines.serving.served_app import Served


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def client(echo: Echo) -> TestClient:
    return TestClient(app_of(m=echo))


@pytest.fixture
def page(browser: Any, app: Served) -> Iterator[Page]:
    """The page of a module's `app` in a tab of its own. It must not complain."""
    page = Page(browser, app.url)
    yield page
    page.tab.close()
    assert page.complaints == []
