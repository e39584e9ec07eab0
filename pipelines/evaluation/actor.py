"""The Ray actor that decodes an evaluation, and the plan that it reads.

An actor works on several pieces at once, each in its own thread. Their requests share one engine, so that its batch
stays full from one piece, and one threshold, to the next.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.evaluation.answers import PieceWriter
from pipelines.evaluation.results import MethodInfo, judge
from pipelines.evaluation.shared_engine import SharedEngine
from pipelines.ray_cluster.hardware import describe_device, device_of
from pipelines.run.once_more import once_more
from rcd_core.decode_settings import DecodeSettings, Weights
from rcd_core.decoding.decoder import Decoder
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.request import check_failures
from rcd_core.decoding.tensor_parallel import release
from rcd_core.io import storage
from rcd_core.io.retries import be_patient
from rcd_core.noise import seed_of
from rcd_core.process import ProcessSettings
from rcd_core.tasks import check_gradable, get_task
from rcd_core.training.data.examples import open_parquet

ROWS = pa.schema(
    {
        "arm": pa.string(),  # the method's name
        "threshold": pa.float64(),
        "example_id": pa.string(),
        "sample": pa.int32(),  # 0 .. evaluate.samples - 1
        "correct": pa.bool_(),
        "tokens": pa.int32(),
        "denoise": pa.int32(),
        "reference": pa.int32(),
        "prefill": pa.int32(),
        "store": pa.int32(),
        "reference_weight": pa.float64(),  # parameters of the reference / parameters of the method's model
        "reference_flops_weight": pa.float64(),  # FLOPs of a reference pass / of a target pass: evaluation.flops
        "seconds": pa.float64(),  # of the engine: those of a pass are shared equally by the answers in it
        "finish_reason": pa.string(),
        "completion": pa.string(),
        "graders_differ": pa.bool_(),  # null: the task has one grader, or an older release decoded the answer
    }
)
# Rows on disk while the evaluation runs. item: example number * samples + sample; settings: in effect, with all
# defaults. results.json has settings and hardware once.
DECODED = pa.schema([*ROWS, ("item", pa.int64()), ("settings", pa.string()), ("hardware", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of decoding. reference: checkpoint for warm starts, or None."""

    info: MethodInfo
    checkpoint: str
    reference: str | None
    settings: DecodeSettings


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Answers that an actor decodes in one call, by one method (a number) at one threshold. items: as in DECODED."""

    method: int
    threshold: float
    items: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an actor needs to decode any piece. Piece i is written to <parts>/<name>-<i>.parquet."""

    task: str
    grader: str
    attention: str
    run_code: bool
    tokenizer: str
    files: tuple[str, ...]
    methods: tuple[Method, ...]
    pieces: tuple[Piece, ...]
    samples: int
    batch_size: int
    threads: int
    gpus: float
    parts: str
    name: str
    flush_s: float
    bundles: tuple[dict[str, float], ...] = ()  # of RankGroup
    weights: Weights = "full"
    process: ProcessSettings = ProcessSettings()

    @property
    def pieces_at_once(self) -> int:
        """Pieces that an actor works on: one more than fill its batch, so that requests are waiting for a free slot."""
        return -(-self.batch_size // max(len(piece.items) for piece in self.pieces)) + 1

    def path(self, number: int) -> str:
        return storage.join(self.parts, f"{self.name}-{number:06d}.parquet")


def request_seed(seed: int, example_id: str, sample: int) -> int:
    """The seed of one answer, which does not depend on batch, actor or retry."""
    return seed_of(seed, example_id, sample)


class DecodeActor:
    """Decodes pieces; may be called by several threads. Keeps the models and the engine of one method in memory."""

    def __init__(self, plan: Plan) -> None:
        from pipelines.ray_cluster.ranks import RankGroup
        from rcd_core.text.tokenizer import load_tokenizer

        be_patient()
        self.plan = plan
        if plan.run_code:
            os.environ["RCD_RUN_CODE"] = "1"  # for this actor only
        check_gradable(plan.task)
        self.task = get_task(plan.task)
        self.device, self.dtype = device_of(plan.gpus, plan.threads)
        self.hardware = json.dumps(describe_device(self.device))
        self.tokenizer = load_tokenizer(plan.tokenizer)
        columns = ["example_id", "prompt_ids", "prompt", "answer"]
        self.examples = pa.concat_tables([read_examples(file, columns) for file in plan.files])
        self.group = RankGroup(plan.bundles, plan.threads, plan.process)
        self.paths: tuple[str | None, ...] = ()  # of the models in memory
        self.model: Any = None
        self.reference: LocalReference | None = None
        self.current: tuple[tuple[str, str | None], Decoder, SharedEngine] | None = None
        self.users = 0  # of the current engine
        self.switching = threading.Condition()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Piece numbers -> their numbers of answers. The answers are written to the files of the pieces."""
        return pa.table({"answers": [once_more(self.decode)(number) for number in batch["id"].to_pylist()]})

    def decode(self, number: int) -> int:
        """Decode the answers of a piece that are not on disk. Returns the number of answers of the whole piece."""
        piece = self.plan.pieces[number]
        # Ray retries the piece of a lost actor on another one.
        writer = PieceWriter(self.plan.path(number), DECODED, self.plan.flush_s)
        done = set(writer.written["item"].to_pylist())
        if missing := [item for item in piece.items if item not in done]:
            try:
                for row in self._rows(piece, missing):
                    writer.add(row)
            finally:
                writer.flush()
        return len(piece.items)

    def _rows(self, piece: Piece, items: Sequence[int]) -> Iterator[dict[str, Any]]:
        method = self.plan.methods[piece.method]
        numbers, samples = zip(*(divmod(item, self.plan.samples) for item in items), strict=True)
        examples = self.examples.take(list(numbers)).to_pylist()
        seed = method.settings.seed or 0
        with self._engine(method) as (decoder, engine):
            requests, index = [], {}
            for i, example in enumerate(examples):
                settings = replace(
                    method.settings,
                    confidence_threshold=piece.threshold,
                    seed=request_seed(seed, example["example_id"], samples[i]),
                )
                requests.append(decoder.check(example["prompt_ids"], settings, infill=self.task.infill))
                index[requests[i]] = i, settings
            for request, seconds in engine.finished(requests):
                if request.error is not None:
                    continue
                i, settings = index[request]
                example, output = examples[i], request.output()
                if self.task.infill:
                    completion = str(self.tokenizer.decode(output.canvas_ids))
                else:
                    completion = str(self.tokenizer.decode(output.token_ids, skip_special_tokens=True))
                passes = output.num_forwards
                whole = decoder.check(example["prompt_ids"], settings, infill=self.task.infill)
                yield {
                    "arm": method.info.name,
                    "threshold": piece.threshold,
                    "example_id": example["example_id"],
                    "sample": samples[i],
                    **judge(self.plan.task, self.plan.grader, completion, example["answer"], example["prompt"]),
                    # The stop token counts, the rest of its block does not.
                    "tokens": len(output.token_ids) + (output.finish_reason == "stop"),
                    **asdict(passes),
                    **_reference_weights(decoder, whole if passes.reference else None, output),
                    "seconds": seconds,
                    "finish_reason": output.finish_reason,
                    "completion": completion,
                    "item": items[i],
                    "settings": json.dumps(asdict(replace(output.settings, confidence_threshold=0.0, seed=seed))),
                    "hardware": self.hardware,
                }
        check_failures(requests)

    @contextmanager
    def _engine(self, method: Method) -> Iterator[tuple[Decoder, SharedEngine]]:
        """The engine of a method's models. That of another method, or a failed one, is replaced once nobody uses it any
        more."""
        key = (method.checkpoint, method.reference)

        def fits() -> bool:
            return self.current is not None and self.current[0] == key and not self.current[2].failure

        with self.switching:
            self.switching.wait_for(lambda: not self.users or fits())
            if self.current is not None and self.current[2].failure and self.group.ranks.failed:
                raise self.current[2].failure  # the other ranks cannot go on
            if not fits():
                self._replace_engine(key)
            assert self.current is not None
            self.users += 1
            _, decoder, engine = self.current
        try:
            yield decoder, engine
        finally:
            with self.switching:
                self.users -= 1
                self.switching.notify_all()

    def _replace_engine(self, key: tuple[str, str | None]) -> None:
        if self.current is not None:
            self.current[2].close()
            self.current = None
        self._load(key)
        decoder = Decoder(self.model, self.reference, max_batch=self.plan.batch_size)
        # The longest prompt at the settings of every method that will use the engine.
        lengths = pc.list_value_length(self.examples["prompt_ids"])
        longest = self.examples["prompt_ids"][pc.index(lengths, pc.max(lengths)).as_py()].as_py()
        requests = [
            decoder.check(longest, method.settings, infill=self.task.infill)
            for method in self.plan.methods
            if (method.checkpoint, method.reference) == key
        ]
        positions, block = max(len(r.canvas) for r in requests), max(r.widest_scope for r in requests)
        self.current = key, decoder, SharedEngine(decoder.engine(positions, block, self.plan.batch_size))

    def _load(self, paths: tuple[str, str | None]) -> None:
        if paths == self.paths:
            return
        if self.model is not None:
            release(self.model)
        self.model = self.reference = None
        options = {"attention": self.plan.attention, "weights": self.plan.weights}
        load: Any = partial(load_models, *paths, device=self.device, dtype=self.dtype, **options)
        self.group.follow(load)
        self.model, self.reference = load(self.group.ranks)
        self.paths = paths


_loaded: dict[str, Any] = {}  # models of this process by path


def load_models(checkpoint: str, reference: str | None, ranks: Any, **options: Any) -> tuple[Any, Any]:
    """(a rank's part of the model, its LocalReference or None). A model of the last call is kept if it is needed.
    options: of load_model."""
    from rcd_core.families.loading import load_model

    be_patient()
    paths = [path for path in (checkpoint, reference) if path]
    for path in set(_loaded) - set(paths):  # free them before others are loaded
        del _loaded[path]
    for path in paths:
        if path not in _loaded:
            _loaded[path] = load_model(path, ranks=ranks, **options)
    return _loaded[checkpoint], LocalReference(_loaded[reference]) if reference else None


def _reference_weights(decoder: Decoder, request: Any, output: Any) -> dict[str, float]:
    """The cost of a reference pass in target passes. request: None if there was no reference pass."""
    from rcd_core.evaluation.flops import reference_weight, shape_of

    if request is None:
        return {"reference_weight": 0.0, "reference_flops_weight": 0.0}
    assert isinstance(decoder.reference, LocalReference)
    reference = decoder.reference.model
    return {
        "reference_weight": reference.num_parameters() / decoder.model.num_parameters(),
        "reference_flops_weight": reference_weight(request, output, shape_of(reference)),
    }


def read_examples(file: str, columns: list[str]) -> pa.Table:
    with open_parquet(file) as opened:
        return opened.read(columns=columns)
