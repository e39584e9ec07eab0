"""deploy: serve the trained models as a Ray Serve application (serving/graph.py) that outlives the job.

    python pipelines/serve.py --recipe demo

The application is named after the recipe and answers at /. A live application with the same key is left alone.
"""

from __future__ import annotations

import json
import logging
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the slow imports: the driver imports this file again when its stage runs
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipelines/, whose file names are too common
    from pipelines.run.driver import stage_main

    stage_main("deploy")

import httpx
from ray import serve
from ray.serve.context import _get_global_client  # the only way to get the address of a running Serve
from ray.serve.schema import ApplicationStatus

from pipelines.ray_cluster.resources import wait_for_resources
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.run.progress import StillWorking
from pipelines.serving.api_keys import api_keys
from pipelines.serving.description import describe
from pipelines.serving.graph import api_limits, application
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import get_task
from rcd_core.training.data.examples import open_parquet

READY_TIMEOUT_S = 60.0


def run(ctx: StageContext) -> dict[str, Any]:
    """Deploy unless the live application has this stage's key. Returns what `report` prints."""
    recipe = ctx.recipe
    if not ctx.verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    description = describe(recipe, ctx.checkpoint, ctx.residual_temperature("target"))
    limits, ingress = api_limits(description), description.ingress.model_dump()
    if _live(recipe.name) == (ctx.key, limits.id, ingress) and _reachable(recipe):
        ctx.console.print(f"deploy: {recipe.name} is live already")
    else:
        _start_http(recipe)
        # A live application of this recipe frees its resources while its successor starts.
        wait_for_resources(
            description.bundles,
            recipe.resources.timeout_s,
            f"the application {recipe.name}",
            free=recipe.name not in _applications(),
            say=ctx.console.print,
        )
        about = {"recipe": recipe.name, "key": ctx.key, "example": _example(ctx), "ingress": ingress}
        with StillWorking(ctx.console, f"deploy: {len(description.models)} models start"):
            serve.run(application(description, limits, about), name=recipe.name, route_prefix="/", blocking=False)
            _wait_until_ready(recipe)
    return {"endpoint": endpoint(recipe), "application": recipe.name, "example": _example(ctx)}


def report(ctx: StageContext) -> None:
    """Print the endpoint, a command that tries it, and how to stop it."""
    summary = ctx.run.manifest(ctx.stage)
    if summary is None:
        return
    example = summary["summary"]["example"]
    body = shlex.quote(json.dumps(example["body"], ensure_ascii=False))
    ctx.console.print(
        f"\nserving at {endpoint(ctx.recipe)}: open it in a browser to watch each pass, or try it on a problem of the "
        "test set:",
        markup=False,
    )
    headers = "-H 'Content-Type: application/json'"
    if api_keys():
        headers += ' -H "Authorization: Bearer $KEY"'
    # `out` does not wrap, so that the command can be copied from a narrow terminal.
    ctx.console.out(f"curl -s {endpoint(ctx.recipe)}{example['path']} {headers} -d {body}")
    ctx.console.print(
        "stop it: `make down` stops the local head and everything on it; "
        # The recipe as it was run, because --set may have changed its name and port.
        f"`python pipelines/full.py --recipe {storage.join(ctx.run.path, 'recipe.yaml')} --teardown` removes only this",
        markup=False,
        soft_wrap=True,
    )


def teardown(ctx: StageContext) -> None:
    """Remove the application, and shut Serve down if it serves nothing else."""
    applications = _applications()
    if ctx.recipe.name not in applications:
        ctx.console.print(f"deploy: no application {ctx.recipe.name} on this cluster")
    elif set(applications) == {ctx.recipe.name}:
        serve.shutdown()
        ctx.console.print(f"deploy: removed {ctx.recipe.name} and shut Serve down, which served nothing else")
    else:
        serve.delete(ctx.recipe.name)
        ctx.console.print(f"deploy: removed {ctx.recipe.name}")


def endpoint(recipe: Recipe) -> str:
    host = recipe.deploy.host
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{recipe.deploy.port}"


def _example(ctx: StageContext) -> dict[str, Any]:
    """A request to try: the first problem of the test set."""
    first = storage.join(ctx.input_dir("prepare"), "test", ctx.input("prepare")["summary"]["test"][0])
    with open_parquet(first) as file:
        prompt = next(file.iter_batches(batch_size=1, columns=["prompt"]))["prompt"][0].as_py()
    model = ctx.recipe.deploy.model_id
    if get_task(ctx.recipe.data.task_of("test")).infill:
        return {"path": "/v1/completions", "body": {"model": model, "prompt": prompt, "infill": True}}
    messages = [{"role": "user", "content": prompt}]
    return {"path": "/v1/chat/completions", "body": {"model": model, "messages": messages}}


# -- the live application


def _applications() -> dict[str, ApplicationStatus]:
    return {name: application.status for name, application in serve.status().applications.items()}


def _live(name: str) -> tuple[str, str, Any] | None:
    """Key, ApiLimits.id and ingress settings of the live application."""
    if _applications().get(name) != ApplicationStatus.RUNNING:
        return None
    try:
        handle = serve.get_app_handle(name)
        about = handle.version.remote().result(timeout_s=READY_TIMEOUT_S)
        limits_id = handle.limits_id.remote().result(timeout_s=READY_TIMEOUT_S)
        return str(about["key"]), str(limits_id), about.get("ingress")
    except Exception:  # whatever is wrong, deploying again fixes it
        return None


def _start_http(recipe: Recipe) -> None:
    """Start Serve with its HTTP proxy at the recipe's host and port. Raises UserError if either is taken."""

    others = sorted(set(_applications()) - {recipe.name})
    if client := _get_global_client(raise_if_no_controller_running=False):
        host, port = client.http_config.host, client.http_config.port
        if (host, port) == (recipe.deploy.host, recipe.deploy.port) and not others:
            return
        if others:
            raise UserError(
                f"Ray Serve on this cluster already serves {', '.join(others)} at {host}:{port}; remove it first: "
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
    keys = api_keys()
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        url = endpoint(recipe) + "/ready"
        return httpx.get(url, headers=headers, timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _wait_until_ready(recipe: Recipe) -> None:
    """Serve's proxy learns of a new application shortly after `serve.run` returns."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _reachable(recipe):
        if time.monotonic() > deadline:
            raise UserError(
                f"the application runs, but {endpoint(recipe)} does not answer from the node of this job; "
                "start the job on the head node, or set deploy.host to an address that it can reach"
            )
        time.sleep(0.2)
