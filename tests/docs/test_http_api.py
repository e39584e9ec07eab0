from __future__ import annotations

from pipelines.serving.http.bodies import DECODE_FIELDS
from tests.docs.http_api import PAGE, api_page
from tests.docs.recipes import write_or_check


def test_the_page_is_current_and_complete() -> None:
    page = api_page()
    assert write_or_check(PAGE, page, ["--check"]) == 0, "stale: run `make docs`"
    fields = (*DECODE_FIELDS, "prompt", "infill", "messages", "return_trace", "timeout_s", "tokens_per_forward")
    assert [field for field in fields if f"| `{field}` |" not in page] == []
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row.endswith("|  |")] == [], "a field without a description"
