"""Plans a training run before it starts: sizes of models and steps, and bytes on each GPU.

Arithmetic on sizes; nothing is loaded. The formulas count what strategies.py, loss_module.py and transformers' layers
keep; tests/rcd_core/training/test_plan.py compares them with measured peaks.

Shapes: D width, V vocabulary, M tokens that enter the layers in one micro-batch, N masked positions among them, c bytes
of a number in the passes' dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from rcd_core.families.config import ModelConfig
from rcd_core.families.experts import Experts
from rcd_core.ops.tiles import logits_bytes
from rcd_core.training.settings import LoraSettings, TrainSettings

FP32 = 4
ADAM = 2 * FP32  # two moments, in fp32 whatever the passes' dtype
# Bytes on the card, from the vendors' data sheets. The rest of 1 - USABLE is for the CUDA context, NCCL and
# fragmentation: an assumption, not a measurement.
MEMORY = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 192e9, "L40S": 48e9, "L4": 24e9}
USABLE = 0.9
# DeepSpeed's defaults, in parameters: reduced at a time, gathered at a time, and live at once (stage 3).
REDUCE_BUCKET, GATHER_BUCKET, LIVE = 500_000_000, 500_000_000, 1_000_000_000

Family = Literal["sdar", "llada"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes that decide parameters and activations."""

    family: Family
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_embeddings: bool
    biases: int = 0  # parameters of a layer's biases
    head_norms: bool | None = None  # of queries and keys; None: as SDAR has and LLaDA has not
    experts: Experts | None = None

    @classmethod
    def of(cls, start: ModelConfig, vocab_size: int) -> ModelShape:
        """Of a new model."""
        own = ("head_dim", "vocab_size", "biases", "head_norms", "experts")
        same = {f.name: getattr(start, f.name) for f in fields(cls) if f.name not in own}
        return cls(**same, head_dim=start.resolved_head_dim, vocab_size=vocab_size)

    @classmethod
    def of_backbone(cls, family: Family, config: Any) -> ModelShape:
        """Of a transformers configuration, as the families load it from config.json."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        biases = (config.num_attention_heads + 2 * config.num_key_value_heads) * width
        if config.model_type != "qwen2":  # which has those of q, k, v, and no field for them
            biases = biases + config.hidden_size if getattr(config, "attention_bias", False) else 0
        has_norms = config.model_type in ("qwen3", "qwen3_moe", "glm4_moe")
        return cls(
            family=family,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=width,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            biases=biases,
            head_norms=None if has_norms == (family == "sdar") else has_norms,
            experts=Experts.of(config),
        )

    @property
    def has_head_norms(self) -> bool:
        """Of queries and keys."""
        return self.family == "sdar" if self.head_norms is None else self.head_norms

    def layer(self, columns: int) -> int:
        """Parameters of a layer whose MLP has so many columns: projections, MLP, two norms, norms of queries and
        keys, biases."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        head_norms = 2 * self.head_dim if self.has_head_norms else 0
        return attention + 3 * self.hidden_size * columns + 2 * self.hidden_size + head_norms + self.biases

    @property
    def layer_parameters(self) -> int:
        """Of the largest layer."""
        e = self.experts
        return self.layer(self.intermediate_size) if e is None else self.layer(e.columns) + e.router(self.hidden_size)

    @property
    def all_layers(self) -> int:
        """Parameters of all layers."""
        dense = 0 if self.experts is None else self.experts.dense_layers
        return (self.num_layers - dense) * self.layer_parameters + dense * self.layer(self.intermediate_size)

    @property
    def active_layers(self) -> int:
        """Parameters of all layers that a token meets: of a mixture, those of its experts."""
        e = self.experts
        if e is None:
            return self.all_layers
        mixture = self.layer(e.active_columns) + e.router(self.hidden_size)
        return (self.num_layers - e.dense_layers) * mixture + e.dense_layers * self.layer(self.intermediate_size)

    @property
    def active_columns(self) -> int:
        """Columns of the MLP that a token meets in a layer."""
        return self.intermediate_size if self.experts is None else self.experts.active_columns

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def root_parameters(self) -> int:
        """Outside the layers: embedding, head and final norm."""
        return self.head_parameters * (1 if self.tie_embeddings else 2) + self.hidden_size

    @property
    def parameters(self) -> int:
        return self.all_layers + self.root_parameters


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The largest micro-batch of one worker. tokens: M; masked: the expected N; accumulated: a step has more than one
    micro-batch; signal_k: ids kept per masked position, 0 without residuals."""

    tokens: int
    masked: int
    accumulated: bool
    signal_k: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by purpose; host: bytes per worker in the host's memory.

    weights, gradients, optimizer: with the copies that the strategy makes. activations: kept for the backward pass.
    loss: logits of a chunk and the head's gradient. signals: for residuals.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    signals: float
    accumulated: bool
    host: float = 0.0

    @property
    def peak(self) -> float:
        """The larger of two moments: the end of the forward pass (all activations, gradients only if accumulated) and
        the end of the backward pass (all gradients)."""
        fixed = self.weights + self.optimizer
        before = self.gradients if self.accumulated else 0.0
        return fixed + max(before + self.activations + self.loss + self.signals, self.gradients)


def step_shape(
    shape: ModelShape, settings: TrainSettings, max_length: int, workers: int, labelled_share: float, signal_k: int
) -> StepShape:
    """Of rows of pack_length tokens, or max_length without packing. SDAR's [noisy | clean] has at most twice as many
    tokens; on average half of the labelled tokens are masked. labelled_share: of all tokens."""
    share = max(1, settings.batch_size // workers)
    length = max(settings.pack_length or 0, max_length)
    rows = share if settings.pack_length is None else max(1, -(-share * max_length // length))
    micro = min(settings.micro_batch_size or rows, rows)
    passes = 2 if shape.family == "sdar" else 1
    return StepShape(
        tokens=micro * length * passes,
        masked=round(micro * length * labelled_share / 2),
        accumulated=micro < rows,
        signal_k=signal_k,
    )


def layer_activations(shape: ModelShape, numbers: int, mixed: bool) -> float:
    """Bytes per token that one layer keeps for its backward pass. numbers: c.

    An RMSNorm keeps its input (in fp32, a copy if c is 2) and the normalised input; its output is kept by the
    projections. Attention keeps q, k, v, its output and a logarithm per head; SDAR first normalises queries and keys.
    SwiGLU keeps gate, its SiLU, up and their product. mixed: autocast over fp32 weights (DDP in bf16) keeps the
    residual stream in fp32 and a copy of the input for each projection.
    """
    width, inner = shape.hidden_size, shape.active_columns
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norm = (FP32 + numbers) * width
    inputs = 2 * numbers * width
    if mixed:
        norm, inputs = 2 * FP32 * width, FP32 * 2 * width + 5 * numbers * width
    head_norms = (FP32 + numbers) * (queries + keys) if shape.has_head_norms else 0
    attention = numbers * (2 * queries + 2 * keys) + FP32 * shape.num_heads
    return 2 * norm + inputs + head_norms + attention + numbers * 4 * inner


def products(shape: ModelShape, numbers: int) -> float:
    """Bytes per token of one layer's matrix products and attention, which selective checkpointing keeps."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    outputs = 2 * queries + 2 * keys + 2 * shape.hidden_size + 2 * shape.active_columns
    return numbers * outputs + FP32 * shape.num_heads


def memory(
    shape: ModelShape,
    settings: TrainSettings,
    step: StepShape,
    workers: int,
    strategy: Mapping[str, Any] | None = None,
    card: float | None = None,
) -> Memory:
    """Bytes per GPU. strategy: a DeepSpeed configuration to use instead of settings.deepspeed. card: bytes of a GPU,
    which decide the chunks of the loss; None: a CPU."""
    numbers = 2 if settings.dtype == "bfloat16" else FP32
    mixed = settings.strategy == "ddp" and numbers == 2
    per_layer = layer_activations(shape, numbers, mixed)
    stream = (FP32 if mixed else numbers) * shape.hidden_size  # the residual stream between two layers
    if settings.activation_checkpointing:
        kept = stream + (products(shape, numbers) if settings.activation_checkpointing == "selective" else 0)
        activations = step.tokens * (shape.num_layers * kept + per_layer)
    else:
        activations = step.tokens * shape.num_layers * per_layer
    activations += step.tokens * 2 * stream  # embeddings and the final norm
    # One chunk of logits in fp32 and its gradient in the passes' dtype; the head's gradient, summed in fp32; hidden
    # states and their gradients.
    chunk = min(logits_bytes(card), FP32 * step.masked * shape.vocab_size)
    loss = chunk * (1 + numbers / FP32) + FP32 * shape.head_parameters + 2 * numbers * step.masked * shape.hidden_size
    # Per kept entry an int64 id and a probability; delta in fp32, twice.
    signals = step.masked * (12.0 * step.signal_k + 3 * FP32 * shape.hidden_size if step.signal_k else 0.0)
    weights, gradients, optimizer, host = _states(shape, settings, numbers, workers, strategy)
    return Memory(weights, gradients, optimizer, activations, loss, signals, step.accumulated, host)


def _states(
    shape: ModelShape, settings: TrainSettings, numbers: int, workers: int, strategy: Mapping[str, Any] | None
) -> tuple[float, float, float, float]:
    """(weights, gradients, optimizer, host) bytes of the parameters under a strategy, copies included."""
    total = float(shape.parameters)
    trained = total if settings.lora is None else float(adapter_parameters(shape, settings.lora))
    if settings.strategy == "ddp":
        copies = 2.0 * total if numbers == 2 else 0.0  # autocast's, kept until the end of the pass
        # Gradients are DDP's buckets, and no further copy.
        return FP32 * total + copies, FP32 * trained, moments(shape, settings, trained), 0.0
    if settings.strategy == "fsdp2":
        # The head stays gathered (or the embedding, in the backward pass), and two layers: the one in use and the next.
        # Gradients are whole before they are summed in fp32 and sharded.
        head = shape.head_parameters + shape.hidden_size
        gathered = numbers * (head + 2 * shape.layer_parameters)
        whole = (numbers + FP32) * max(head, shape.layer_parameters) * trained / total
        part, own = (count / settings.shards(workers) for count in (total, trained))
        shards = [FP32 * part, FP32 * own, moments(shape, settings, trained) / settings.shards(workers)]
        if settings.cpu_offload:
            return gathered, whole, 0.0, sum(shards)
        return shards[0] + gathered, shards[1] + whole, shards[2], 0.0
    return _zero(shape, settings.deepspeed if strategy is None else strategy, numbers, workers)


def moments(shape: ModelShape, settings: TrainSettings, trained: float) -> float:
    """Bytes of the optimiser: Muon has one moment for each matrix of a layer (but for experts), AdamW two for each."""
    if settings.optimizer == "adamw":
        return ADAM * trained
    matrices = shape.all_layers if shape.experts is None else shape.num_layers * shape.layer(0)
    return ADAM * trained - FP32 * matrices


def adapter_parameters(shape: ModelShape, lora: LoraSettings) -> int:
    """Trained parameters of LoRA. Experts' layers, which PEFT does not find, count as nothing."""
    width, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sides = {"q_proj": width + queries, "k_proj": width + keys, "v_proj": width + keys, "o_proj": queries + width}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), width + shape.intermediate_size)
    return shape.num_layers * lora.rank * sum(sides.get(name, 0) for name in lora.modules) + width


def _zero(
    shape: ModelShape, config: Mapping[str, Any], numbers: int, workers: int
) -> tuple[float, float, float, float]:
    """DeepSpeed: weights and gradients in the passes' dtype, fp32 master weights with the optimiser."""
    zero = config.get("zero_optimization", {"stage": 2})
    stage = int(zero.get("stage", 0))
    total = float(shape.parameters)
    master = FP32 + ADAM
    weights = numbers * total / (workers if stage == 3 else 1)
    gradients = numbers * total / (workers if stage >= 2 else 1)
    optimizer = master * total / (workers if stage >= 1 else 1)
    if stage == 3:
        weights += numbers * min(total, zero.get("stage3_max_live_parameters", LIVE))
    elif stage:
        weights += numbers * min(total, zero.get("allgather_bucket_size", GATHER_BUCKET))
    gradients += numbers * min(total, zero.get("reduce_bucket_size", REDUCE_BUCKET))
    host = 0.0
    if zero.get("offload_optimizer", {}).get("device") in ("cpu", "nvme"):
        host, optimizer = host + optimizer, 0.0
    if stage == 3 and zero.get("offload_param", {}).get("device") in ("cpu", "nvme"):
        host += numbers * total / workers
        weights -= numbers * total / workers
    return weights, gradients, optimizer, host


def fits(memory: Memory, device: str) -> bool:
    return memory.peak <= USABLE * MEMORY[device]
