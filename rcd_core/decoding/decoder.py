"""Decoder: prompts or canvases in, generations out. The batch form of the engine, for evaluation and scripts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from collections.abc import Sequence as Many

from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.memory import fit_batch
from rcd_core.decoding.observer import Observer
from rcd_core.decoding.reference import LocalReference, Reference
from rcd_core.decoding.request import make_sequence, uncalibrated
from rcd_core.decoding.sequence import Generation, Sequence
from rcd_core.decoding.stream import Event, stream
from rcd_core.families.base import DiffusionModel


class Decoder:
    """Decodes prompts or fills canvases with a target and, for warm starts, a reference (model or remote).

    max_batch: requests under way at once, fewer where the memory does not suffice. observer: is shown each step.
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

    def generate(
        self, prompts: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None = None
    ) -> list[Generation]:
        """Continue each prompt (token ids). One DecodeSettings for all, or one per prompt."""
        return self._decode(prompts, settings, infill=False)

    def infill(
        self, canvases: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None = None
    ) -> list[Generation]:
        """Replace every mask token of each canvas, wherever it stands, and change nothing else."""
        return self._decode(canvases, settings, infill=True)

    def stream(
        self, prompts: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None = None
    ) -> Iterator[Event]:
        """`generate` told as it goes: BlockDone with final tokens, PassDone where settings.trace, Finished."""
        sequences = self._sequences(prompts, settings, infill=False)
        return stream(self._engine(sequences), sequences)

    def check(self, ids: Many[int], settings: DecodeSettings, *, infill: bool = False) -> Sequence:
        """The request as the engine would take it; raises UserError for one it would refuse."""
        return make_sequence(self.model, list(ids), settings, infill=infill, has_reference=self.reference is not None)

    def finished(
        self, inputs: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None = None, *, infill: bool
    ) -> Iterator[tuple[int, Generation]]:
        """`generate` or `infill`, each answer as soon as it is whole, with its index among the inputs."""
        sequences = self._sequences(inputs, settings, infill=infill)
        if not sequences:
            return
        engine, index = self._engine(sequences), {s: i for i, s in enumerate(sequences)}
        for sequence in sequences:
            engine.add(sequence)
        while engine.busy:
            for sequence in engine.step():
                yield index[sequence], sequence.output()

    def _decode(
        self, inputs: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None, *, infill: bool
    ) -> list[Generation]:
        found = dict(self.finished(inputs, settings, infill=infill))
        return [found[i] for i in range(len(found))]

    def _sequences(
        self, inputs: Many[Many[int]], settings: DecodeSettings | Many[DecodeSettings] | None, *, infill: bool
    ) -> list[Sequence]:
        if settings is None or isinstance(settings, DecodeSettings):
            settings = [settings or DecodeSettings()] * len(inputs)
        if message := next(filter(None, (uncalibrated(s, self.model) for s in settings)), None):
            warnings.warn(message, stacklevel=4)  # Python says it once
        return [self.check(ids, s, infill=infill) for ids, s in zip(inputs, settings, strict=True)]

    def _engine(self, sequences: list[Sequence]) -> Engine:
        longest = max((len(s.canvas) for s in sequences), default=1)
        block_length = max((s.widest_scope for s in sequences), default=1)
        max_batch = fit_batch(self.model, longest, block_length, min(self.max_batch, len(sequences)))
        return Engine(self.model, self.reference, max_batch=max_batch, max_length=longest, observer=self.observer)
