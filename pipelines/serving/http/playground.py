"""The page at /, which sends a request and draws how its tokens are decoded. Its files are in static/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from pipelines.serving.backend import ServedModel
from pipelines.serving.http.answers import model_facts
from pipelines.serving.http.page_files import FILES, HEADERS

BASELINE = "-baseline"  # suffix of the id of the model to compare with


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_playground(app: FastAPI, models: Mapping[str, ServedModel]) -> None:
    """Serve the page at / and its files under /playground. Neither is in /openapi.json."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(FILES / "index.html", headers=HEADERS)

    @app.get("/playground/models.json", include_in_schema=False)
    async def list_models() -> dict[str, Any]:
        """The models with their default settings and what they were trained for, each with its baseline if there is
        one."""
        return {"models": [_card(name, models) for name in models]}

    app.mount("/playground", _Files(directory=FILES), name="playground")


def _card(name: str, models: Mapping[str, ServedModel]) -> dict[str, Any]:
    baseline, task = name + BASELINE, models[name].task
    return {
        "id": name,
        "baseline": baseline if baseline in models else None,
        "trained": model_facts(task) if task else None,
        "settings": asdict(models[name].defaults),
    }
