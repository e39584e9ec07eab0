"""deploy: the trained models as a Ray Serve application (ingress -> target -> reference) that outlives the job.

    python pipelines/serve.py --recipe demo

The application is named after the recipe and answers at /. It is left as it is when it already serves this very key.
"""

from __future__ import annotations

import json
import logging
import shlex
import socket
import sys
import time
import urllib.request
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq
from ray import serve
from ray.serve.schema import ApplicationStatus

from pipelines.cluster import wait_for_resources
from pipelines.config import Recipe
from pipelines.ingress import Ingress
from pipelines.replicas import MAX_BATCH, Reference, Target
from pipelines.run import StageContext
from rcd_core import storage
from rcd_core.decoding.settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.tasks import get_task

READY_TIMEOUT_S = 60.0
CPUS_PER_REPLICA = 0.5  # decoding uses what it finds; a live application must leave a small machine room to train


def run(ctx: StageContext) -> dict[str, Any]:
    """Deploy unless the live application has this stage's key. The summary holds what `report` prints."""
    recipe = ctx.recipe
    if not ctx.verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if _live_key(recipe.name) == ctx.key and _reachable(recipe):
        ctx.console.print(f"deploy: {recipe.name} is live already")
    else:
        _start_http(recipe)
        # What a live application of ours holds comes free as its successor starts.
        wait_for_resources(
            _bundles(recipe),
            recipe.resources.timeout_s,
            f"the application {recipe.name}",
            free=recipe.name not in _applications(),
            say=ctx.console.print,
        )
        serve.run(application(ctx), name=recipe.name, route_prefix="/", blocking=False)
        _wait_until_ready(recipe)
    return {"endpoint": endpoint(recipe), "application": recipe.name, "example": _example(ctx)}


def report(ctx: StageContext) -> None:
    """Print the endpoint, a command that tries it on one line, and how to stop it."""
    summary = ctx.run.manifest(ctx.stage)
    if summary is None:
        return
    example = summary["summary"]["example"]
    body = shlex.quote(json.dumps(example["body"], ensure_ascii=False))
    ctx.console.print(f"\nserving at {endpoint(ctx.recipe)}; try it on a problem of the test set:", markup=False)
    # One line that survives copying, however narrow the terminal.
    ctx.console.out(f"curl -s {endpoint(ctx.recipe)}{example['path']} -H 'Content-Type: application/json' -d {body}")
    ctx.console.print(
        "stop it: `make down` ends the local head with all on it; "
        # The recipe as it was run: with --set its name and port may be others than the file's.
        f"`python pipelines/full.py --recipe {storage.join(ctx.run.path, 'recipe.yaml')} --teardown` removes only this",
        markup=False,
        soft_wrap=True,
    )


def teardown(ctx: StageContext) -> None:
    """Remove the application; Serve itself too when nothing else is served."""
    applications = _applications()
    if ctx.recipe.name not in applications:
        ctx.console.print(f"deploy: no application {ctx.recipe.name} on this cluster")
    elif set(applications) == {ctx.recipe.name}:
        serve.shutdown()
        ctx.console.print(f"deploy: removed {ctx.recipe.name} and ended Serve, which served nothing else")
    else:
        serve.delete(ctx.recipe.name)
        ctx.console.print(f"deploy: removed {ctx.recipe.name}")


def endpoint(recipe: Recipe) -> str:
    host = recipe.deploy.host
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{recipe.deploy.port}"


def application(ctx: StageContext) -> serve.Application:
    """The graph of deployments. The reference is part of it where the default settings ask for it."""
    recipe, deploy = ctx.recipe, ctx.recipe.deploy
    device = "cuda" if recipe.resources.gpus_per_worker else "cpu"
    reference = None
    if _wants_reference(recipe):
        reference = _deployment(Reference, "Reference", recipe).bind(ctx.checkpoint("reference"), device)
    settings = replace(deploy.decode, residual=_wants_residual(recipe), start=deploy.start)
    targets, defaults = {}, {}
    for name, stage, behind, decode in (
        (deploy.model_id, "target", reference, settings),
        (f"{deploy.model_id}-baseline", "baseline", None, replace(deploy.decode, residual=False)),
    ):
        if stage == "target" or deploy.baseline:
            deployment = _deployment(Target, stage.capitalize(), recipe)
            targets[name] = deployment.bind(ctx.checkpoint(stage), device, behind, recipe.signals.top_k)
            defaults[name] = decode
    ingress = serve.deployment(max_ongoing_requests=16 * MAX_BATCH, ray_actor_options={"num_cpus": 0})(Ingress)
    return ingress.bind(targets, defaults, _about(ctx, defaults))


def _deployment(replica: type, name: str, recipe: Recipe) -> serve.Deployment:
    needs = _bundles(recipe)[0]
    decorate = serve.deployment(
        name=name,
        max_ongoing_requests=4 * MAX_BATCH,  # @serve.batch only fills when a replica may hold more than one batch
        max_constructor_retry_count=2,
        ray_actor_options={"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0.0)},
    )
    return decorate(replica)


def _wants_residual(recipe: Recipe) -> bool:
    return recipe.target.residual.feeds_back


def _wants_reference(recipe: Recipe) -> bool:
    return _wants_residual(recipe) and "reference" in (recipe.deploy.start, recipe.deploy.decode.residual_source)


def _bundles(recipe: Recipe) -> list[dict[str, float]]:
    """What each model asks for: together the GPUs that one training worker had, which fitted at least one of them."""
    num_models = 1 + _wants_reference(recipe) + recipe.deploy.baseline
    one = {"CPU": CPUS_PER_REPLICA}
    if recipe.resources.gpus_per_worker:
        one["GPU"] = min(1.0, recipe.resources.gpus_per_worker / num_models)
    return [one] * num_models


def _about(ctx: StageContext, defaults: dict[str, DecodeSettings]) -> dict[str, Any]:
    try:
        release = version("rcd-ray")
    except PackageNotFoundError:  # run from a checkout that is not installed
        release = "unknown"
    return {
        "version": release,
        "recipe": ctx.recipe.name,
        "key": ctx.key,
        "created": int(time.time()),
        "reference_top_k": ctx.recipe.signals.top_k,
        "settings": {name: asdict(settings) for name, settings in defaults.items()},
    }


def _example(ctx: StageContext) -> dict[str, Any]:
    """A request that anybody can send: the first problem of the test set."""
    first = storage.join(ctx.input_dir("prepare"), "test", ctx.input("prepare")["summary"]["test"][0])
    with storage.open_input(first) as stream:
        prompt = next(pq.ParquetFile(stream).iter_batches(batch_size=1, columns=["prompt"]))["prompt"][0].as_py()
    model = ctx.recipe.deploy.model_id
    if get_task(ctx.recipe.data.task).infill:
        return {"path": "/v1/completions", "body": {"model": model, "prompt": prompt, "infill": True}}
    messages = [{"role": "user", "content": prompt}]
    return {"path": "/v1/chat/completions", "body": {"model": model, "messages": messages}}


# -- the live application


def _applications() -> dict[str, ApplicationStatus]:
    return {name: found.status for name, found in serve.status().applications.items()}


def _live_key(name: str) -> str | None:
    if _applications().get(name) != ApplicationStatus.RUNNING:
        return None
    try:
        about = serve.get_app_handle(name).version.remote().result(timeout_s=READY_TIMEOUT_S)
    except Exception:  # whatever is wrong with it, deploying it again mends it
        return None
    return str(about["key"])


def _start_http(recipe: Recipe) -> None:
    """Serve with its HTTP proxy at the recipe's host and port. UserError where something stands in the way."""
    from ray.serve.context import _get_global_client  # the only way to ask a running Serve for its address

    others = sorted(set(_applications()) - {recipe.name})
    if client := _get_global_client(raise_if_no_controller_running=False):
        host, port = client.http_config.host, client.http_config.port
        if (host, port) == (recipe.deploy.host, recipe.deploy.port) and not others:
            return
        if others:
            raise UserError(
                f"Ray Serve on this cluster already serves {', '.join(others)} at {host}:{port}; remove that first: "
                f"python pipelines/full.py --recipe {others[0]} --teardown"
            )
        serve.shutdown()  # its address cannot be changed while it runs
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((recipe.deploy.host, recipe.deploy.port))
        except OSError as error:
            raise UserError(f"deploy.port {recipe.deploy.port} cannot be used ({error}); choose another") from error
    http = {"host": recipe.deploy.host, "port": recipe.deploy.port}
    serve.start(proxy_location="HeadOnly", http_options=http)


def _reachable(recipe: Recipe) -> bool:
    # A proxy configured in the environment must not be asked for our own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(endpoint(recipe) + "/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait_until_ready(recipe: Recipe) -> None:
    """Serve's proxy learns of a new application a moment after `serve.run` has returned."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _reachable(recipe):
        if time.monotonic() > deadline:
            raise UserError(
                f"the application runs but {endpoint(recipe)} does not answer from the node of this job; "
                "start the job on the head node, or set deploy.host to an address that it can reach"
            )
        time.sleep(0.2)


if __name__ == "__main__":
    from pipelines.driver import stage_main

    stage_main("deploy")
