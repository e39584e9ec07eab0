"""deploy: the trained models as a Ray Serve application (graph.py) that outlives the job.

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
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq
from ray import serve
from ray.serve.schema import ApplicationStatus

from pipelines.ray_cluster.resources import wait_for_resources
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.serving.description import describe
from pipelines.serving.graph import application
from pipelines.serving.http.guard import ApiLimits, api_keys
from pipelines.serving.ingress import limits_id
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import get_task

READY_TIMEOUT_S = 60.0


def run(ctx: StageContext) -> dict[str, Any]:
    """Deploy unless the live application has this stage's key. The summary holds what `report` prints."""
    recipe = ctx.recipe
    if not ctx.verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    limits = ApiLimits(api_keys=api_keys())
    if _live(recipe.name) == (ctx.key, limits_id(limits)) and _reachable(recipe):
        ctx.console.print(f"deploy: {recipe.name} is live already")
    else:
        description = describe(recipe, ctx.checkpoint)
        _start_http(recipe)
        # What a live application of ours holds comes free as its successor starts.
        wait_for_resources(
            description.bundles,
            recipe.resources.timeout_s,
            f"the application {recipe.name}",
            free=recipe.name not in _applications(),
            say=ctx.console.print,
        )
        about = {"recipe": recipe.name, "key": ctx.key, "example": _example(ctx)}
        serve.run(application(description, limits, about), name=recipe.name, route_prefix="/", blocking=False)
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
    headers = "-H 'Content-Type: application/json'"
    if api_keys():
        headers += ' -H "Authorization: Bearer $KEY"'
    # One line that survives copying, however narrow the terminal.
    ctx.console.out(f"curl -s {endpoint(ctx.recipe)}{example['path']} {headers} -d {body}")
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


def _example(ctx: StageContext) -> dict[str, Any]:
    """A request that anybody can send: the first problem of the test set."""
    first = storage.join(ctx.input_dir("prepare"), "test", ctx.input("prepare")["summary"]["test"][0])
    with storage.open_input(first) as stream:
        prompt = next(pq.ParquetFile(stream).iter_batches(batch_size=1, columns=["prompt"]))["prompt"][0].as_py()
    model = ctx.recipe.deploy.model_id
    if get_task(ctx.recipe.data.task_of("test")).infill:
        return {"path": "/v1/completions", "body": {"model": model, "prompt": prompt, "infill": True}}
    messages = [{"role": "user", "content": prompt}]
    return {"path": "/v1/chat/completions", "body": {"model": model, "messages": messages}}


# -- the live application


def _applications() -> dict[str, ApplicationStatus]:
    return {name: found.status for name, found in serve.status().applications.items()}


def _live(name: str) -> tuple[str, str] | None:
    """Key and limits_id of the live application."""
    if _applications().get(name) != ApplicationStatus.RUNNING:
        return None
    try:
        handle = serve.get_app_handle(name)
        about = handle.version.remote().result(timeout_s=READY_TIMEOUT_S)
        return str(about["key"]), str(handle.guard.remote().result(timeout_s=READY_TIMEOUT_S))
    except Exception:  # whatever is wrong with it, deploying it again mends it
        return None


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
    from pipelines.run.driver import stage_main

    stage_main("deploy")
