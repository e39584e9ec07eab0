"""What an evaluation decodes, piece by piece, and the Ray actor that decodes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rcd_core import storage
from rcd_core.decoding.settings import DecodeSettings
from rcd_core.tasks import check_gradable, get_task

ROWS = pa.schema(
    {
        "arm": pa.string(),
        "threshold": pa.float64(),
        "example_id": pa.string(),
        "correct": pa.bool_(),
        "tokens": pa.int32(),
        "denoise": pa.int32(),
        "reference": pa.int32(),
        "prefill": pa.int32(),
        "store": pa.int32(),
        "reference_weight": pa.float64(),  # parameters of the reference over those of the arm's model
        "finish_reason": pa.string(),
        "completion": pa.string(),
    }
)
# Settings as in effect, every default filled in; results.json has them once per arm.
DECODED = ROWS.append(pa.field("settings", pa.string()))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to decode. stage: where its model comes from. reference: checkpoint for warm starts, or None."""

    name: str
    title: str
    stage: str
    checkpoint: str
    reference: str | None
    settings: DecodeSettings


@dataclass(frozen=True, kw_only=True)
class Work:
    """Examples [first, last) decoded by one arm at one threshold, as one batch."""

    arm: int
    threshold: float
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an actor needs to do any piece of the work."""

    task: str
    run_code: bool
    tokenizer: str
    files: tuple[str, ...]
    arms: tuple[Arm, ...]
    work: tuple[Work, ...]
    threads: int


class DecodeActor:
    """Decodes pieces of work; holds the models of one arm at a time."""

    def __init__(self, plan: Plan) -> None:
        import torch

        from rcd_core.tokenizer import load_tokenizer

        self.plan = plan
        if plan.run_code:
            os.environ["RCD_RUN_CODE"] = "1"  # of this actor only
        check_gradable(plan.task)
        self.task = get_task(plan.task)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else None
        if self.device == "cpu":
            torch.set_num_threads(plan.threads)
        self.tokenizer = load_tokenizer(plan.tokenizer)
        columns = ["example_id", "prompt_ids", "prompt", "answer"]
        self.examples = pa.concat_tables([_read(file, columns) for file in plan.files])
        self.models: dict[str, Any] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        pieces = [self.plan.work[i] for i in batch["id"].to_pylist()]
        rows = [row for piece in pieces for row in self._rows(piece)]
        return pa.Table.from_pylist(rows, schema=DECODED)

    def _rows(self, piece: Work) -> Iterator[dict[str, Any]]:
        from rcd_core.decoding.decoder import Decoder

        arm = self.plan.arms[piece.arm]
        model, reference = self._load(arm)
        weight = reference.num_parameters() / model.num_parameters() if reference is not None else 0.0
        decoder = Decoder(model, reference)
        examples = self.examples.slice(piece.first, piece.last - piece.first).to_pylist()
        settings = replace(arm.settings, confidence_threshold=piece.threshold)
        decode = decoder.infill if self.task.infill else decoder.generate
        outputs = decode([example["prompt_ids"] for example in examples], settings)
        for example, output in zip(examples, outputs, strict=True):
            if self.task.infill:
                completion = str(self.tokenizer.decode(output.canvas_ids))
            else:
                completion = str(self.tokenizer.decode(output.token_ids, skip_special_tokens=True))
            passes = output.num_forwards
            yield {
                "arm": arm.name,
                "threshold": piece.threshold,
                "example_id": example["example_id"],
                "correct": self.task.grade(example["prompt"], completion, example["answer"]),
                # The stop token was decoded too; what follows it in its block was not asked for.
                "tokens": len(output.token_ids) + (output.finish_reason == "stop"),
                "denoise": passes.denoise,
                "reference": passes.reference,
                "prefill": passes.prefill,
                "store": passes.store,
                "reference_weight": weight,
                "finish_reason": output.finish_reason,
                "completion": completion,
                "settings": json.dumps(asdict(replace(output.settings, confidence_threshold=0.0))),
            }

    def _load(self, arm: Arm) -> tuple[Any, Any]:
        from rcd_core.families.loading import load_model

        wanted = [arm.checkpoint, *([arm.reference] if arm.reference else [])]
        self.models = {path: model for path, model in self.models.items() if path in wanted}  # room first
        for path in wanted:
            if path not in self.models:
                self.models[path] = load_model(path, dtype=self.dtype, device=self.device)
        return self.models[arm.checkpoint], self.models[arm.reference] if arm.reference else None


def _read(file: str, columns: list[str]) -> pa.Table:
    with storage.open_input(file) as stream:
        return pq.read_table(stream, columns=columns)
