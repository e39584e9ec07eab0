"""A checkpoint whose head has NaN, on real Ray: its requests fail with the place named, and nothing waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
import ray.serve
from safetensors.torch import load_file, save_file

from pipelines import evaluate, serve
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.run.messages import user_message
from rcd_core.io import checksums
from tests.fault_table import FaultTable
from tests.pipelines.evaluate_run import make_recipe
from tests.pipelines.evaluate_run import make_run as make_run  # a fixture
from tests.pipelines.serving.http_clients import words
from tests.pipelines.serving.serve_run import serve_context

pytestmark = [pytest.mark.drill, pytest.mark.timeout(400)]
NAN = "a checkpoint with NaN in its head"


def break_head(directory: Path) -> Callable[[], None]:
    """Returns a function that mends it."""
    file = directory / "model.safetensors"
    whole = load_file(file)
    sound = {name: tensor.clone() for name, tensor in whole.items()}
    whole.get("lm_head.weight", whole["model.embed_tokens.weight"])[3:] = float("nan")
    save_file(whole, file, metadata={"format": "pt"})
    (directory / checksums.FILE).unlink(missing_ok=True)  # a model that was trained so, not damaged afterwards
    return lambda: save_file(sound, file, metadata={"format": "pt"})


@pytest.mark.faults(NAN, "evaluate")
def test_an_evaluation_keeps_the_answers_of_the_other_models(
    make_run: Callable[[Recipe], StageContext],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault_table: FaultTable,
) -> None:
    ctx = make_run(make_recipe(tmp_path, variants={}, resources={"evaluate_actors": 1}))
    model = Path(ctx.run.stage_directory("target")) / "model"
    mend = break_head(model)
    with pytest.raises(Exception) as caught:
        evaluate.run(ctx)
    message = user_message(caught.value)
    assert message and str(model) in message and "the head, whose weights are not finite" in message, message
    kept = answers(ctx)
    assert kept.get("seqd", 0) == 24 and "target/zero" not in kept, kept
    mend()
    evaluate.run(ctx)
    assert answers(ctx) == {"seqd": 24, "target/zero": 24, "target/reference": 24}
    fault_table.add(
        "ended with one message that names the head; the answers of the other model were kept", "one message"
    )


def answers(ctx: StageContext) -> dict[str, int]:
    """Decoded answers on disk by method."""
    counts: dict[str, int] = {}
    for path in sorted((Path(ctx.directory) / "parts").rglob("*.parquet")):
        for name in pq.read_table(path)["arm"].to_pylist():
            counts[name] = counts.get(name, 0) + 1
    return counts


@pytest.mark.faults(NAN, "deploy")
def test_an_endpoint_fails_its_requests_and_goes_on(ray_cluster: str, tmp_path: Path, fault_table: FaultTable) -> None:
    """The baseline beside it answers."""
    ctx = serve_context(tmp_path, start="zero", min_replicas=1, max_replicas=1)
    model = Path(ctx.run.stage_directory("target")) / "model"
    break_head(model)
    serve.run(ctx)
    try:
        url = serve.endpoint(ctx.recipe) + "/v1/completions"
        with httpx.Client(timeout=60, trust_env=False) as http:
            for _ in range(2):
                answer = http.post(url, json=words(1, 16, False))
                assert answer.status_code == 500, answer.text
                assert "the head, whose weights are not finite" in answer.text and str(model) in answer.text
            sound = http.post(url, json={**words(1, 16, False), "model": "tiny-rcd-baseline"})
            assert sound.status_code == 200, sound.text
    finally:
        ray.serve.shutdown()
    fault_table.add("each request failed with one message; the baseline answered", "one message")
