"""Logprobs in answers and streams, as OpenAI's client reads them from a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from pipelines.serving.backend import DecodeRequest, Finished, TextDelta
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.request import make_sequence
from tests.pipelines.serving.served_app import BASELINE, PLAIN, Served, served

SETTINGS = replace(PLAIN, temperature=1.0, seed=3)
BODY: dict[str, Any] = {"model": BASELINE, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served() as app:
        yield app


@pytest.fixture
def client(app: Served) -> Any:
    return openai.OpenAI(base_url=app.url + "/v1", api_key="none", max_retries=0)


def expected(app: Served, ids: list[int], top: int) -> Any:
    """The engine's own new tokens and their logprobs."""
    model = app.engines[BASELINE].model
    settings = replace(SETTINGS, stop_token_ids=app.engines[BASELINE].text.stop_ids)
    s = make_sequence(model, ids, settings, infill=False, has_reference=True, num_logprobs=top)
    engine = Engine(model, None, max_batch=1, max_length=256)
    engine.add(s)
    while engine.busy:
        engine.step()
    new = s.output().token_ids
    return new, s.logprobs_of(0, len(new))


def test_completions(app: Served, client: Any) -> None:
    choice = client.completions.create(**BODY, prompt="the fox", logprobs=3).choices[0]
    got, (ids, wanted) = choice.logprobs, expected(app, app.ids("the fox"), 3)
    assert len(got.tokens) == len(ids)
    assert got.token_logprobs == pytest.approx([w.logprob for w in wanted], abs=2e-3)
    texts = [app.tokenizer.decode([i]) for i in ids]
    for i, (token, top) in enumerate(zip(got.tokens, got.top_logprobs, strict=True)):
        assert token == (app.tokenizer.convert_ids_to_tokens(ids[i]) if "\ufffd" in texts[i] else texts[i])
        assert top[token] == got.token_logprobs[i] and 3 <= len(top) <= 4
        assert choice.text[got.text_offset[i] :].startswith(token) or "\ufffd" in texts[i] or token[:1] == "<"
    own = client.completions.create(**BODY, prompt="the fox", logprobs=0).choices[0].logprobs
    assert own.top_logprobs == [{t: p} for t, p in zip(own.tokens, own.token_logprobs, strict=True)]
    assert client.completions.create(**BODY, prompt="the fox").choices[0].logprobs is None


def test_chats(app: Served, client: Any) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    choice = client.chat.completions.create(**BODY, messages=messages, logprobs=True, top_logprobs=2).choices[0]
    ids, wanted = expected(app, app.turns("the fox"), 2)
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx([w.logprob for w in wanted], abs=2e-3)
    for i, one in zip(ids, choice.logprobs.content, strict=True):
        text = app.tokenizer.decode([i])
        assert one.bytes == (None if "\ufffd" in text else list(text.encode()))
        assert len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
    plain = client.chat.completions.create(**BODY, messages=messages, logprobs=True).choices[0].logprobs
    assert [one.top_logprobs for one in plain.content] == [[]] * len(ids)
    assert client.chat.completions.create(**BODY, messages=messages).choices[0].logprobs is None


def test_a_stream_has_the_logprobs_of_the_whole_answer(client: Any) -> None:
    body = {**BODY, "prompt": "the fox", "logprobs": 2, "n": 2}
    whole = [choice.logprobs for choice in client.completions.create(**body).choices]
    parts: list[list[Any]] = [[], []]
    text = ["", ""]
    for chunk in client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            text[choice.index] += choice.text
            if choice.logprobs:
                parts[choice.index].append(choice.logprobs)
                assert choice.logprobs.text_offset[-1] < len(text[choice.index])
    for one, pieces in zip(whole, parts, strict=True):
        assert len(pieces) > 1
        for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
            got = [value for piece in pieces for value in getattr(piece, name)]
            assert got == (pytest.approx(getattr(one, name), abs=2e-3) if name == "token_logprobs" else got)
            assert len(got) == len(getattr(one, name))
    messages = [{"role": "user", "content": "the fox"}]
    chunks = client.chat.completions.create(**BODY, messages=messages, logprobs=True, stream=True)
    streamed = [one for c in chunks if c.choices and c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    whole_chat = client.chat.completions.create(**BODY, messages=messages, logprobs=True).choices[0].logprobs.content
    assert [one.token for one in streamed] == [one.token for one in whole_chat]


def test_tokens_after_a_stop_string_are_left_out(client: Any) -> None:
    text = client.completions.create(**BODY, prompt="the fox").choices[0].text
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        reply = client.completions.create(**BODY, prompt="the fox", logprobs=1, stop=stop, stream=stream)
        choices = [c for chunk in reply for c in chunk.choices] if stream else reply.choices
        offsets = [at for c in choices if c.logprobs for at in c.logprobs.text_offset]
        cut = text[: text.index(stop)]
        assert "".join(c.text for c in choices) == cut
        assert offsets and offsets[-1] < len(cut)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "logprobs": True}, "logprobs"),
        ("completions", {"prompt": "a", "top_logprobs": 2}, "top_logprobs"),
        ("completions", {"prompt": "a<|MASK|>", "infill": True, "logprobs": 1}, "logprobs"),
        ("chat", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
        ("chat", {"messages": [{"role": "user", "content": "a"}], "logprobs": 2}, "logprobs"),
    ],
)
def test_what_cannot_be_had_is_refused(client: Any, path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions" if path == "chat" else "/completions", body={**BODY, **body}, cast_to=object)
    assert refused.value.param == param


def test_log_likelihoods_of_a_prompt_are_refused(app: Served, client: Any) -> None:
    """What lm-eval's local-completions sends for its log-likelihood requests."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=BASELINE, prompt=[[5, 6, 7]], max_tokens=1, logprobs=1, echo=True)
    assert refused.value.param == "echo" and "generate_until" in str(refused.value)


def test_a_resumed_answer_has_the_logprobs_of_its_new_tokens_only(app: Served) -> None:
    engine = app.engines[BASELINE]
    whole = DecodeRequest(
        prompt="the fox", messages=None, infill=False, settings=SETTINGS, fixed_length=True, stop=(), logprobs=1
    )

    async def collect(request: DecodeRequest) -> tuple[list[TextDelta], Finished]:
        *deltas, last = [event async for event in engine.stream(request)]
        return [d for d in deltas if isinstance(d, TextDelta)], last  # type: ignore[return-value]

    async def both() -> None:
        first, end = await collect(whole)
        assert len(first) > 1 and end.result.tokens == [t for d in first for t in d.tokens]
        assert all(len(d.tokens) == len(d.token_ids) for d in first)
        head = first[0]
        rest, _ = await collect(replace(whole, committed=tuple(head.token_ids), num_sent=len(head.text)))
        resumed = [t for d in rest for t in d.tokens]
        wanted = end.result.tokens[len(head.token_ids) :]
        assert [(t.own.text, t.start) for t in resumed] == [(t.own.text, t.start) for t in wanted]
        assert [t.own.logprob for t in resumed] == pytest.approx([t.own.logprob for t in wanted], abs=2e-3)

    asyncio.run(both())
