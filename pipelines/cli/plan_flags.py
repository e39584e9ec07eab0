"""The flags of the commands that plan. As flags.py, it imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipelines.cli.flags import FLAG, Device, Int

EXAMPLES = FLAG("Training examples, if the stage prepare has not run.")
TOKENS = FLAG("Mean tokens of an example. Default: data.max_length.")
MFU = FLAG("Model FLOPs utilisation: achieved share of the peak.")
RECIPE = FLAG("Name of a shipped recipe, or a YAML file.")
SET = FLAG("Change a key of the recipe; repeatable.", metavar="KEY=VALUE")


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Time, GPU hours, memory and disk of a recipe's stages, before any work.

    rcd plan --recipe sdar-4b-b32 --examples 100000 --example_tokens 3000 --device H100

    Nothing is downloaded: sizes of known checkpoints ship with the package.
    """

    recipe: Annotated[str, RECIPE]
    set: Annotated[tuple[str, ...], SET] = ()
    device: Annotated[Device, FLAG("GPU.")] = "H100"
    gpus: Annotated[Int | None, FLAG("Number of GPUs. Default: resources.num_workers.")] = None
    mfu: Annotated[float, MFU] = 0.4
    examples: Annotated[Int | None, EXAMPLES] = None
    example_tokens: Annotated[float | None, TOKENS] = None
    vocab_size: Annotated[Int | None, FLAG("Vocabulary, if the tokenizer is not on this machine.")] = None


@dataclass(frozen=True, kw_only=True)
class SignalsPlanFlags:
    """Estimate rows, bytes, device hours and break-even of a signal cache.

    rcd signals plan --recipe demo
    """

    recipe: Annotated[str, RECIPE]
    set: Annotated[tuple[str, ...], SET] = ()
    peak_tflops: Annotated[float, FLAG("Peak of the device; 989 is an H100 in dense bf16.")] = 989.0
    mfu: Annotated[float, MFU] = 0.4
    examples: Annotated[Int | None, EXAMPLES] = None
    example_tokens: Annotated[float | None, TOKENS] = None
    reference_params: Annotated[float | None, FLAG("Parameters of a reference that is not on this machine.")] = None
    target_params: Annotated[float | None, FLAG("Parameters of a target that is not on this machine.")] = None
    storage_hours: Annotated[float, FLAG("Cost of keeping the cache, in device hours.")] = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainPlanFlags(PlanFlags):
    """Estimate bytes per GPU by strategy, the fewest GPUs, FLOPs and hours of a training.

    rcd train plan --recipe sdar-8b-b64 --device H100 --mfu 0.4
    rcd train plan --recipe demo --gpus 4 --set target.train.strategy=fsdp2
    """
