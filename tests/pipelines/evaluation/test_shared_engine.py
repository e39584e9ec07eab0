"""One engine for several threads: their requests are decoded together, and a failure reaches all of them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipelines.evaluation.shared_engine import SharedEngine
from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.request import make_sequence
from tests.pipelines.signal_run import GOLDEN

SETTINGS = DecodeSettings(block_length=4, max_new_tokens=16, stop_token_ids=(), residual=False)
PROMPTS = [[i, i + 1, i + 2] for i in range(8)]


class WatchedEngine(Engine):
    """Waits before its first pass until all requests have come. together: requests in each pass."""

    together: list[int]

    def step(self) -> Any:
        if not hasattr(self, "together"):
            self.together = []
            time.sleep(0.5)
        done = super().step()
        self.together.append(len(self.running) + len(done))
        return done


def engine() -> tuple[WatchedEngine, list[Any]]:
    model = load_model(str(GOLDEN / "sdar_tiny"))
    requests = [make_sequence(model, ids, SETTINGS, infill=False, has_reference=False) for ids in PROMPTS]
    return WatchedEngine(model, None, max_batch=4, max_length=64), requests


def test_threads_fill_one_batch_and_get_their_own_answers() -> None:
    watched, requests = engine()
    shared = SharedEngine(watched)
    with ThreadPoolExecutor(4) as threads:  # pieces of two, a batch of four
        pieces = list(threads.map(lambda i: list(shared.finished(requests[i : i + 2])), range(0, 8, 2)))
    shared.close()
    assert [{id(request) for request, _ in piece} for piece in pieces] == [
        {id(request) for request in requests[i : i + 2]} for i in range(0, 8, 2)
    ]
    until_the_last_began = watched.together[1 : watched.together.index(3)]
    assert set(until_the_last_began) == {4}, "full, though every piece is half a batch"
    assert len(until_the_last_began) > len(watched.together) / 2
    alone = Decoder(watched.model).generate(PROMPTS, SETTINGS)
    assert [request.output().token_ids for request in requests] == [answer.token_ids for answer in alone]
    assert all(seconds > 0 for piece in pieces for _, seconds in piece)


@pytest.mark.parametrize("place", ["step", "add"])
def test_an_error_ends_the_work_of_all_threads(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, requests = engine()
    shared = SharedEngine(watched)

    def fail(*args: Any) -> Any:
        if place == "step" and not hasattr(watched, "together"):  # the first pass: all requests join before the second
            return WatchedEngine.step(watched)
        raise MemoryError("no memory")

    monkeypatch.setattr(watched, place, fail)
    with ThreadPoolExecutor(2) as threads:
        work = [threads.submit(lambda part=part: list(shared.finished(part))) for part in (requests[:2], requests[2:])]
        errors = [future.exception() for future in work]
    assert all(isinstance(error, MemoryError) for error in errors)
    with pytest.raises(MemoryError):
        list(shared.finished(requests[:1]))
    shared.close()
