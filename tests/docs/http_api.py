"""Writes the tables of pipelines/serving/README.md: routes, request fields, `rcd` of answers, and errors.

python -m tests.docs.http_api          # write the tables
python -m tests.docs.http_api --check  # exit with 1 when they are stale
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from typing import Any

from pipelines.serving.http import neutral
from pipelines.serving.http.app import create_app
from pipelines.serving.http.bodies import (
    DECODE_FIELDS,
    ChatRequest,
    CompletionRequest,
    Message,
    Request,
    StreamOptions,
    TextPart,
)
from pipelines.serving.http.errors import ERRORS, ApiError
from pipelines.serving.http.guard import ApiLimits
from tests.conftest import ROOT
from tests.docs.recipes import field_rows, table, write_or_check

PAGE = ROOT / "pipelines" / "serving" / "README.md"
# The documented fields of each nested object.
_NESTED = {
    "Message": Message.model_fields.keys() - neutral.MESSAGE.keys(),
    "TextPart": TextPart.model_fields.keys() - neutral.PART.keys(),
    "StreamOptions": StreamOptions.model_fields.keys() - neutral.STREAM.keys(),
}
MARKER = "<!-- `make docs` writes the rest of this page. -->\n"


def api_page() -> str:
    """The text of pipelines/serving/README.md, whose part above MARKER is written by hand."""
    schema = create_app({}, {}, ApiLimits()).openapi()
    bodies = schema["components"]["schemas"]

    def fields(body: str, names: Collection[str] = ()) -> str:
        return table(
            ["field", "type", "default", "meaning"], _fields(bodies, body, names or bodies[body]["properties"])
        )

    def answer_fields(body: str) -> str:
        return table(
            ["field", "type", "meaning"], ((row[0], row[1], row[3]) for row in field_rows(bodies[body], bodies))
        )

    parts = [
        PAGE.read_text().partition(MARKER)[0] + MARKER,
        "## Routes\n",
        table(["route", "meaning"], _routes(schema)),
        "## Request fields\n",
        "In requests, null means the default. Fields of both POST routes:\n",
        fields("CompletionRequest", Request.model_fields.keys() - DECODE_FIELDS - neutral.BODY.keys()),
        "Fields of `/v1/completions`:\n",
        fields("CompletionRequest", CompletionRequest.model_fields.keys() - Request.model_fields.keys()),
        "Fields of `/v1/chat/completions`:\n",
        fields("ChatRequest", ChatRequest.model_fields.keys() - Request.model_fields.keys()),
        *(part for name, ours in _NESTED.items() for part in (f"### {name}\n", fields(name, ours))),
        "### Decoding settings\n",
        "Of both POST routes. The default is the served model's, which `/version` lists.\n",
        fields("CompletionRequest", DECODE_FIELDS),
        "### Neutral fields\n",
        "Fields of OpenAI's and vLLM's APIs that this server lacks. Only values that ask for nothing are accepted:\n",
        table(["field", "accepted values"], neutral.rows()),
        "## `rcd` in answers\n",
        "In an answer, and in the last chunk of a stream:\n",
        answer_fields("RcdAnswer"),
        "In each choice:\n",
        answer_fields("RcdChoice"),
        "## Errors\n",
        'The body is `{"error": {"message", "type", "param", "code"}}`. A stream that fails ends with this event.\n',
        table(["status", "type", "code, if any", "meaning"], _errors()),
    ]
    return "\n".join(parts)


def _fields(bodies: dict[str, Any], body: str, names: Collection[str]) -> Iterator[list[str]]:
    for field, kind, default, meaning in field_rows(bodies[body], bodies):
        if field.strip("`") in names:
            kind = re.sub(r",? [<≤≥] -?[\d.]+e\+\d+", "", kind.removesuffix(" or null"))  # without the limits of int32
            yield [field, kind, "" if default == "`{}`" else default, meaning]


def _routes(schema: dict[str, Any]) -> Iterator[list[str]]:
    yield ["`GET /`", "The playground."]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            yield [f"`{method.upper()} {path}`", operation["description"]]
    yield ["`GET /openapi.json`", "The schema of all this."]


def _errors() -> Iterator[list[str]]:
    for status, (meaning, code) in ERRORS.items():
        yield [str(status), f"`{ApiError(status, meaning).type}`", f"`{code}`" if code else "", meaning]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, api_page()))
