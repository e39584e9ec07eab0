"""A rolling update to another checkpoint under load: no request fails, no stream is cut, and every text is from one
checkpoint. About two minutes; `make drill` runs it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from ray import serve as ray_serve

from pipelines import serve
from pipelines.run.directory import StageContext
from tests.pipelines.serving.http_clients import Reply, ask, in_double_precision, keep_asking, texts, words
from tests.pipelines.serving.serve_run import START, save_model, serve_context, until
from tests.pipelines.serving.test_serve_faults import alive

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
# Large enough that the long streams outlast Serve's default grace period of 20 s.
LARGER = {"hidden_size": 256, "num_layers": 6, "intermediate_size": 512}
SHORT, LONG = 64, 600  # tokens
SEEDS = range(1, 9)


@pytest.fixture(scope="module")
def contexts(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StageContext, StageContext]]:
    """(old, new): two runs of one recipe whose targets differ. The old one is deployed."""
    old = serve_context(tmp_path_factory.mktemp("old"), LARGER, baseline=False)
    port = old.recipe.deploy.port
    new = replace(serve_context(tmp_path_factory.mktemp("new"), LARGER, baseline=False, port=port), key="key-2")
    save_model(Path(new.checkpoint("target")), {**START, **LARGER}, seed=77)
    in_double_precision(new)
    serve.run(in_double_precision(old))
    yield old, new
    ray_serve.shutdown()


def test_a_rolling_update_fails_no_request(contexts: tuple[StageContext, StageContext]) -> None:
    old, new = contexts
    url = serve.endpoint(old.recipe)
    lengths = ((SHORT, SEEDS), (LONG, range(3)))
    expected = {tokens: [texts(c, seeds, tokens) for c in contexts] for tokens, seeds in lengths}
    assert all(a[seed] != b[seed] for a, b in expected.values() for seed in a)
    stop = threading.Event()
    [before] = alive("Target")

    def ask_once(seed: int) -> Reply:
        with httpx.Client(timeout=300, trust_env=False) as http:
            return ask(http, url, words(seed, LONG, stream=seed % 2 == 0))

    with ThreadPoolExecutor(8) as threads:
        short = [threads.submit(keep_asking, url, number, SEEDS, SHORT, stop) for number in range(4)]
        long = [threads.submit(ask_once, seed) for seed in range(3)]
        try:
            until(lambda: any(future.running() for future in long), 60)
            serve.run(new)
            replies = [future.result(timeout=400) for future in long]
            until(lambda: before not in alive("Target"), 60)
        finally:
            stop.set()
        replies += [reply for future in short for reply in future.result(timeout=100)]

    assert [reply.problem for reply in replies if reply.problem] == []
    from_old, from_new = (
        [reply for reply in replies if reply.text == expected[reply.body["max_tokens"]][which][reply.body["seed"]]]
        for which in (0, 1)
    )
    print(f"\n{len(from_old)} answers of the old checkpoint, {len(from_new)} of the new one, {len(replies)} in all")
    print(f"the slowest: {max(r.seconds for r in replies):.0f} s")
    assert len(from_old) + len(from_new) == len(replies) and from_old and from_new
    switched = min(reply.ended for reply in from_new)
    print(f"old streams ran for {max(r.ended for r in from_old) - switched:.0f} s next to the new checkpoint")
    with httpx.Client(timeout=300, trust_env=False) as http:
        for seed in SEEDS:
            assert ask(http, url, words(seed, SHORT, stream=seed % 2 == 0)).text == expected[SHORT][1][seed]
