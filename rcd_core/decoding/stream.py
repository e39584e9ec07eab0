"""Decoding as a stream of events: what is final is said as soon as it is final, and never taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rcd_core.decoding.engine import Engine
from rcd_core.decoding.sequence import Generation, Step
from rcd_core.decoding.sequence import Sequence as Request


@dataclass(frozen=True)
class PassDone:
    """A denoising pass of request `index`, with its trace; only where the settings ask for one."""

    index: int
    step: Step


@dataclass(frozen=True)
class BlockDone:
    """New tokens of request `index` that can no longer change. Together they are the generation's token_ids."""

    index: int
    token_ids: list[int]


@dataclass(frozen=True)
class Finished:
    index: int
    generation: Generation


Event = PassDone | BlockDone | Finished


class Progress:
    """What of one request has been told already. After each step of the engine `news` says the rest."""

    def __init__(self, request: Request, index: int = 0) -> None:
        self.request, self.index = request, index
        self._steps, self._tokens = 0, 0

    def news(self) -> Iterator[Event]:
        r = self.request
        for step in r.steps[self._steps :]:
            yield PassDone(self.index, step)
        self._steps = len(r.steps)
        final = r.final_ids()
        if len(final) > self._tokens:
            yield BlockDone(self.index, final[self._tokens :])
            self._tokens = len(final)
        if r.finished:
            yield Finished(self.index, r.output())


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[Event]:
    """Run the requests to their end, told in the order in which things happen. Closing the iterator cancels the
    rest."""
    running = [Progress(r, i) for i, r in enumerate(requests)]
    for request in requests:
        engine.add(request)
    try:
        while running:
            engine.step()
            for progress in running:
                yield from progress.news()
            running = [p for p in running if not p.request.finished]
    finally:
        for progress in running:
            engine.cancel(progress.request)


class TextStream:
    """Token ids in, text out, as it becomes certain: half a UTF-8 character, or what may be the beginning of a stop
    string, is held back. The pieces together are the text of all ids, cut before the first stop string.

    decode: ids to text, as the tokenizer does it. stopped: a stop string has been found, nothing more will come.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, [s for s in stop if s]
        self.stopped = False
        self._ids: list[int] = []
        self._window, self._told = 0, 0  # ids from _window on are decoded again; those before _told are in the text
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        self._ids += token_ids
        return self._emit(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back, when no more ids come."""
        return self._emit(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        # A token's text can depend on the ones before it (spaces): decode with some that are out already.
        before = self.decode(self._ids[self._window : self._told])
        now = self.decode(self._ids[self._window :])
        if not final and now.endswith("\ufffd"):
            return ""
        self._window, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _emit(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        cuts = [at for s in self.stop if (at := text.find(s)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        keep = 0 if final else max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
