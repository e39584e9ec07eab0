"""Decoding as a stream of events. An event reports what is final, and is never taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rcd_core.decoding.engine import Engine
from rcd_core.decoding.generation import Generation, Step, TokenLogprobs
from rcd_core.decoding.request import check_failures
from rcd_core.decoding.sequence import Sequence as Request


@dataclass(frozen=True)
class PassDone:
    """A denoising pass of request `index` with its trace; only with DecodeSettings.trace."""

    index: int
    step: Step


@dataclass(frozen=True)
class BlockDone:
    """New tokens of request `index` that can no longer change. Concatenated they are the generation's token_ids.
    logprobs: one for each token, or none (Sequence.logprobs_of)."""

    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    index: int
    generation: Generation


Event = PassDone | BlockDone | Finished


class Progress:
    """Turns one request's state into events. Call `new_events` after each step of the engine. A request that has failed
    gives none."""

    def __init__(self, request: Request, index: int = 0) -> None:
        self.request, self.index = request, index
        self._steps, self._tokens = 0, 0

    def new_events(self) -> Iterator[Event]:
        r = self.request
        if r.error is not None:
            return
        for step in r.steps[self._steps :]:
            yield PassDone(self.index, step)
        self._steps = len(r.steps)
        final = r.final_ids()
        if len(final) > self._tokens:
            yield BlockDone(self.index, final[self._tokens :], r.logprobs_of(self._tokens, len(final)))
            self._tokens = len(final)
        if r.finished:
            yield Finished(self.index, r.output())


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[Event]:
    """Run the requests to their end and yield events as they happen. Closing the iterator cancels unfinished
    requests. Raises UserError at the end if requests failed."""
    running = [Progress(r, i) for i, r in enumerate(requests)]
    for request in requests:
        engine.add(request)
    try:
        while running:
            engine.step()
            for progress in running:
                yield from progress.new_events()
            running = [p for p in running if not p.request.finished]
    finally:
        for progress in running:
            engine.cancel(progress.request)
    check_failures(requests)


class TextStream:
    """Turns token ids into pieces of text. Part of a UTF-8 character, or of a possible stop string, is held back until
    it is complete. Concatenated, the pieces are the text of all ids up to the first stop string.

    decode: the tokenizer's ids -> text. stopped: a stop string was found, so no more text follows.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, [s for s in stop if s]
        self.stopped = False
        self._ids: list[int] = []
        self._window, self._emitted = 0, 0  # ids from _window on are decoded again; those before _emitted are out
        self._held_back = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids."""
        self._ids += token_ids
        return self._emit(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The text that was held back, when no more ids follow."""
        return self._emit(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        # A token's text can depend on the tokens before it (spaces), so some of those are decoded again.
        before = self.decode(self._ids[self._window : self._emitted])
        now = self.decode(self._ids[self._window :])
        if not final and now.endswith("\ufffd"):
            return ""
        self._window, self._emitted = self._emitted, len(self._ids)
        return now[len(before) :]

    def _emit(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held_back + text
        cuts = [at for s in self.stop if (at := text.find(s)) >= 0]
        if cuts:
            self.stopped, self._held_back = True, ""
            return text[: min(cuts)]
        keep = 0 if final else max((_overlap(text, s) for s in self.stop), default=0)
        self._held_back = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of text that is a proper prefix of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
