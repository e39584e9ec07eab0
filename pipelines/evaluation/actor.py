"""The Ray actor that decodes an evaluation, and the plan that it reads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation.answers import ShardWriter, read_shard
from pipelines.evaluation.results import MethodInfo, judge
from pipelines.ray_cluster.hardware import describe_device, device_of
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.request import NUM_SEED_BITS
from rcd_core.io import storage
from rcd_core.io.retries import be_patient
from rcd_core.noise import hash_key
from rcd_core.tasks import check_gradable, get_task

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
        "seconds": pa.float64(),  # wall-clock seconds, shared equally by answers decoded together: 1 / throughput
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
class Shard:
    """Answers that one actor decodes by one method (a number) at one threshold. items: as in DECODED."""

    method: int
    threshold: float
    items: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an actor needs to decode any shard. Shard i is written to the directory <parts>/<name>-<i>."""

    task: str
    grader: str
    run_code: bool
    tokenizer: str
    files: tuple[str, ...]
    methods: tuple[Method, ...]
    shards: tuple[Shard, ...]
    samples: int
    batch_size: int
    threads: int
    gpus: float
    parts: str
    name: str
    flush_s: float
    bundles: tuple[dict[str, float], ...] = ()  # of RankGroup

    def directory(self, number: int) -> str:
        return storage.join(self.parts, f"{self.name}-{number:06d}")


def request_seed(seed: int, example_id: str, sample: int) -> int:
    """The seed of one answer, which does not depend on batch, actor or retry."""
    return hash_key(seed, example_id, sample) & ((1 << NUM_SEED_BITS) - 1)


class DecodeActor:
    """Decodes shards. Keeps the models of one method in memory."""

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
        self.examples = pa.concat_tables([_read(file, columns) for file in plan.files])
        self.group = RankGroup(plan.bundles, plan.threads)
        self.paths: tuple[str | None, ...] = ()  # of the models in memory
        self.model: Any = None
        self.reference: Any = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Shard numbers -> their numbers of answers. The answers are written to the directories of the shards."""
        return pa.table({"answers": [self.decode(number) for number in batch["id"].to_pylist()]})

    def decode(self, number: int) -> int:
        """Decode the answers of a shard that are not on disk. Returns the number of answers of the whole shard."""
        shard, directory = self.plan.shards[number], self.plan.directory(number)
        # Ray retries the shard of a lost actor on another one.
        done = set(read_shard(directory, DECODED)["item"].to_pylist())
        missing = [item for item in shard.items if item not in done]
        if missing:
            writer = ShardWriter(directory, DECODED, self.plan.flush_s)
            for row in self._rows(shard, missing):
                writer.add(row)
            writer.flush()
        return len(shard.items)

    def _rows(self, shard: Shard, items: Sequence[int]) -> Iterator[dict[str, Any]]:
        from rcd_core.decoding.decoder import Decoder

        method = self.plan.methods[shard.method]
        self._load(method)
        model, reference = self.model, self.reference
        decoder = Decoder(model, reference, max_batch=self.plan.batch_size)
        numbers, samples = zip(*(divmod(item, self.plan.samples) for item in items), strict=True)
        examples = self.examples.take(list(numbers)).to_pylist()
        seed = method.settings.seed or 0
        settings = [
            replace(
                method.settings,
                confidence_threshold=shard.threshold,
                seed=request_seed(seed, example["example_id"], sample),
            )
            for example, sample in zip(examples, samples, strict=True)
        ]
        started = time.perf_counter()
        prompts = [example["prompt_ids"] for example in examples]
        for i, output in decoder.as_completed(prompts, settings, infill=self.task.infill):
            seconds = time.perf_counter() - started
            example, passes = examples[i], output.num_forwards
            if self.task.infill:
                completion = str(self.tokenizer.decode(output.canvas_ids))
            else:
                completion = str(self.tokenizer.decode(output.token_ids, skip_special_tokens=True))
            request = decoder.check(prompts[i], settings[i], infill=self.task.infill) if passes.reference else None
            yield {
                "arm": method.info.name,
                "threshold": shard.threshold,
                "example_id": example["example_id"],
                "sample": samples[i],
                **judge(self.plan.task, self.plan.grader, completion, example["answer"], example["prompt"]),
                # The stop token counts, the rest of its block does not.
                "tokens": len(output.token_ids) + (output.finish_reason == "stop"),
                **asdict(passes),
                **_reference_weights(model, reference and reference.model, request, output),
                "seconds": seconds,
                "finish_reason": output.finish_reason,
                "completion": completion,
                "item": items[i],
                "settings": json.dumps(asdict(replace(output.settings, confidence_threshold=0.0, seed=seed))),
                "hardware": self.hardware,
            }
            started = time.perf_counter()  # the time of grading does not count

    def _load(self, method: Method) -> None:
        from rcd_core.decoding.tensor_parallel import release

        paths = (method.checkpoint, method.reference)
        if paths == self.paths:
            return
        if self.model is not None:
            release(self.model)
        self.model = self.reference = None
        load = partial(load_models, *paths, device=self.device, dtype=self.dtype)
        self.group.follow(load)
        self.model, self.reference = load(self.group.ranks)
        self.paths = paths


_loaded: dict[str, Any] = {}  # models of this process by path


def load_models(checkpoint: str, reference: str | None, ranks: Any, *, device: str, dtype: Any) -> tuple[Any, Any]:
    """(a rank's part of the model, its LocalReference or None). A model of the last call is kept if it is needed."""
    from rcd_core.decoding.reference import LocalReference
    from rcd_core.families.loading import load_model

    be_patient()
    paths = [path for path in (checkpoint, reference) if path]
    for path in set(_loaded) - set(paths):  # free them before others are loaded
        del _loaded[path]
    for path in paths:
        if path not in _loaded:
            _loaded[path] = load_model(path, dtype=dtype, device=device, ranks=ranks)
    return _loaded[checkpoint], LocalReference(_loaded[reference]) if reference else None


def _reference_weights(model: Any, reference: Any, request: Any, output: Any) -> dict[str, float]:
    """The cost of a reference pass in target passes. request: None if there was no reference pass."""
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
