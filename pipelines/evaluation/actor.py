"""What an evaluation decodes, piece by piece, and the Ray actor that decodes it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation.parts import PartWriter, read_piece
from pipelines.evaluation.results import ArmInfo
from pipelines.ray_cluster.hardware import describe_device, worker_device
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.request import NUM_SEED_BITS
from rcd_core.io import storage
from rcd_core.noise import hash_key
from rcd_core.tasks import check_gradable, get_task

ROWS = pa.schema(
    {
        "arm": pa.string(),
        "threshold": pa.float64(),
        "example_id": pa.string(),
        "sample": pa.int32(),  # 0 .. evaluate.samples - 1
        "correct": pa.bool_(),
        "tokens": pa.int32(),
        "denoise": pa.int32(),
        "reference": pa.int32(),
        "prefill": pa.int32(),
        "store": pa.int32(),
        "reference_weight": pa.float64(),  # parameters of the reference over those of the arm's model
        "reference_flops_weight": pa.float64(),  # reference pass over target pass: evaluation.flops
        "seconds": pa.float64(),  # wall seconds of decoding, shared by the answers decoded together: 1 / throughput
        "finish_reason": pa.string(),
        "completion": pa.string(),
    }
)
# On disk while the work is under way. item: example and sample in one number; settings: as in effect, every default
# filled in; results.json has settings and hardware once.
DECODED = pa.schema([*ROWS, ("item", pa.int64()), ("settings", pa.string()), ("hardware", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to decode. reference: checkpoint for warm starts, or None."""

    info: ArmInfo
    checkpoint: str
    reference: str | None
    settings: DecodeSettings


@dataclass(frozen=True, kw_only=True)
class Work:
    """Answers that one actor decodes, by one arm at one threshold. item = example number * samples + sample."""

    arm: int
    threshold: float
    items: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an actor needs to do any piece of the work. parts: directory below which piece i writes into <name>-<i>."""

    task: str
    run_code: bool
    tokenizer: str
    files: tuple[str, ...]
    arms: tuple[Arm, ...]
    work: tuple[Work, ...]
    samples: int
    batch_size: int
    threads: int
    parts: str
    name: str
    flush_s: float

    def directory(self, piece: int) -> str:
        return storage.join(self.parts, f"{self.name}-{piece:06d}")


def request_seed(seed: int, example_id: str, sample: int) -> int:
    """The seed of one answer: its own, whatever batch, actor or rerun it is decoded in."""
    return hash_key(seed, example_id, sample) & ((1 << NUM_SEED_BITS) - 1)


class DecodeActor:
    """Decodes pieces of work; holds the models of one arm at a time."""

    def __init__(self, plan: Plan) -> None:
        from rcd_core.text.tokenizer import load_tokenizer

        self.plan = plan
        if plan.run_code:
            os.environ["RCD_RUN_CODE"] = "1"  # of this actor only
        check_gradable(plan.task)
        self.task = get_task(plan.task)
        self.device, self.dtype = worker_device(plan.threads)
        self.hardware = json.dumps(describe_device(self.device))
        self.tokenizer = load_tokenizer(plan.tokenizer)
        columns = ["example_id", "prompt_ids", "prompt", "answer"]
        self.examples = pa.concat_tables([_read(file, columns) for file in plan.files])
        self.models: dict[str, Any] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Piece numbers -> how many answers each gave. The answers themselves lie in the pieces' directories."""
        pieces = batch["id"].to_pylist()
        return pa.table({"answers": [self.decode(piece) for piece in pieces]})

    def decode(self, number: int) -> int:
        """What of the piece is not on disk yet. Returns the number of its answers."""
        piece, directory = self.plan.work[number], self.plan.directory(number)
        # Ray gives a piece to another actor when its own is lost.
        done = set(read_piece(directory, DECODED)["item"].to_pylist())
        missing = [item for item in piece.items if item not in done]
        if missing:
            writer = PartWriter(directory, DECODED, self.plan.flush_s)
            for row in self._rows(piece, missing):
                writer.add(row)
            writer.flush()
        return len(piece.items)

    def _rows(self, piece: Work, items: Sequence[int]) -> Iterator[dict[str, Any]]:
        from rcd_core.decoding.decoder import Decoder

        arm = self.plan.arms[piece.arm]
        model, reference = self._load(arm)
        decoder = Decoder(model, reference, max_batch=self.plan.batch_size)
        numbers = [item // self.plan.samples for item in items]
        examples = self.examples.take(numbers).to_pylist()
        samples = [item % self.plan.samples for item in items]
        seed = arm.settings.seed or 0
        settings = [
            replace(
                arm.settings,
                confidence_threshold=piece.threshold,
                seed=request_seed(seed, example["example_id"], sample),
            )
            for example, sample in zip(examples, samples, strict=True)
        ]
        begun = time.perf_counter()
        inputs = [example["prompt_ids"] for example in examples]
        for i, output in decoder.as_completed(inputs, settings, infill=self.task.infill):
            seconds = time.perf_counter() - begun
            example, passes = examples[i], output.num_forwards
            if self.task.infill:
                completion = str(self.tokenizer.decode(output.canvas_ids))
            else:
                completion = str(self.tokenizer.decode(output.token_ids, skip_special_tokens=True))
            request = decoder.check(inputs[i], settings[i], infill=self.task.infill) if passes.reference else None
            yield {
                "arm": arm.info.name,
                "threshold": piece.threshold,
                "example_id": example["example_id"],
                "sample": samples[i],
                "correct": self.task.grade(example["prompt"], completion, example["answer"]),
                # The stop token was decoded too; what follows it in its block was not asked for.
                "tokens": len(output.token_ids) + (output.finish_reason == "stop"),
                **asdict(passes),
                **_weights(model, reference, request, output),
                "seconds": seconds,
                "finish_reason": output.finish_reason,
                "completion": completion,
                "item": items[i],
                "settings": json.dumps(asdict(replace(output.settings, confidence_threshold=0.0, seed=seed))),
                "hardware": self.hardware,
            }
            begun = time.perf_counter()  # grading is no decoding

    def _load(self, arm: Arm) -> tuple[Any, Any]:
        from rcd_core.families.loading import load_model

        wanted = [arm.checkpoint, *([arm.reference] if arm.reference else [])]
        self.models = {path: model for path, model in self.models.items() if path in wanted}  # room first
        for path in wanted:
            if path not in self.models:
                self.models[path] = load_model(path, dtype=self.dtype, device=self.device)
        return self.models[arm.checkpoint], self.models[arm.reference] if arm.reference else None


def _weights(model: Any, reference: Any, request: Any, output: Any) -> dict[str, float]:
    """A reference pass in passes of the target; request None: there was none."""
    from rcd_core.evaluation.flops import reference_weight, shape_of

    if request is None:
        return {"reference_weight": 0.0, "reference_flops_weight": 0.0}
    return {
        "reference_weight": reference.num_parameters() / model.num_parameters(),
        "reference_flops_weight": reference_weight(request, output, shape_of(reference)),
    }


def _read(file: str, columns: list[str]) -> pa.Table:
    with storage.open_input(file) as stream:
        return pq.read_table(stream, columns=columns)
