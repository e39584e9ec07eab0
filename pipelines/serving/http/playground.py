"""The page at /: a request made by hand, and how its tokens come about. Its files are plain and lie beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from pipelines.serving.backend import ServedModel

FILES = Path(__file__).with_name("static")
BASELINE = "-baseline"  # ends the id of the model that is deployed for comparison
# Whatever a model writes is text on this page; should that ever fail, nothing of it is run or fetched.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks whether it has changed: a new release is seen at once
}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_playground(app: FastAPI, models: Mapping[str, ServedModel]) -> None:
    """Serve the page at / and what it needs below /playground; neither is part of the API's description."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(FILES / "index.html", headers=HEADERS)

    @app.get("/playground/models.json", include_in_schema=False)
    async def list_models() -> dict[str, Any]:
        """The models with their default settings, each with the one to compare it with, where there is one."""
        return {"models": [_card(name, models) for name in models]}

    app.mount("/playground", _Files(directory=FILES), name="playground")


def _card(name: str, models: Mapping[str, ServedModel]) -> dict[str, Any]:
    baseline = name + BASELINE
    return {
        "id": name,
        "baseline": baseline if baseline in models else None,
        "settings": asdict(models[name].defaults),
    }
