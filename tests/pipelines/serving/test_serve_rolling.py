"""The application is deployed again, with another checkpoint, while clients are at it: nobody is turned away, no stream
is cut, and every text is one checkpoint's. About two minutes; `make drill` runs it.
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
from tests.pipelines.serving.http_clients import Reply, ask, in_double_precision, texts, words
from tests.pipelines.serving.serve_run import START, save_model, serve_context, until
from tests.pipelines.serving.test_serve_faults import alive

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
# Large enough that the long streams outlast the 20 s that Serve by itself gives a replica that goes.
LARGER = {"hidden_size": 256, "num_layers": 6, "intermediate_size": 512}
SHORT, LONG = 64, 600  # tokens
SEEDS = range(1, 9)


@pytest.fixture(scope="module")
def contexts(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StageContext, StageContext]]:
    """Old and new: two runs of one recipe whose targets differ. The old one is deployed."""
    old = serve_context(tmp_path_factory.mktemp("old"), LARGER, baseline=False)
    port = old.recipe.deploy.port
    new = replace(serve_context(tmp_path_factory.mktemp("new"), LARGER, baseline=False, port=port), key="key-2")
    save_model(Path(new.checkpoint("target")), {**START, **LARGER}, seed=77)
    in_double_precision(new)
    serve.run(in_double_precision(old))
    yield old, new
    ray_serve.shutdown()


def test_a_new_checkpoint_comes_without_a_failed_request(contexts: tuple[StageContext, StageContext]) -> None:
    old, new = contexts
    url = serve.endpoint(old.recipe)
    want = {tokens: [texts(c, seeds, tokens) for c in contexts] for tokens, seeds in ((SHORT, SEEDS), (LONG, range(3)))}
    assert all(a[seed] != b[seed] for a, b in want.values() for seed in a)
    over = threading.Event()
    [before] = alive("Target")

    def keep_asking(number: int) -> list[Reply]:
        """Streams and whole answers in turn."""
        found: list[Reply] = []
        with httpx.Client(timeout=300, trust_env=False) as http:
            while not over.is_set():
                i = number + len(found)
                found.append(ask(http, url, words(SEEDS[i % len(SEEDS)], SHORT, stream=i % 2 == 0)))
        return found

    def ask_once(seed: int) -> Reply:
        with httpx.Client(timeout=300, trust_env=False) as http:
            return ask(http, url, words(seed, LONG, stream=seed % 2 == 0))

    with ThreadPoolExecutor(8) as threads:
        short = [threads.submit(keep_asking, number) for number in range(4)]
        long = [threads.submit(ask_once, seed) for seed in range(3)]
        try:
            until(lambda: any(future.running() for future in long), 60)
            serve.run(new)
            found = [future.result(timeout=400) for future in long]
            until(lambda: before not in alive("Target"), 60)
        finally:
            over.set()
        found += [reply for future in short for reply in future.result(timeout=100)]

    assert [reply.problem for reply in found if reply.problem] == []
    from_old, from_new = (
        [reply for reply in found if reply.text == want[reply.body["max_tokens"]][which][reply.body["seed"]]]
        for which in (0, 1)
    )
    print(f"\n{len(from_old)} answers of the old checkpoint, {len(from_new)} of the new one, {len(found)} in all")
    print(f"the slowest: {max(r.seconds for r in found):.0f} s")
    assert len(from_old) + len(from_new) == len(found) and from_old and from_new
    switched = min(reply.ended for reply in from_new)
    print(f"streams went on for {max(r.ended for r in from_old) - switched:.0f} s beside the new checkpoint")
    with httpx.Client(timeout=300, trust_env=False) as http:
        for seed in SEEDS:
            assert ask(http, url, words(seed, SHORT, stream=seed % 2 == 0)).text == want[SHORT][1][seed]
