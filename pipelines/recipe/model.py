"""The recipe: one strict, typed description of a whole run. Settings classes of rcd_core are sections as they are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field

from pipelines.recipe.deploy import DeploySettings
from pipelines.recipe.evaluation import EvaluateSettings
from pipelines.recipe.files import RUN_NAME
from pipelines.recipe.resources import Resources
from pipelines.recipe.types import (
    Baseline,
    Count,
    DataSource,
    DialectName,
    EntryName,
    ModelSource,
    Positive,
    Section,
    Share,
)
from rcd_core.calibration.distance import Match
from rcd_core.decode_settings import ConvertAttention, DecodeSettings
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.process import ProcessSettings
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings


class DataSettings(Section):
    """Training and test examples."""

    task: str
    """Task that defines prompts and grading, for example `sudoku`, `gsm8k` or `math`."""
    test_task: str | None = None
    """Task of the test examples, when it differs from `task`."""
    train: DataSource | None
    """`synthetic`, paths or URIs of .jsonl, .json, .csv (each also .gz) or .parquet files,
    `hf://owner/name[@config][:split]`; null: no training."""
    test: DataSource
    """Test examples, given like `train`."""
    num_train: Count | None = None
    """Examples to generate or to read at most; null reads all."""
    num_test: Count | None = None
    """The same for the test examples."""
    num_validation: Annotated[int, Field(ge=0, le=4096)] = 0
    """Training examples held out for `train.validate_every` and for `calibrate`."""
    fields: dict[str, str] = {}
    """Field of the task -> column of the data set, where the names differ."""
    test_fields: dict[str, str] | None = None
    """The same for the test examples; null uses `fields`, or the task's own names with a `test_task`."""
    dialect: DialectName | None = None
    """How training rows write conversations (`rcd data inspect`); null: found from the columns."""
    turns: Literal["all", "last"] = "all"
    """Answers of a conversation that are trained."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Whether answers of conversations keep what the model thought before them, in `<think>` tags."""
    max_length: Count = 256
    """Tokens of prompt, response and padding; longer examples count as bad."""
    min_length: Count | None = None
    """Shorter examples are dropped."""
    pad_multiple: Count | None = None
    """Examples are padded to a multiple of this; null: `block_length`."""
    max_bad_rows: Share = 0.01
    """Share of unusable rows that is tolerated; more of them stop the run."""

    def task_of(self, split: str) -> str:
        """The task of a split's examples."""
        return self.test_task if split == "test" and self.test_task is not None else self.task


class TokenizerSettings(Section):
    """The tokenizer."""

    path: str | None = None
    """Directory, URI or hub id of a tokenizer; null trains one on the training texts, or takes that of a `base.start`
    to convert."""
    vocab_size: Annotated[int, Field(ge=260)] = 512  # 256 bytes and four special tokens must fit
    """Size of the tokenizer to train."""


class ConvertSettings(Section):
    """How an autoregressive checkpoint (Qwen2, Qwen3, Llama) becomes a diffusion model, which `base.train` trains."""

    mask_token: str | None = None
    """An unused token of the vocabulary, or a new one; null: the tokenizer's own, else `<|MASK|>`."""
    shift: bool = False
    """Keep the logits one position behind, as in autoregressive models. Only Qwen2 has such families: Fast-dLLM v2, or
    Dream."""
    attention: ConvertAttention = "blocks"
    """`blocks`: block-causal, with an exact cache; `canvas`: every token sees the whole canvas."""
    block_warmup: Share = 0.0
    """Share of the steps in which blocks grow from one token, which is causal attention, to `block_length`."""


class BaseStage(Section):
    """A plain diffusion model that target and baseline start from; null where `target.start` is given."""

    start: ModelSource
    """A checkpoint (directory, GGUF file, URI or hub id), or the sizes of a new model."""
    convert: ConvertSettings | None = None
    """Give this, `{}` for the defaults, if the checkpoint is an autoregressive model."""
    train: TrainSettings
    """Its training."""


class ReferenceStage(Section):
    """The model whose predictions are the residuals in training."""

    start: ModelSource | None
    """A checkpoint, the sizes of a new model, or null for the model of stage base."""
    train: TrainSettings | None = None
    """Its training; null uses the checkpoint unchanged."""


class SignalSettings(Section):
    """The reference's predictions, stored sparsely."""

    top_k: Annotated[int, Field(ge=1, le=32767)] = 32  # num_kept is stored in 16 bits
    """Token ids stored per masked position; the mean embedding stands for the rest."""
    keep_mass: Annotated[float, Field(gt=0, le=1)] | None = 0.99  # with 32: measured, tests/benchmarks/README.md
    """Of these, only as many as reach this probability; null stores all."""
    alpha_temperature: Positive = 1.0
    """Softmax temperature of the entropy behind alpha."""
    delta_temperature: Positive = 1.0
    """Softmax temperature of the stored probabilities."""
    on_policy: Share = 0.0
    """Share of the rows that are masked where the model that makes the signals is unsure after a pass over a noisier
    version of them, as decoding would leave them; the predictions of that pass are stored."""
    shard_mb: Annotated[float, Field(gt=0, le=1024)] = 128  # Arrow counts a list's entries in 31 bits
    """Largest size of a shard in MB; a lost actor loses at most one shard."""
    batch_tokens: Count = 16384
    """Tokens per forward pass, padding included."""
    max_bad_rows: Share = 0.01
    """Share of rows that the reference cannot read (too long, unknown ids) that is tolerated."""

    @property
    def rule(self) -> SignalRule:
        """The keys that online residuals use as well."""
        return SignalRule(**{f.name: getattr(self, f.name) for f in fields(SignalRule)})


class TargetStage(Section):
    """The RCD model."""

    start: ModelSource | None = None
    """A checkpoint, or null for the model of stage base."""
    train: TrainSettings | None
    """Its training; null uses the checkpoint unchanged."""
    residual: ResidualSettings = ResidualSettings()
    """Residuals in its training."""
    rounds: Count = 1
    """Parts of the training. The reference makes the signals of the first part, the target itself those of each
    further one."""
    keep_rounds: bool = False
    """Keep the signals and the training state of earlier rounds when the next has used them."""

    def round_ends(self, steps: int) -> list[int]:
        """The last step of each round of a training of so many steps."""
        return [steps * (number + 1) // self.rounds for number in range(self.rounds)]


class CalibrateSettings(Section):
    """The choice of T_res, the temperature that matches the target's alpha to the reference's; null: T_res is 1."""

    num_examples: Count = 256
    """Held-out training examples to use."""
    match: Match = "decoding"
    """Inputs on which target and reference are compared: those that decoding visits, or those of training."""
    decode: DecodeSettings = DecodeSettings()
    """Decoding settings; the confidence threshold decides which inputs decoding visits."""


@dataclass(frozen=True)
class Training:
    """The work of one training stage. start None: the checkpoint of stage base. residual None: plain masked SFT."""

    start: str | ModelConfig | None
    train: TrainSettings
    residual: ResidualSettings | None


class Recipe(Section):
    """Top-level keys."""

    name: Annotated[str, Field(pattern=RUN_NAME)]
    """Name of the run; its directory is `<storage>/<name>`."""
    storage: str = "~/rcd-runs"  # load.parse_recipe expands the user's home
    """Absolute directory or URI (`s3://`, `gs://`) that every node can access."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of synthetic data, new weights and dropout."""
    block_length: Count
    """Tokens that are decoded together."""
    noise: NoiseSettings = NoiseSettings()
    """How training examples are masked."""
    data: DataSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    base: BaseStage | None = None
    reference: ReferenceStage | None = None
    signals: SignalSettings = SignalSettings()
    target: TargetStage
    variants: dict[EntryName, ResidualSettings] = {}
    """Further targets `target-<name>`, each with what differs from `target.residual`."""
    baseline: Baseline = True
    """Train SeqD, the target's training without residuals; or a checkpoint to use instead."""
    baselines: dict[EntryName, TrainSettings] = {}
    """Further baselines `baseline-<name>`, each with what differs from `target.train`."""
    calibrate: CalibrateSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()
    deploy: DeploySettings = DeploySettings()
    resources: Resources = Resources()
    deterministic: bool = False
    """Repeat results bit for bit, slower, on one device of the same kind: [where](../README.md#the-same-bits-again)."""
    verify_weights: bool = True
    """Compare the weights of checkpoints with their stored digests, where they have some, before they are loaded."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers that get the metrics of trainings, beside TensorBoard; each is an extra to install."""
    tracker_project: str | None = None
    """Project or experiment there; null: `rcd`."""

    @property
    def run_directory(self) -> str:
        return storage.join(self.storage, self.name)

    @property
    def process(self) -> ProcessSettings:
        """Of every process that loads a model."""
        return ProcessSettings(verify_weights=self.verify_weights, deterministic=self.deterministic)

    @property
    def convert(self) -> ConvertSettings | None:
        return self.base.convert if self.base else None

    @property
    def tokenizer_source(self) -> str | None:
        """Where the tokenizer comes from; None: it is trained."""
        if self.tokenizer.path is None and self.base and self.base.convert and isinstance(self.base.start, str):
            return self.base.start
        return self.tokenizer.path

    def for_task(self, name: str) -> Recipe:
        """This recipe with an entry of evaluate.tasks in place of its test examples. Trains nothing."""
        task = self.evaluate.tasks[name]
        data = {
            "train": None,
            "test_task": task.task or name,
            "test": task.test,
            "num_test": task.num_test,
            "test_fields": task.fields,
            "max_length": task.max_length or self.data.max_length,
        }
        return self.model_copy(
            update={"data": self.data.model_copy(update=data), "evaluate": self.evaluate.for_task(name)}
        )

    def residuals(self) -> dict[str, ResidualSettings]:
        """Recipe key -> residual settings of every target that is trained."""
        if self.target.train is None:
            return {}
        return {"target.residual": self.target.residual} | {f"variants.{n}": r for n, r in self.variants.items()}

    def residual(self, stage: str) -> ResidualSettings | None:
        """How a stage's model was trained with residuals; None: without them, or a checkpoint from outside."""
        sections = {"target": "target.residual"} | {f"target-{name}": f"variants.{name}" for name in self.variants}
        sections |= {f"round-{number}": "target.residual" for number in range(1, self.target.rounds)}
        if self.checkpoint(stage) and stage == "target" and not self.target.residual.feeds_back:
            return self.target.residual  # a recipe can only say that a checkpoint uses no residuals
        return self.residuals().get(sections.get(stage, ""))

    def checkpoint(self, stage: str) -> str | None:
        """The existing checkpoint that a stage uses unchanged; None where a model is trained."""
        source: str | ModelConfig | bool | None = None
        if stage == "target" and self.target.train is None:
            source = self.target.start
        elif stage == "baseline":
            source = self.baseline
        elif stage == "reference" and self.reference and self.reference.train is None:
            source = self.reference.start
        return source if isinstance(source, str) else None

    def round_of(self, stage: str) -> int | None:
        """The number, from 1 on, of the round that a stage trains or makes the signals for; None outside of rounds."""
        kind, _, number = stage.rpartition("-")
        if self.target.rounds == 1 or stage == "signals":
            return None
        if stage == "target":
            return self.target.rounds
        return int(number) if kind in ("round", "signals") else None

    def training(self, stage: str) -> Training:
        """The work of stage base, reference, round-<number>, target, target-<variant>, baseline or baseline-<name>.

        Raises UserError for a stage that trains nothing.
        """
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
