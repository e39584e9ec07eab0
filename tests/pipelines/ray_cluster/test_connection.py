"""A wrong RAY_ADDRESS is reported within seconds; Ray itself tries for minutes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from pipelines.ray_cluster.connection import CONNECT_S, _require_answer
from rcd_core import UserError


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}/", "[127.0.0.1]:{}"])
def test_an_address_where_nothing_listens(form: str, listening: int) -> None:
    _require_answer(form.format(listening))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(UserError, match=f"{port}.*rcd up"):
        _require_answer(form.format(port))
    assert time.monotonic() - started < CONNECT_S


@pytest.mark.parametrize("address", ["", "auto", "local", "ray://named"])
def test_what_names_no_port_is_left_to_ray(address: str) -> None:
    _require_answer(address)
