"""The flags of the commands that look at files or make others of them. As flags.py, it imports nothing slow."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from pipelines.cli.flags import CHECKPOINTS, FLAG, NO_VERIFY, Device, Int
from rcd_core.decode_settings import ConvertAttention


@dataclass(frozen=True)
class ConvertFlags:
    """Turn an autoregressive checkpoint (Qwen2, Qwen3, Llama) into the start of a diffusion model, to be trained.

    rcd convert Qwen/Qwen3-0.6B --output /models/start

    A recipe does the same by `base.convert`.
    """

    start: Annotated[str, FLAG("Directory, GGUF file, URI or hub id of the checkpoint.")]
    _: KW_ONLY
    output: Annotated[str, FLAG("New directory.", metavar="DIR")]
    mask_token: Annotated[str | None, FLAG("Unused or new token. Default: the tokenizer's own, else <|MASK|>.")] = None
    block_length: Annotated[Int, FLAG("Tokens that are decoded together.")] = 32
    shift: Annotated[bool, FLAG("Keep the logits one position behind; only Qwen2 (Fast-dLLM v2, Dream).")] = False
    attention: Annotated[ConvertAttention, FLAG("Block-causal, or over the whole canvas.")] = "blocks"
    no_verify: Annotated[bool, FLAG(NO_VERIFY, name="--no-verify")] = False


@dataclass(frozen=True)
class DataInspectFlags:
    """Show how a data file is read: its dialect, what would be dropped and why, lengths, and one example.

    rcd data inspect chats.jsonl --tokenizer MODEL
    """

    path: Annotated[str, FLAG("File, URI or hf://owner/name[:split]: .jsonl, .json, .csv (also .gz) or .parquet.")]
    _: KW_ONLY
    tokenizer: Annotated[str | None, CHECKPOINTS("Tokenizer or checkpoint, for lengths and an example.")] = None
    task: Annotated[str, FLAG("Task whose columns are looked for first.")] = "qa"
    field: Annotated[tuple[str, ...], FLAG("A field of the task and its column; repeatable.", metavar="A=B")] = ()
    dialect: Annotated[str | None, FLAG("As data.dialect. Default: found from the columns.")] = None
    turns: Annotated[Literal["all", "last"], FLAG("Answers that are trained.")] = "all"
    reasoning: Annotated[Literal["keep", "drop"], FLAG("Reasoning before the answers.")] = "keep"
    max_length: Annotated[Int, FLAG("Tokens above which rows are dropped.")] = 8192
    block_length: Annotated[Int, FLAG("Rows are padded to a multiple of this.")] = 32
    rows: Annotated[Int, FLAG("Rows to read; 0 reads all.")] = 1000


@dataclass(frozen=True)
class ExportFlags:
    """Copy a model of a run to a checkpoint of its own, with the T_res that the run chose for it and a model card.

    rcd export ~/rcd-runs/demo --output /models/demo
    """

    run: Annotated[str, FLAG("Directory or URI of a run.")]
    _: KW_ONLY
    output: Annotated[str, FLAG("New directory or URI.", metavar="DIR")]
    stage: Annotated[str, FLAG("Stage that trained the model.")] = "target"
    adapter: Annotated[bool, FLAG("Only the adapter of a training with train.lora, in PEFT's format.")] = False
    no_verify: Annotated[bool, FLAG(NO_VERIFY, name="--no-verify")] = False


@dataclass(frozen=True)
class FitFlags:
    """What of a checkpoint fits on a device: requests at once, and rows of a training step by strategy.

    rcd fit JetLM/SDAR-8B-Chat --device H100 --gpus 8

    Nothing is downloaded: sizes of known checkpoints ship with the package.
    """

    checkpoint: Annotated[str, FLAG("Directory, URI or hub id.")]
    _: KW_ONLY
    device: Annotated[Device | None, FLAG("GPU. Default: this machine's device.")] = None
    gpus: Annotated[Int, FLAG("Number of GPUs of a training.")] = 1
    length: Annotated[Int, FLAG("Tokens of a training row.")] = 4096
    block_length: Annotated[Int, FLAG("Tokens that are decoded together.")] = 32


@dataclass(frozen=True)
class PushFlags:
    """Upload an exported checkpoint with its model card to the Hugging Face hub. Needs a token (HF_TOKEN).

    rcd push /models/demo --repo owner/name
    """

    directory: Annotated[str, FLAG("A checkpoint that `rcd export` wrote.")]
    _: KW_ONLY
    repo: Annotated[str, FLAG("Repository; made if it does not exist.", metavar="OWNER/NAME")]
    private: Annotated[bool, FLAG("Make a new repository private.")] = False
    message: Annotated[str, FLAG("Of the commit.")] = "Upload with rcd push"


@dataclass(frozen=True)
class TraceFlags:
    """Show a trace in a browser: each pass, with the candidates of each token. Needs no model.

    rcd generate --model_dir MODEL --prompt "..." --trace_file trace.json
    rcd trace trace.json
    """

    file: Annotated[str, FLAG("What `rcd generate --trace_file` or the playground has saved: a path or URI.")]
    _: KW_ONLY
    port: Annotated[Int, FLAG("Port on this machine; 0 takes a free one.")] = 0
    idle_minutes: Annotated[float, FLAG("Minutes without a request after which it ends.")] = 10.0


@dataclass(frozen=True)
class SignalsInspectFlags:
    """Show what a directory of signals holds, and how faithful it is.

    rcd signals inspect ~/rcd-runs/demo/signals --reference REF --target RCD
    """

    directory: Annotated[str, FLAG("<run>/signals of a finished stage; a directory or URI.")]
    _: KW_ONLY
    reference: Annotated[str | None, FLAG("To measure fidelity: the checkpoint the signals come from.")] = None
    target: Annotated[str | None, FLAG("To measure fidelity: a checkpoint trained on them.")] = None
    sample: Annotated[Int, FLAG("Masked positions to measure fidelity on.")] = 4096
    output: Annotated[str | None, FLAG("PNG to write, with the plots.", metavar="FILE")] = None
    no_verify: Annotated[bool, FLAG(NO_VERIFY, name="--no-verify")] = False
