"""Decoding with a model that is split over ranks (families/split.py, vocabulary.py).

Every rank runs the same engine on the same requests, each over its part of the weights and of the cache. Rank 0 tells
the others when an engine is made, which requests join and leave, and when a step begins; at the end of a step it hands
out its tokens, confidences and entropies. All else that a step decides follows from these, so pages, page tables and
the integers of the next pass are equal on all ranks without being sent.

    ranks = ProcessRanks(rank, size, "cuda")
    model = load_model(path, device="cuda", ranks=ranks)
    if rank:
        follow(model)                      # returns when rank 0 calls `release`
    else:
        Decoder(model).generate(...)       # or a LeadingEngine
        release(model)

A rank that fails ends the decoding on all of them: what a step left behind cannot be repaired.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import fields
from typing import Any

from rcd_core.decoding.engine import Engine
from rcd_core.decoding.reference import AsyncReference, LocalReference, Reference, WarmStart
from rcd_core.decoding.sequence import Sequence
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import Signals


def make_engine(model: DiffusionModel, reference: Reference | AsyncReference | None, **options: Any) -> Engine:
    """The engine for a model on one rank, or on several, of which this process is rank 0. options: of Engine."""
    return (Engine if model.ranks.size == 1 else LeadingEngine)(model, reference, **options)


class LeadingEngine(Engine):
    """Rank 0's engine. The other ranks must be in `follow`. options: of Engine."""

    def __init__(
        self, model: DiffusionModel, reference: Reference | AsyncReference | None, observer: Any = None, **options: Any
    ) -> None:
        if model.ranks.failed:
            raise RuntimeError("a step of another engine failed, so the ranks may be in the midst of it; start anew")
        self._news: list[tuple[int, dict[str, Any] | None]] = []
        self._numbers: dict[Sequence, int] = {}
        self._count = 0
        room = None
        if isinstance(reference, LocalReference):  # all start from an empty cache of the same size
            room = reference.cache_slots, reference.max_length
            reference.restart(*room)
        model.ranks.share(("engine", (options | {"max_queue": None}, room)))
        super().__init__(model, reference, observer=observer, **options)

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        given = {f.name: getattr(sequence, f.name) for f in fields(sequence) if f.init and f.name != "model"}
        self._numbers[sequence] = self._count
        self._news.append((self._count, given | {"kind": type(sequence)}))
        self._count += 1

    def cancel(self, sequence: Sequence) -> None:
        super().cancel(sequence)
        if sequence in self._numbers:
            self._news.append((self._numbers.pop(sequence), None))

    def step(self) -> list[Sequence]:
        try:
            self.model.ranks.share(("step", self._news))
            self._news = []
            finished = super().step()
        except BaseException:
            self.model.ranks.failed = True
            raise
        for sequence in finished:
            del self._numbers[sequence]
        return finished


class LeadingReference(LocalReference):
    """Rank 0's reference for engines elsewhere. The other ranks must be in `follow`."""

    def __init__(self, model: DiffusionModel, cache_slots: int, max_length: int) -> None:
        model.ranks.share(("reference", (cache_slots, max_length)))
        super().__init__(model, cache_slots, max_length)

    def signals(self, requests: Many[WarmStart]) -> list[Signals]:
        self.model.ranks.share(("signals", list(requests)))
        return super().signals(requests)


def make_reference(model: DiffusionModel, cache_slots: int, max_length: int) -> LocalReference:
    """The reference on one rank, or on several, of which this process is rank 0. Arguments: of LocalReference."""
    return (LocalReference if model.ranks.size == 1 else LeadingReference)(model, cache_slots, max_length)


def release(model: DiffusionModel) -> None:
    """Rank 0 decodes nothing more."""
    model.ranks.share(("release", None))


def follow(model: DiffusionModel, reference: LocalReference | None = None) -> None:
    """Take part in the engines of rank 0, or in its LeadingReference, until it calls `release`. reference: if rank 0's
    engines have a local one, of the same model, whole or split. Only rank 0 asks an asynchronous one. Raises what a
    collective raises when a rank is lost."""
    engine, sequences = None, dict[int, Sequence]()
    while True:
        command, content = model.ranks.share(None)
        if command == "release":
            return
        if command == "engine":
            engine, sequences = None, {}  # its memory is free before that of the next one is taken
            options, room = content
            if room is not None and reference is not None:
                reference.restart(*room)
            engine = Engine(model, reference or _AskedByRank0(), **options)
        elif command == "reference":
            reference = LocalReference(model, *content)
        elif command == "signals" and reference is not None:
            with suppress(UserError):  # predictions that are not finite: rank 0 answers with it
                reference.signals(content)
        elif engine is not None:
            for number, given in content:
                if given is None:
                    engine.cancel(sequences.pop(number))
                else:
                    sequences[number] = given.pop("kind")(model=model, **given)
                    engine.add(sequences[number])
            if engine.step():
                sequences = {number: s for number, s in sequences.items() if not s.finished}


class _AskedByRank0:
    """An AsyncReference that never answers: the engine takes rank 0's answers."""

    def submit(self, requests: Many[WarmStart]) -> Many[Future[Signals | None]]:
        return [Future() for _ in requests]
