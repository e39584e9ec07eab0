"""Decoder: prompts or canvases in, generations out. A batch interface to the engine, for evaluation and scripts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import asdict

from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.generation import Generation
from rcd_core.decoding.memory import fit
from rcd_core.decoding.observer import Observer
from rcd_core.decoding.reference import LocalReference, Reference
from rcd_core.decoding.request import check_failures, make_sequence, uncalibrated
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.stream import Event, stream
from rcd_core.decoding.tensor_parallel import make_engine
from rcd_core.families.base import DiffusionModel

Settings = DecodeSettings | Many[DecodeSettings] | None  # one for all requests, or one per request


class Decoder:
    """Decodes prompts or fills canvases with a target and, for warm starts, a reference (a model or a remote one).

    max_batch: most requests at once; fewer if memory is short. observer: called after every denoising step.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reference: DiffusionModel | Reference | None = None,
        *,
        max_batch: int = 256,
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.reference = LocalReference(reference) if isinstance(reference, DiffusionModel) else reference
        self.max_batch = max_batch
        self.observer = observer

    def generate(self, prompts: Many[Many[int]], settings: Settings = None) -> list[Generation]:
        """Continue each prompt (token ids). Raises UserError for a request that the model does not support."""
        return self._in_order(self.as_completed(prompts, settings, infill=False))

    def infill(self, canvases: Many[Many[int]], settings: Settings = None) -> list[Generation]:
        """Fill every mask token of each canvas (token ids), wherever it stands, and change nothing else."""
        return self._in_order(self.as_completed(canvases, settings, infill=True))

    def stream(self, prompts: Many[Many[int]], settings: Settings = None) -> Iterator[Event]:
        """Like `generate`, but yields events: BlockDone with final tokens, PassDone if settings.trace, Finished."""
        sequences = self._sequences(prompts, settings, infill=False)
        return stream(self._engine(sequences), sequences)

    def check(self, ids: Many[int], settings: DecodeSettings, *, infill: bool = False) -> Sequence:
        """Lay out one request as the engine does. Raises UserError for a request that it would refuse."""
        return make_sequence(self.model, list(ids), settings, infill=infill, has_reference=self.reference is not None)

    def as_completed(
        self, inputs: Many[Many[int]], settings: Settings = None, *, infill: bool
    ) -> Iterator[tuple[int, Generation]]:
        """Like `generate` or `infill`, but yields (index of the input, generation) in the order of completion.

        Raises UserError at the end if requests failed, because predictions were not finite.
        """
        sequences = self._sequences(inputs, settings, infill=infill)
        if not sequences:
            return
        engine, index = self._engine(sequences), {s: i for i, s in enumerate(sequences)}
        for sequence in sequences:
            engine.add(sequence)
        while engine.busy:
            for sequence in engine.step():
                if sequence.error is None:
                    yield index[sequence], sequence.output()
        check_failures(sequences)

    def engine(self, longest: int, block_length: int, requests: int) -> Engine:
        """An engine for requests of up to `longest` positions and blocks of up to block_length tokens, with room for
        `requests` at once; fewer if memory is short or max_batch says so."""
        local = self.reference if isinstance(self.reference, LocalReference) else None
        plan = fit(self.model, longest, block_length, min(self.max_batch, requests), reference=local)
        if local is not None:
            local.plan(plan.max_batch, longest)
        options = {**asdict(plan), "max_length": longest, "observer": self.observer}
        return make_engine(self.model, self.reference, **options)

    @staticmethod
    def _in_order(results: Iterator[tuple[int, Generation]]) -> list[Generation]:
        return [generation for _, generation in sorted(results, key=lambda pair: pair[0])]

    def _sequences(self, inputs: Many[Many[int]], settings: Settings, *, infill: bool) -> list[Sequence]:
        if settings is None or isinstance(settings, DecodeSettings):
            settings = [settings or DecodeSettings()] * len(inputs)
        if message := next(filter(None, (uncalibrated(s, self.model) for s in settings)), None):
            warnings.warn(message, stacklevel=4)  # Python shows it once
        return [self.check(ids, s, infill=infill) for ids, s in zip(inputs, settings, strict=True)]

    def _engine(self, sequences: list[Sequence]) -> Engine:
        longest = max((len(s.canvas) for s in sequences), default=1)
        block_length = max((s.widest_scope for s in sequences), default=1)
        return self.engine(longest, block_length, len(sequences))
