"""The recipe: one strict, typed description of a whole run. Its sections are the settings classes of rcd_core."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fnmatch import fnmatch
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from rcd_core.calibration.distance import Match
from rcd_core.decode_settings import DecodeSettings, Start
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.residual import ResidualSettings
from rcd_core.training.settings import SignalRule, TrainSettings

# A checkpoint (path, URI or hub id) or the sizes of a model to make. The tags keep pydantic's complaints to one line.
ModelSource = Annotated[
    Annotated[str, Tag("<checkpoint>")] | Annotated[ModelConfig, Tag("<config>")],
    Discriminator(lambda value: "<checkpoint>" if isinstance(value, str) else "<config>"),
]
DataSource = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[tuple[str, ...], Tag("<many>"), Field(min_length=1)],
    Discriminator(lambda value: "<many>" if isinstance(value, list | tuple) else "<one>"),
]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
# A number of workers, or the fewest and the most that a training may go on with.
Workers = Annotated[
    Annotated[Count, Tag("<fixed>")] | Annotated[tuple[Count, Count], Tag("<elastic>")],
    Discriminator(lambda value: "<elastic>" if isinstance(value, list | tuple) else "<fixed>"),
]
Positive = Annotated[float, Field(gt=0)]
EntryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
# Whether to train a baseline, or the checkpoint that is one.
Baseline = Annotated[
    Annotated[str, Tag("<checkpoint>")] | Annotated[bool, Tag("<switch>")],
    Discriminator(lambda value: "<checkpoint>" if isinstance(value, str) else "<switch>"),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSettings(Section):
    """What is learned and tested on; comments on every key stand in recipes/demo.yaml."""

    task: str
    test_task: str | None = None
    train: DataSource | None
    test: DataSource
    num_train: Count | None = None
    num_test: Count | None = None
    num_validation: Annotated[int, Field(ge=0, le=4096)] = 0
    fields: dict[str, str] = {}
    test_fields: dict[str, str] | None = None
    max_length: Count = 256
    min_length: Count | None = None
    pad_multiple: Count | None = None
    max_bad_rows: Share = 0.01

    def task_of(self, split: str) -> str:
        """The task of a split's rows: what is tested and graded can be another one than what is trained."""
        return self.test_task if split == "test" and self.test_task is not None else self.task


class TokenizerSettings(Section):
    path: str | None = None
    vocab_size: Annotated[int, Field(ge=260)] = 512  # 256 bytes and four special tokens must fit


class BaseStage(Section):
    start: ModelSource
    train: TrainSettings


class ReferenceStage(Section):
    start: ModelSource
    train: TrainSettings | None = None


class SignalSettings(Section):
    top_k: Annotated[int, Field(ge=1, le=32767)] = 32  # num_kept is stored in 16 bits
    keep_mass: Annotated[float, Field(gt=0, le=1)] | None = 0.99  # with 32: measured, tests/benchmarks/README.md
    alpha_temperature: Positive = 1.0
    delta_temperature: Positive = 1.0
    shard_mb: Annotated[float, Field(gt=0, le=1024)] = 128  # Arrow counts a list's entries in 31 bits
    batch_tokens: Count = 16384
    max_bad_rows: Share = 0.01

    @property
    def rule(self) -> SignalRule:
        """The part of the section that the online path needs as well."""
        return SignalRule(**{f.name: getattr(self, f.name) for f in fields(SignalRule)})


class TargetStage(Section):
    start: ModelSource | None = None
    train: TrainSettings | None
    residual: ResidualSettings = ResidualSettings()


class ExtraArm(Section):
    """One more way to decode a model of the run, beside those that every model gets. decode: what differs from
    evaluate.decode; the threshold is swept, as everywhere."""

    model: str
    title: str | None = None
    decode: DecodeSettings = DecodeSettings()


class EvaluateSettings(Section):
    settings: str | None = None
    num_examples: Count | None = None
    samples: Count = 1
    batch_size: Count = 256
    decode: DecodeSettings = DecodeSettings()
    thresholds: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
    block_lengths: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    accuracy_levels: tuple[Share, ...] = (0.9,)
    starts: Annotated[tuple[Start, ...], Field(min_length=1)] = ("zero", "reference")
    arms: dict[EntryName, ExtraArm] = {}
    run_code: bool = False


class CalibrateSettings(Section):
    num_examples: Count = 256
    match: Match = "decoding"
    decode: DecodeSettings = DecodeSettings()


class DeployedModel(Section):
    """A checkpoint from outside the run, served beside the target; `decode`: its default settings."""

    checkpoint: str
    decode: DecodeSettings = DecodeSettings()


class DeploySettings(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    model_id: str = "rcd"
    start: Start = "reference"
    decode: DecodeSettings = DecodeSettings()
    baseline: bool = False
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], DeployedModel] = {}
    max_batch: Count = 32
    max_queue: Annotated[int, Field(ge=0)] = 128
    max_length: Count | None = None
    min_replicas: Count = 1
    max_replicas: Count = 1
    target_ongoing_requests: Positive | None = None


class Resources(Section):
    """What the stages ask of the cluster. Never part of a stage's key: results do not depend on it."""

    num_workers: Workers = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    max_failures: Annotated[int, Field(ge=0)] = 3
    signal_actors: Count = 1
    evaluate_actors: Count = 1
    timeout_s: Annotated[float, Field(ge=0)] = 600
    no_progress_timeout_s: Positive | None = None
    custom: dict[str, dict[str, Positive]] = {}

    @property
    def worker_counts(self) -> range:
        """All numbers of workers that a training may find itself with."""
        one = self.num_workers
        return range(one, one + 1) if isinstance(one, int) else range(one[0], one[1] + 1)

    @property
    def elastic(self) -> bool:
        return not isinstance(self.num_workers, int)

    def custom_resources(self, stage: str) -> dict[str, float]:
        """Ray's custom resources that each worker of a stage asks for: those of all patterns that fit its name."""
        return {
            name: amount
            for pattern, asked in self.custom.items()
            if fnmatch(stage, pattern)
            for name, amount in asked.items()
        }

    def worker_bundle(self, stage: str) -> dict[str, float]:
        """All that one worker of a stage asks of the node it runs on."""
        asked = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker, **self.custom_resources(stage)}
        return {name: amount for name, amount in asked.items() if amount}


@dataclass(frozen=True)
class Training:
    """What one training stage does. start None: the checkpoint of the base stage. residual None: plain masked SFT."""

    start: str | ModelConfig | None
    train: TrainSettings
    residual: ResidualSettings | None


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage: str
    seed: Annotated[int, Field(ge=0)] = 0
    block_length: Count
    noise: NoiseSettings = NoiseSettings()
    data: DataSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    base: BaseStage | None = None
    reference: ReferenceStage | None = None
    signals: SignalSettings = SignalSettings()
    target: TargetStage
    variants: dict[EntryName, ResidualSettings] = {}
    baseline: Baseline = True
    baselines: dict[EntryName, TrainSettings] = {}
    calibrate: CalibrateSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()
    deploy: DeploySettings = DeploySettings()
    resources: Resources = Resources()

    @property
    def run_directory(self) -> str:
        return storage.join(self.storage, self.name)

    def residuals(self) -> dict[str, ResidualSettings]:
        """How each target is trained with residuals, by the recipe's section for it; none for one taken as it is."""
        if self.target.train is None:
            return {}
        return {"target.residual": self.target.residual} | {f"variants.{n}": r for n, r in self.variants.items()}

    def residual(self, stage: str) -> ResidualSettings | None:
        """How the model of a stage was trained with residuals; None for one without, or from outside the run."""
        sections = {"target": "target.residual"} | {f"target-{name}": f"variants.{name}" for name in self.variants}
        if self.checkpoint(stage) and stage == "target" and not self.target.residual.feeds_back:
            return self.target.residual  # all that a recipe can say of a checkpoint: that it feeds nothing back
        return self.residuals().get(sections.get(stage, ""))

    def checkpoint(self, stage: str) -> str | None:
        """The checkpoint that is taken as it is for a stage's model; None where a model is trained."""
        found: str | ModelConfig | bool | None = None
        if stage == "target" and self.target.train is None:
            found = self.target.start
        elif stage == "baseline":
            found = self.baseline
        elif stage == "reference" and self.reference and self.reference.train is None:
            found = self.reference.start
        return found if isinstance(found, str) else None

    def training(self, stage: str) -> Training:
        """The work of a training stage: base, reference, target, target-<variant>, baseline or baseline-<name>."""
        if stage == "base" and self.base:
            return Training(self.base.start, self.base.train, None)
        if stage == "reference" and self.reference and self.reference.train:
            return Training(self.reference.start, self.reference.train, None)
        train = self.target.train
        if train and stage == "baseline" and self.baseline is True:
            return Training(self.target.start, train, None)
        if (name := stage.removeprefix("baseline-")) in self.baselines:
            return Training(self.target.start, self.baselines[name], None)
        residual = self.residual(stage)
        if train is None or residual is None:
            raise UserError(f"stage {stage!r} trains nothing in recipe {self.name}")
        return Training(self.target.start, train, residual)
