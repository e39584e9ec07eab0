"""The benchmark of the engine runs to its end on every CPU."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from tests.benchmarks import engine


def test_tokens_that_differ_between_batch_sizes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.random_model(replace(engine.DEMO, num_layers=1), 40).double()
    alone = engine.authors_loop

    def with_another_first_token(*arguments: Any) -> list[int]:
        return [-1, *alone(*arguments)[1:]]

    assert engine.batched_against_single(model, Namespace(requests=2, repeats=1))["differing_tokens"] == 0
    monkeypatch.setattr(engine, "authors_loop", with_another_first_token)
    assert engine.batched_against_single(model, Namespace(requests=2, repeats=1))["differing_tokens"] == 2
