"""What a served model was trained for, and whether an answer is right: GET /v1/models and the field `valid`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipelines.serving.backend import DecodeEvent, DecodeRequest, Finished
from rcd_core.tasks import check, get_task
from rcd_core.tasks.base import Problem
from tests.pipelines.serving.http.fake_backend import Echo, _result, app_of


def problem(task: str, index: int = 0) -> Problem:
    chosen = get_task(task)
    return chosen.problem(chosen.synthetic(index, "test", 5))


SUDOKU, SUM = problem("sudoku"), problem("arithmetic")
WRONG = SUDOKU.response[:-1] + SUDOKU.response[1]


class Says(Echo):
    """Answers with one text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    async def stream(self, request: DecodeRequest) -> AsyncIterator[DecodeEvent]:
        yield Finished(result=_result(request, self.text))


def client(task: str, text: str) -> TestClient:
    return TestClient(app_of(tasks={"m": task}, m=Says(text)))


@pytest.mark.parametrize(("text", "valid"), [(SUDOKU.response, True), (WRONG, False)])
def test_each_choice_says_whether_it_is_right(text: str, valid: bool) -> None:
    body: dict[str, Any] = {"model": "m", "prompt": [SUDOKU.prompt, "no puzzle"], "infill": True, "n": 2}
    http = client("sudoku", text)
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [c["rcd"].get("valid") for c in choices] == [valid, valid, None, None]
    events = http.post("/v1/completions", json=body | {"prompt": SUDOKU.prompt, "n": 1, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert [c["choices"][0]["rcd"]["valid"] for c in chunks if c["choices"] and "rcd" in c["choices"][0]] == [valid]
    ids = http.post("/v1/completions", json={"model": "m", "prompt": [1, 2]}).json()["choices"][0]["rcd"]
    assert "valid" not in ids


def test_a_chat_is_judged_by_its_last_question() -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "?"}]
    asked = [*turns, {"role": "user", "content": [{"type": "text", "text": SUM.prompt}]}]
    for messages, valid in ((asked, True), (turns[:1], None)):
        answer = client("arithmetic", SUM.response).post(
            "/v1/chat/completions", json={"model": "m", "messages": messages}
        )
        assert answer.json()["choices"][0]["rcd"].get("valid") is valid


def test_a_model_says_what_it_was_trained_for() -> None:
    http = client("sudoku", "")
    card = http.get("/v1/models/m").json()
    assert card["rcd"]["task"] == "sudoku" and card["rcd"]["infill"] is True
    solved = http.post("/v1/completions", json={"model": "m", "prompt": card["rcd"]["example"], "infill": True})
    assert solved.status_code == 200 and solved.json()["choices"][0]["rcd"]["valid"] is False
    assert http.get("/v1/models").json()["data"] == [card]
    plain = TestClient(app_of(m=Echo()))
    assert "rcd" not in plain.get("/v1/models/m").json()
    assert client("gsm8k", "").get("/v1/models/m").json()["rcd"]["example"] is None


def test_arithmetic_is_checked_without_its_answer() -> None:
    for index in range(300):
        one = problem("arithmetic", index)
        assert check("arithmetic", one.prompt, one.response) is True
        assert check("arithmetic", one.prompt, "#### 1000") is False
    assert check("arithmetic", "Ben has 7 pears. He paints 3. How many?", "#### 7") is None
    assert check("gsm8k", "2 + 2?", "#### 4") is None
