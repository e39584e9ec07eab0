"""The engine thread behind an event loop: concurrent requests, cancellation, refusals and failed passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.serving.backend import DecodeRequest, DecodeResult, Finished, Overloaded, TextDelta, TraceStep
from pipelines.serving.engine_thread import EngineFailed, EngineGone, EngineThread
from rcd_core import Decoder, DecodeSettings, LocalReference, UserError, load_model
from rcd_core.text.tokenizer import train_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = ["sdar", "llada"]
OK = DecodeSettings(block_length=4, max_new_tokens=16, stop_token_ids=(), seed=3)
WARM = replace(OK, residual=True, start="reference", temperature=0.9)


@cache
def model(name: str) -> Any:
    torch.set_num_threads(1)
    return load_model(GOLDEN / (f"rcd/{name}" if "ref" in name else f"{name}_tiny"))


@cache
def tokenizer() -> Any:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog, and words"] * 4, 480)


def request(prompt: Any, settings: DecodeSettings = OK, **changes: Any) -> DecodeRequest:
    values: dict[str, Any] = {"messages": None, "infill": False, "fixed_length": True, "stop": ()}
    return DecodeRequest(prompt=prompt, settings=settings, **{**values, **changes})


@contextmanager
def thread(family: str, **options: Any) -> Iterator[EngineThread]:
    options = {"max_batch": 4, "max_length": 64, "max_queue": 8, **options}
    reference = options.pop("reference", LocalReference(model(f"{family}_ref_tiny")))
    engine = EngineThread(model(family), tokenizer(), reference, **options)
    try:
        yield engine
    finally:
        engine.close()


async def collect(engine: EngineThread, decode: DecodeRequest) -> tuple[list[Any], DecodeResult]:
    events = [event async for event in engine.stream(decode)]
    assert isinstance(events[-1], Finished)
    return events, events[-1].result


def text_of(events: Sequence[Any]) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta))


def ids_of(events: Sequence[Any]) -> list[int]:
    return [i for e in events if isinstance(e, TextDelta) for i in e.token_ids]


async def until_idle(engine: EngineThread) -> dict[str, float]:
    async with asyncio.timeout(20):
        while (statistics := await engine.statistics())["running"] or statistics["queue_length"]:
            await asyncio.sleep(0.01)
    return statistics


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_requests_with_different_settings_equal_single_ones(family: str) -> None:
    """Greedy and sampled, with and without residuals, traced, infill; more requests than slots."""
    mask = model(family).mask_token_id
    requests = [
        request([5, 6, 7]),
        request([5, 6, 7], WARM),
        request([9], replace(WARM, start="zero", seed=8, trace=True)),
        request([3, mask, 4, mask, mask, 8], WARM, infill=True),
        request([1, 2], replace(OK, max_new_tokens=7, confidence_threshold=0.2)),
        request([1, 2], replace(OK, block_length=8, denoising_steps=2, policy="low_confidence_static")),
    ]

    async def all_at_once(engine: EngineThread) -> list[Any]:
        return await asyncio.gather(*(collect(engine, r) for r in requests))

    with thread(family, max_batch=3) as engine:
        answers = asyncio.run(all_at_once(engine))
        statistics = asyncio.run(engine.statistics())
    decoder = Decoder(model(family), model(f"{family}_ref_tiny"))
    for r, (events, result) in zip(requests, answers, strict=True):
        decode = decoder.infill if r.infill else decoder.generate
        [alone] = decode([r.prompt], r.settings)
        assert ids_of(events) == alone.token_ids
        decoded = alone.canvas_ids if r.infill else alone.token_ids
        assert text_of(events) == result.text == tokenizer().decode(decoded, skip_special_tokens=not r.infill)
        assert result.forwards == vars(alone.num_forwards)
        assert [e.step for e in events if isinstance(e, TraceStep)] == result.steps
        assert len(result.steps) == (alone.num_forwards.denoise if r.settings.trace else 0)
        assert result.num_tokens == len(alone.token_ids)
    assert statistics["requests_total"] == 6 and statistics["tokens_total"] == sum(r.num_tokens for _, r in answers)
    assert statistics["denoise_forwards_total"] == sum(r.forwards["denoise"] for _, r in answers)
    assert statistics["running"] == statistics["queue_length"] == 0


def test_text_comes_block_by_block_and_a_stop_string_ends_decoding() -> None:
    async def check(engine: EngineThread) -> None:
        events, whole = await collect(engine, request([5], replace(OK, temperature=1.0)))
        assert [len(e.token_ids) for e in events if isinstance(e, TextDelta)] == [3, 4, 4, 4, 1]
        stop = whole.text[3:5]
        events, cut = await collect(engine, request([5], replace(OK, temperature=1.0), stop=("\0never", stop)))
        assert text_of(events) == cut.text == whole.text[: whole.text.find(stop)]
        assert cut.finish_reason == "stop" and whole.finish_reason == "length"
        assert 0 < cut.num_tokens < whole.num_tokens
        statistics = await until_idle(engine)
        assert statistics["requests_total"] == 2
        assert statistics["cancelled_total"] == 0, "a stop string is no cancellation"

    with thread("sdar") as engine:
        asyncio.run(check(engine))


@pytest.mark.parametrize(("family", "cache"), [("sdar", None), ("llada", None), ("llada", "prefix")])
def test_a_request_resumes_after_the_text_already_sent(family: str, cache: Any) -> None:
    """Given the events of the first blocks, the rest follows, and nothing twice."""
    original = request([5, 6], replace(WARM, cache=cache))

    async def check(engine: EngineThread, blocks: int) -> None:
        events, whole = await collect(engine, original)
        sent = [e for e in events if isinstance(e, TextDelta)][:blocks]
        rest = replace(original, committed=tuple(ids_of(sent)), num_sent=len(text_of(sent)))
        more, result = await collect(engine, rest)
        assert ids_of(sent) + ids_of(more) == ids_of(events)
        assert text_of(sent) + text_of(more) == result.text == whole.text
        assert result.num_tokens == whole.num_tokens
        restarted = cache == "prefix"
        assert (result.forwards["denoise"] < whole.forwards["denoise"]) is not restarted

    with thread(family) as engine:
        for blocks in (1, 3):
            asyncio.run(check(engine, blocks))


def test_cancelled_requests_free_their_slots_and_change_no_other() -> None:
    async def storm(engine: EngineThread) -> None:
        async def leave(number: int) -> None:
            stream = engine.stream(request([number], replace(OK, max_new_tokens=240)))
            async for _ in stream:
                break
            await stream.aclose()

        stays = asyncio.create_task(collect(engine, request([7, 7], WARM)))
        tasks = [asyncio.create_task(leave(i)) for i in range(1, 51)]
        await asyncio.sleep(0.05)
        for task in tasks[::3]:  # before their first block
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _, result = await stays
        [alone] = Decoder(model("sdar"), model("sdar_ref_tiny")).generate([[7, 7]], WARM)
        assert result.text == tokenizer().decode(alone.token_ids, skip_special_tokens=True)
        assert (await until_idle(engine))["cancelled_total"] == 50
        assert engine._engine.tables.num_free_slots == 4
        assert engine._engine.statistics.requests < 10, "cancelled requests are not decoded to their end"

    with thread("sdar", max_queue=60, max_length=256) as engine:
        asyncio.run(storm(engine))


def test_a_full_queue_is_reported_at_once() -> None:
    async def fill(engine: EngineThread) -> None:
        streams = [engine.stream(request([i])) for i in range(1, 4)]
        firsts = [asyncio.create_task(anext(s)) for s in streams]
        await asyncio.sleep(0)  # all three are accepted: one running, two queued
        with pytest.raises(Overloaded) as caught:
            await anext(engine.stream(request([9])))
        assert caught.value.retry_after_s >= 1
        await asyncio.gather(*firsts)
        for s in streams:
            await s.aclose()
        await collect(engine, request([9]))

    with thread("sdar", max_batch=1, max_queue=2) as engine:
        asyncio.run(fill(engine))


@pytest.mark.parametrize(
    ("decode", "match"),
    [
        (request([5] * 10, replace(OK, max_new_tokens=55)), "^max_tokens is 55.* 54"),
        (request([5] * 10, replace(OK, max_new_tokens=10**12)), "^max_tokens is 1000000000000"),
        (request([5] * 64), "^prompt has 64 "),
        (request([5], replace(OK, block_length=65)), "^block_length is 65.* 64"),
        (request([5, 511] * 40, infill=True), "^prompt has 80 .* 64"),
        (request([512]), "^prompt .* 512.* 511"),
        (request([10**30]), "^prompt .* 1000000"),
        (request([5], replace(OK, stop_token_ids=(-1,))), "^stop_token_ids .* -1"),
        (request([5], replace(OK, temperature=1e-40)), "^temperature is 1e-40.* 0.0001"),
        (request([5], replace(WARM, residual_temperature=1e-300)), "^residual_temperature is 1e-300"),
        (
            request([5], replace(OK, trace=True, schedule="time", denoising_steps=8000), candidates=20),
            "^return_trace would .* lower trace_candidates",
        ),
        (request([5, 511]), "infill"),
        (request([]), "prompt"),
        (request([5], infill=True), "511"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_field(decode: DecodeRequest, match: str) -> None:
    async def ask(engine: EngineThread) -> None:
        with pytest.raises(UserError, match=match):
            await anext(engine.stream(decode))
        assert (await engine.statistics())["queue_length"] == 0

    with thread("sdar") as engine:
        asyncio.run(ask(engine))


def test_a_prompt_is_tokenized_once_off_the_loop_and_after_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow tokenizer the loop goes on, choices share the ids, and a full queue refuses first."""
    texts: list[str] = []
    gate = threading.Event()

    async def ask(engine: EngineThread) -> None:
        tokenize = engine.text.token_ids

        def slow(decode: DecodeRequest) -> list[int]:
            texts.append(str(decode.prompt))
            assert threading.current_thread() is not threading.main_thread() and gate.wait(20)
            return tokenize(decode)

        monkeypatch.setattr(engine.text, "token_ids", slow)
        choices = [asyncio.create_task(collect(engine, request("the fox"))) for _ in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded):
            await anext(engine.stream(request("another")))
        choices.pop().cancel()
        gate.set()
        answers = await asyncio.gather(*choices)
        assert texts == ["the fox"] and len({result.text for _, result in answers}) == 1
        for text in ("another", "the fox"):
            await collect(engine, request(text))
        assert texts == ["the fox", "another"]

    with thread("sdar", max_batch=2, max_queue=2) as engine:
        asyncio.run(ask(engine))


def test_a_text_that_cannot_fit_is_never_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(engine: EngineThread) -> None:
        monkeypatch.setattr(engine.text, "token_ids", lambda _: pytest.fail("tokenized"))
        long = "a" * (4 * 2**20)
        for decode, field in (
            (request(long), "prompt"),
            (request([5] * 65), "prompt"),
            (request(None, messages=[{"role": "user", "content": long}]), "messages"),
        ):
            with pytest.raises(UserError, match=f"^{field} has "):
                await anext(engine.stream(decode))

    with thread("sdar") as engine:
        asyncio.run(ask(engine))


def test_an_infill_of_text_needs_a_token_for_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(engine: EngineThread) -> None:
        monkeypatch.setattr(engine.tokenizer, "convert_ids_to_tokens", lambda _: None)
        with pytest.raises(UserError, match="^infill .* 511"):
            await anext(engine.stream(request("a<|MASK|>", infill=True)))

    with thread("sdar") as engine:
        asyncio.run(ask(engine))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_request_that_fits_is_accepted(family: str) -> None:
    async def ask(engine: EngineThread) -> None:
        room = 62 // 4 * 4 if family == "llada" else 62
        _, result = await collect(engine, request([5, 6], replace(OK, max_new_tokens=room)))
        assert result.num_tokens == room
        _, result = await collect(engine, request([5, 6], replace(OK, max_new_tokens=1000), fixed_length=False))
        assert result.num_tokens == room, "the server's default shrinks"

    with thread(family) as engine:
        asyncio.run(ask(engine))


class Silent:
    """A reference that fails `breaks` times, then answers with nothing."""

    def __init__(self, breaks: int) -> None:
        self.breaks = breaks

    def signals(self, requests: Sequence[Any]) -> list[None]:
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("out of memory")
        return [None] * len(requests)


def test_a_failed_pass_loses_only_its_batch() -> None:
    async def ask(engine: EngineThread) -> None:
        running = asyncio.create_task(collect(engine, request([5], WARM)))
        queued = asyncio.create_task(collect(engine, request([6])))
        with pytest.raises(EngineFailed, match="out of memory"):
            await running
        assert (await queued)[1].num_tokens == 16
        _, result = await collect(engine, request([5], WARM))
        assert result.reference_failures == 5 and result.forwards["reference"] == 0
        statistics = await engine.statistics()
        assert statistics["failed_total"] == 1 and statistics["reference_failures_total"] == 5
        await engine.ready()

    with thread("sdar", reference=Silent(breaks=1), max_batch=1) as engine:
        asyncio.run(ask(engine))


def test_a_request_that_never_commits_fails() -> None:
    """With NaN weights no token is ever committed."""
    broken = load_model(GOLDEN / "sdar_tiny")
    with torch.no_grad():
        broken.lm_head_weight[:] = float("nan")

    async def ask(engine: EngineThread) -> None:
        with pytest.raises(EngineFailed, match="not finite"):
            async with asyncio.timeout(20):
                await collect(engine, request([5]))
        await engine.ready()

    engine = EngineThread(broken, tokenizer(), None, max_batch=2, max_length=64, max_queue=2)
    asyncio.run(ask(engine))
    engine.close()


def test_an_engine_that_keeps_failing_gives_up() -> None:
    async def ask(engine: EngineThread) -> None:
        for _ in range(3):
            with pytest.raises(EngineFailed, match="out of memory"):
                await collect(engine, request([5], WARM))
        for refused in (engine.ready(), collect(engine, request([5]))):
            with pytest.raises(EngineGone):
                await refused

    with thread("sdar", reference=Silent(breaks=99)) as engine:
        asyncio.run(ask(engine))
